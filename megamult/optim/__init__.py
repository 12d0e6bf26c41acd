"""Optimizers and their parts: update rules, param groups, clipping, schedules."""
