"""Multipliers for models that other people wrote."""
