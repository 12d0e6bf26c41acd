"""Check of an output directory."""

from __future__ import annotations

from pathlib import Path


def check_output(output: Path) -> None:
    """Check that an output directory does not exist or is empty, so that writing to it replaces nothing.

    Raises:
        ValueError: `output` is a directory that is not empty, another kind of file, or a symbolic link.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ValueError(f"{output} exists and is a file or a symbolic link, not a directory: choose another output")
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} exists and is not empty: choose another output, or remove this directory")
