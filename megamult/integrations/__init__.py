"""Multipliers for models that are not built from megamult's modules."""
