"""Checkpoints that a run in any sharding can read: every state is stored by name, with its global shape."""
