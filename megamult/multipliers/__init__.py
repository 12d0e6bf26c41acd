"""Learnable row and column multipliers of matrix layers (arXiv 2601.04890)."""
