"""Falcon-H1: attention and a Mamba-2 mixer side by side in every layer, then a gated MLP (arXiv 2507.22448)."""
