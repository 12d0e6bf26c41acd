"""File of the choices of Newton-Schulz's methods, one for each name of a device and version of torch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
"""Number in the names of the files. It increases when methods are computed otherwise, so that they are timed anew."""
PATIENCE = 5.0
"""Seconds to wait for another process that writes the file."""


class Kept:
    """Choices in the file for one device and version of torch.

    Args:
        device: the device.
        folder: folder of the files; by default :func:`cache_folder`.

    Attributes:
        path: the file.
    """

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        self.device = device_name(device)
        name = re.sub(r"[^\w.+-]+", "_", f"{self.device}-torch-{torch.__version__}")
        self.path = (folder or cache_folder()) / f"newton_schulz-{FORMAT}-{name}.json"

    def read(self) -> dict[str, Any]:
        """Return what is kept, by key. A file that is missing or damaged keeps nothing."""
        return entries(self.path)[1]

    def keep(self, key: str, entry: Any, usable: Callable[[Any], bool]) -> Any:
        """Add a choice to the file, and return the one that the file then has.

        If another run has added a usable choice meanwhile, that one stays, so that all runs have the same.

        Args:
            key: name of the choice.
            entry: the choice, as plain values.
            usable: function that returns whether an entry, or None, is a choice.

        Raises:
            OSError: the file cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path.with_suffix(".lock")):
            known = self.read()
            if not usable(known.get(key)):
                known[key] = entry
            content = {"device": self.device, "torch": torch.__version__, "methods": known}
            written = self.path.with_suffix(f".{socket.gethostname()}.{os.getpid()}.tmp")
            written.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            written.replace(self.path)
        return known[key]


def entries(path: Path) -> tuple[str, dict[str, Any]]:
    """Return a file's heading, and its choices by key; nothing if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return f"{content['device']}, torch {content['torch']}", dict(content["methods"])
    except (OSError, ValueError, KeyError, TypeError):
        return "damaged", {}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock, if it can be had within :data:`PATIENCE` seconds. Some file systems have none; without it, runs that
    start at the same moment may keep only one of their choices."""
    with path.open("a") as file:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.05)
                    continue
            except OSError:
                pass
            break
        yield


def cache_folder() -> Path:
    """Return the folder of the files: MEGAMULT_CACHE_DIR of the environment, or `megamult` in XDG_CACHE_HOME, or in
    ~/.cache.

    Raises:
        OSError: none of the variables is set, and this user has no home.
    """
    if given := os.environ.get("MEGAMULT_CACHE_DIR"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megamult"
    except RuntimeError as error:
        raise OSError(str(error)) from None


def device_name(device: torch.device) -> str:
    """Return the name of a GPU or of this machine's CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    lines = dict(re.findall(r"^(model name|model|flags)\s*: (.*)$", about, re.MULTILINE))
    # Some virtual machines have the same name for processors with and without matrix units.
    units = [unit for unit in ("amx_bf16", "avx512_bf16", "avx512f") if unit in lines.get("flags", "").split()]
    return " ".join([lines.get("model name", "CPU"), lines.get("model", ""), *units[:1]])
