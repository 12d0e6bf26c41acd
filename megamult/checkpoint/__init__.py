"""Logical tensors by name and global shape: gathering and writing them."""
