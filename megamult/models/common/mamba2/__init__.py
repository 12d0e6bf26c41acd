"""Mamba-2 mixer: the layer, its sizes, the roles and specs of its parameters (arXiv 2405.21060)."""
