"""Time limits for work in which a slow rank is no sign of a failing one."""

ON_FILES = 2 * 3600.0
"""Seconds that ranks wait for one another's work on files, which a loaded file system may slow down."""
