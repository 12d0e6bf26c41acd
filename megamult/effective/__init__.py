"""Effective weights of checkpoints: reading the weights one by one, and averaging those of several checkpoints."""
