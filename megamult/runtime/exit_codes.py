"""Exit codes of every program of megamult. Values above 2 are those of sysexits.h that a supervisor can act on."""

from __future__ import annotations

USER_ERROR = 2
"""A mistake in keys, files or data, which the same command would repeat."""

DIVERGED = 65
"""`train.max_bad_steps` steps in a row were bad: the same command would only repeat them (EX_DATAERR)."""

UNAVAILABLE = 69
"""Not all processes of the launch came together (EX_UNAVAILABLE)."""

WATCHDOG = 70
"""The run was ended because a rank died or stood still (EX_SOFTWARE)."""

NO_CHECKPOINT = 74
"""The run's last checkpoint could not be written (EX_IOERR)."""

RESUME = 75
"""The run saved a checkpoint and stopped on request before its last step: start it again (EX_TEMPFAIL)."""

INTERRUPTED = 130
"""Ctrl-C: 128 + SIGINT."""
