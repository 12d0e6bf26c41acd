"""Checkpoints that any layout reads: every state by name and global shape; export and import."""
