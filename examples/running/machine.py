"""Description of this machine and of the software on it, for reports."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from examples.running.children import ROOT


def machine() -> str:
    """Describe this machine."""
    name, memory = platform.machine(), ""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemTotal"):
            memory = f", {int(line.split()[1]) / 2**20:.0f} GiB"
    gpus = "no GPU"
    if os.environ.get("MEGAMULT_GPUS", "0") != "0":
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = ", ".join(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())
    return f"{len(os.sched_getaffinity(0))} cores of {name}{memory}; {gpus}"


def versions() -> str:
    """List the versions of Python and of the libraries that the results depend on."""
    found = [f"{name} {metadata.version(name)}" for name in ("megamult", "torch", "deepspeed", "megatron-core")]
    return ", ".join([*found, f"Python {platform.python_version()}"])


def commit() -> str:
    """Return the short name of this checkout's commit; an empty string if it is no checkout."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else ""
