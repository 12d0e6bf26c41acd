"""Experiments of arXiv 2601.04890 at a size that two cores can run; README.md says which and how."""
