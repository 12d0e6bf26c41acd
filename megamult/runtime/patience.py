"""How long ranks wait for one another where the wait has nothing to do with a peer's health."""

ON_FILES = 2 * 3600.0
"""Seconds for work on files, which no peer can hold up, and which a loaded file system may."""
