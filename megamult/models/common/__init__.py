"""Modules that several architectures share."""
