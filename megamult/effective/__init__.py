"""Checkpoints as effective weights, with the multipliers merged in: reading them one by one, and averaging them."""
