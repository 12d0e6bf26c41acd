"""Time limits for work during which a slow rank is not a sign of failure."""

ON_FILES = 2 * 3600.0
"""Seconds that ranks wait for one another's work on files, which a loaded file system may slow down."""
