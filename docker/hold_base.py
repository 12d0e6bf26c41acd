"""Let constraints.txt hold what a base image was built around: its torch stays, and what is compiled against it.

    python3 docker/hold_base.py constraints.txt

Run by the base's own Python, before there is a .venv. Rewrites the file: the pins of torch, Triton, NumPy and NVIDIA's
libraries become the versions that are installed; all others stay ours.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

HELD = re.compile(r"torch|triton|pytorch-triton|numpy|(nvidia|cuda)-.*")
"""Normalized names. Not all that torch requires: its pure Python parts are ours to renew, and must be for others."""


def normalized(name: str) -> str:
    """As the package index compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def held(constraints: str, installed: Mapping[str, str]) -> str:
    """`constraints` with the base's versions.

    Args:
        constraints: text of a constraints file.
        installed: version by name of every distribution of the base.

    Raises:
        ValueError: the base has no torch.
    """
    pins = {normalized(name): version for name, version in installed.items() if HELD.fullmatch(normalized(name))}
    if "torch" not in pins:
        raise ValueError("the base image has no torch: use the target cpu, or another base")
    kept = [
        line
        for line in constraints.splitlines()
        if line.startswith("#") or normalized(re.split(r"[=<>!~ ;\[]", line, maxsplit=1)[0]) not in pins
    ]
    return "\n".join([*kept, "", "# The base image's own.", *(f"{name}=={pins[name]}" for name in sorted(pins))]) + "\n"


def main() -> int:
    """Rewrite the file that the command line names."""
    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} FILE", file=sys.stderr)
        return 2
    path = Path(sys.argv[1])
    installed = {found.metadata["Name"]: found.version for found in metadata.distributions()}
    try:
        path.write_text(held(path.read_text(encoding="utf-8"), installed), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
