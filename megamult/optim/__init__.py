"""Optimizers and what they need: param groups, clipping, schedules."""
