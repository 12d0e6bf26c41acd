"""Names in a run's `checkpoints/` directory (step_N, `latest`, temporary names), and removal of old checkpoints."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from megamult.checkpoint.storage import sync

LATEST = "latest"
_TEMPORARY = ".tmp"
_OLD = ".old.tmp"
_STEP = re.compile(r"step_(\d+)")


def of_step(parent: Path, step: int) -> Path:
    """Return the path of a step's checkpoint."""
    return parent / f"step_{step}"


def steps(parent: Path) -> list[int]:
    """List the steps of all complete checkpoints in `parent`, ascending."""
    if not parent.is_dir():
        return []
    found = (_STEP.fullmatch(entry.name) for entry in parent.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in found if match)


def is_of_step(path: Path) -> bool:
    """Tell whether a path has the name of a step's checkpoint."""
    return _STEP.fullmatch(path.name) is not None


def temporary(path: Path) -> Path:
    """Return the name that a checkpoint has before it is complete, and while it is being removed."""
    return path.with_name(path.name + _TEMPORARY)


def replace(made: Path, path: Path) -> None:
    """Rename the complete directory `made` to `path`. Remove the checkpoint that had this name before, if any."""
    old = path.with_name(path.name + _OLD)
    if path.exists():
        _remove(old)
        path.rename(old)
    made.rename(path)
    sync(path.parent)
    _remove(old)


def undo_interrupted_replacements(parent: Path) -> None:
    """Undo interrupted calls of :func:`replace`: rename an old checkpoint back if no new one has taken its name."""
    for old in parent.glob(f"*{_OLD}"):
        path = old.with_name(old.name.removesuffix(_OLD))
        if not path.exists():
            old.rename(path)


def clean(parent: Path) -> list[str]:
    """Undo interrupted replacements, then remove what interrupted saves and removals have left.

    Return the names of what was removed.
    """
    undo_interrupted_replacements(parent)
    found = sorted(entry.name for entry in parent.glob(f"*{_TEMPORARY}")) if parent.is_dir() else []
    for name in found:
        _remove(parent / name)
    return found


def point(parent: Path, path: Path) -> None:
    """Write the name of the checkpoint `path`, which is in `parent`, into the file `latest`."""
    assert _STEP.fullmatch(path.name), path
    written = parent / (LATEST + _TEMPORARY)
    written.write_text(path.name + "\n", encoding="utf-8")
    sync(written)
    os.replace(written, parent / LATEST)
    sync(parent)


def candidates(parent: Path) -> list[Path]:
    """List the checkpoints to resume from, best first: the one that `latest` names, then those before it.

    Checkpoints newer than the one that `latest` names are left out: either their save did not finish, or a user has set
    `latest` back. If there is no `latest`, all checkpoints are listed.
    """
    known = steps(parent)
    try:
        named = _STEP.fullmatch((parent / LATEST).read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        named = None
    if named is not None:
        known = [step for step in known if step <= int(named[1])]
    return [of_step(parent, step) for step in reversed(known)]


def of_run(path: Path) -> list[Path]:
    """List the checkpoints of a run directory, or of a directory of checkpoints, as :func:`candidates` does."""
    return candidates(path / "checkpoints") or candidates(path)


def retain(parent: Path, newest: int, keep: int, keep_every: int) -> None:
    """Remove old checkpoints.

    Args:
        newest: step of the checkpoint that was just written. Checkpoints of later steps, which exist if the run has
            resumed from an earlier checkpoint, are all kept and do not count in `keep`.
        keep: number of checkpoints to keep, including the one just written; 0: keep all.
        keep_every: checkpoints of steps that are multiples of this number are also kept; 0: keep no others. The
            checkpoint of step 0, which is an imported model, is always kept.
    """
    if keep == 0:
        return
    for step in [step for step in steps(parent) if 0 < step <= newest][:-keep]:
        if keep_every and step % keep_every == 0:
            continue
        path = of_step(parent, step)
        path.rename(temporary(path))
        _remove(temporary(path))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
