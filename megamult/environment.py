"""What the launcher says about this process, known before any process group exists. Imports nothing heavy."""

from __future__ import annotations

import os


def rank() -> int:
    """Global rank."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Rank on this node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes of this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def set_defaults() -> None:
    """A process started without a launcher is a world of one."""
    for key, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }.items():
        os.environ.setdefault(key, value)
