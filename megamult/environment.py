"""What the launcher says about this process, known before any process group exists. Imports nothing heavy."""

from __future__ import annotations

import os
import socket


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
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as listener:  # any free port: two such runs on one machine do not meet
            listener.bind((os.environ["MASTER_ADDR"], 0))
            os.environ["MASTER_PORT"] = str(listener.getsockname()[1])
