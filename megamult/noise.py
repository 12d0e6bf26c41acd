"""Third-party warnings that a user can do nothing about: kept off the screen from `import megamult` on, and kept for
the log.

Only the messages listed here are kept off. All other warnings, and the configuration of the user's own loggers, stay as
they are.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TextIO

_MESSAGES = (
    # Megatron-Core, at its import: megamult uses neither library, so installing them would change nothing.
    r"Transformer Engine and Apex are not installed\.",
    r"Apex is not installed\. Falling back to Torch Norm",
    # Megatron-Core, about the default value of a key that nobody has set.
    r"full scope is deprecated\. Use empty cuda_graph_scope",
    # torch, about collectives that DeepSpeed calls. megamult calls them too, because older versions of torch that it
    # supports do not have their successors.
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated\.",
    r"`torch\.distributed\.(_all_gather_base|_reduce_scatter_base)` is a private function",
    # DeepSpeed, about every optimizer that is not its own, although `zero_allow_untested_optimizer` says so already.
    r"\*+ You are using ZeRO with an untested optimizer, proceed with caution \*+",
    # DeepSpeed on CPUs, by `print`, in every process.
    r"DeepSpeed deepspeed\.ops\.comm\.\w+ built successfully",
)
_NOISE = re.compile("|".join(_MESSAGES))
_LOGGERS = ("DeepSpeed", "py.warnings")
"""Loggers whose records are filtered: DeepSpeed's, and the one that gets warnings after `logging.captureWarnings`."""
_MOST = 200
"""Largest number of messages that are kept for a log that has not been opened yet."""

_kept: list[str] = []
_write: Callable[[str], None] | None = None
_shown_by = warnings.showwarning


def is_noise(text: str) -> bool:
    """Return whether a message is one of those that are kept off the screen."""
    return _NOISE.search(text) is not None


def quiet() -> None:
    """Keep noise off the screen from now on: warnings of the module `warnings`, and records of DeepSpeed's logger.

    `import megamult` calls this. A second call does nothing.
    """
    global _shown_by
    if warnings.showwarning is not _show:
        _shown_by, warnings.showwarning = warnings.showwarning, _show
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_passes)  # the same function is added only once


def log_to(write: Callable[[str], None] | None) -> None:
    """Give each kept line to `write`, those of the past at once, or go back to keeping lines if `write` is None."""
    global _write
    _write = write
    if write is not None:
        for text in _kept:
            write(text)
        _kept.clear()


@contextlib.contextmanager
def unprinted() -> Iterator[None]:
    """Keep noise that other libraries `print` off the screen. Other lines appear at the end of the context."""
    stream, printed = sys.stdout, io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines(keepends=True):
            if is_noise(line):
                _keep(line)
            else:
                stream.write(line)


def _keep(text: str) -> None:
    if _write is not None:
        _write(text.rstrip("\n"))
    elif len(_kept) < _MOST:
        _kept.append(text.rstrip("\n"))


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if is_noise(str(message)):
        _keep(warnings.formatwarning(message, category, filename, lineno, line))
    else:
        _shown_by(message, category, filename, lineno, file, line)


def _passes(record: logging.LogRecord) -> bool:
    try:
        text = record.getMessage()
    except Exception:  # arguments that do not fit the message: the logger's handler says so
        return True
    if is_noise(text):
        _keep(f"{record.name} {record.levelname}: {text}")
        return False
    return True
