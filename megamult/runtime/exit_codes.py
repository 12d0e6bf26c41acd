"""Exit codes of all programs of megamult. Those from 65 to 75 are from sysexits.h, and a supervisor can act on them."""

from __future__ import annotations

DOES_NOT_FIT = 1
"""launch/plan.py has found no sharding that fits the cluster's memory."""

USER_ERROR = 2
"""There is a mistake in keys, files or data: the same command would fail again."""

DIVERGED = 65
"""`train.max_bad_steps` steps in a row were bad. The same command would only repeat these steps (EX_DATAERR)."""

UNAVAILABLE = 69
"""The processes of the launch could not all connect to one another (EX_UNAVAILABLE)."""

WATCHDOG = 70
"""The run was ended because a rank died or made no progress, or another run took its lock (EX_SOFTWARE)."""

NO_CHECKPOINT = 74
"""The run's last checkpoint could not be written (EX_IOERR)."""

RESUME = 75
"""The run saved a checkpoint and stopped on request before its last step: start it again (EX_TEMPFAIL)."""

INTERRUPTED = 130
"""The program was ended by Ctrl-C (128 + SIGINT)."""
