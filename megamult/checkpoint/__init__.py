"""Checkpoints that a run in any sharding can read, because each tensor is stored by name, with its global shape."""
