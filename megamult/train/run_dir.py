"""The directory of a run: check that it belongs to this run, and prepare it for training. Only rank 0 writes."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megamult.checkpoint import directory
from megamult.distributed import environment
from megamult.distributed.mesh import Mesh
from megamult.runtime.lock import LOCK, RunLock
from megamult.runtime.logs import left_without_a_word


@contextlib.contextmanager
def chosen(configured: str | None, mesh: Mesh) -> Iterator[Path]:
    """Yield the run directory that the configuration names, or a new one under runs/, named by the time on rank 0.

    A new directory is removed at the end if nothing was written into it. Collective over all ranks.

    Raises:
        ValueError: no directory can be made under runs/. Every rank raises this.
    """
    if configured is not None:
        yield Path(configured)
        return
    made: list[Path] = []
    found: list[Any] = [None, None]
    if environment.rank() == 0:
        try:
            made = _new_directory(Path(time.strftime("runs/%Y%m%d-%H%M%S")))
            found = [str(made[-1]), None]
        except OSError as error:
            found = [None, f"{error.strerror}: {error.filename}"]
    mesh.broadcast_objects(found)
    name, problem = found
    if name is None:
        raise ValueError(f"no run directory can be made under runs/ ({problem}): name one with --train.run_dir")
    try:
        yield Path(name)
    finally:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # a directory that is not empty stays
                path.rmdir()


def _new_directory(path: Path) -> list[Path]:
    """Make a new directory, named `path` or, if that exists, `path` followed by -2, -3, ...

    Returns:
        The directories that were made: the parent, if it did not exist, and the directory.
    """
    made = [] if path.parent.exists() else [path.parent]
    for number in itertools.count(1):
        own = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with contextlib.suppress(FileExistsError):
            own.mkdir(parents=True)
            made.append(own)
            break
    return made


def own(checkpoint: Path, run_dir: Path) -> Path | None:
    """Return the checkpoint's path under `run_dir`, or None if it is not a checkpoint of this run."""
    path = checkpoint.resolve()
    here = path.parent == (run_dir / "checkpoints").resolve() and directory.is_of_step(path)
    return run_dir / "checkpoints" / path.name if here else None


def claim(run_dir: Path, resumes: bool) -> None:
    """Check that the directory does not contain another run. Only rank 0 checks, as only rank 0 writes.

    Args:
        resumes: whether this run continues the one in the directory.

    Raises:
        ValueError: the directory holds another run's metrics.
    """
    metrics = run_dir / "metrics.jsonl"
    # A run that did not reach its first step leaves an empty file.
    if environment.rank() == 0 and not resumes and metrics.exists() and metrics.stat().st_size > 0:
        raise ValueError(
            f"train.run_dir {run_dir} holds another run (metrics.jsonl): continue that run with --checkpoint.load "
            "latest, choose another directory with --train.run_dir, or remove this one"
        )


def check_writable(run_dir: Path) -> None:
    """Check on rank 0 that the run directory can be written, or made if it does not exist, and leave nothing there.

    Raises:
        ValueError: it cannot.
    """
    if environment.rank() != 0:
        return
    place = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    try:
        Path(tempfile.mkdtemp(prefix=".megamult_dry_run_", dir=place)).rmdir()
    except OSError as error:
        raise ValueError(
            f"train.run_dir {run_dir} cannot be written ({error.strerror}: {place}): choose another with "
            "--train.run_dir"
        ) from None


def wait_for(lock: RunLock, run_dir: Path) -> None:
    """If the run directory has a lock file, wait until no earlier launch of this run holds the lock, and take it.

    On other ranks than 0 this does nothing."""
    if environment.rank() == 0 and (run_dir / LOCK).exists():
        lock.acquire(run_dir)


def begin(run_dir: Path, resolved: str, checkpoint: Path | None, step: int, lock: RunLock) -> None:
    """Make the run directory, write the configuration, and remove what an interrupted save left, all on rank 0.

    Args:
        resolved: text of the configuration, for config.yaml and config_step_N.yaml, where N is `step`. A later start
            from another step overwrites only config.yaml.
        checkpoint: the checkpoint of this run to continue from, or None. If there is one, its name is written into the
            file `latest`, so that the next start does not resume from checkpoints of later steps.
        step: the step that the run continues from.
        lock: the lock of the directory, which this run takes unless it holds it already.

    Raises:
        ValueError: the directory cannot be written, or another live run held the lock when this run tried to take it.
    """
    if environment.rank() == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            if lock.acquire(run_dir):
                raise ValueError(
                    f"another run wrote into {run_dir} while this one was starting, and has ended: give train.run_dir "
                    "another directory, or go on with that run by --checkpoint.load latest"
                )
            _tell_who_left(run_dir)
            directory.clean(run_dir / "checkpoints")
            if checkpoint is not None:
                directory.point(checkpoint.parent, checkpoint)
            for name in ("config.yaml", f"config_step_{step}.yaml"):
                (run_dir / name).write_text(resolved, encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"train.run_dir {run_dir} cannot be written ({error.strerror}: {error.filename}): choose another "
                "with --train.run_dir"
            ) from None


def _tell_who_left(run_dir: Path) -> None:
    """Print in one line which ranks of earlier starts of the run ended without a message."""
    if left := left_without_a_word(run_dir / "logs"):
        print(
            f"in an earlier part of this run, whose metrics.jsonl ends at step {_last_step(run_dir)}, these ranks "
            f"ended without a message (killed, or out of memory?): {', '.join(left[:8])}"
            + (f" and {len(left) - 8} more" if len(left) > 8 else ""),
            flush=True,
        )


def _last_step(run_dir: Path) -> int:
    """Return the step of the last record in metrics.jsonl, or 0 if there is none."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _RECORD_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return 0
    steps = [int(found[1]) for line in lines if (found := re.match(rb'{"step": ([0-9]+),', line))]
    return steps[-1] if steps else 0


_RECORD_BYTES = 1 << 20
"""Number of bytes to read from the end of metrics.jsonl: more than its last records take. The monitor's figures of a
model of 100 layers are one line of about 300 KB."""


def check_shared(run_dir: Path) -> None:
    """Check that this rank sees what rank 0 has written into the run directory: all ranks read the data index there.

    Raises:
        ValueError: this rank does not see it.
    """
    if not (run_dir / "config.yaml").exists():
        raise ValueError(
            f"rank {environment.rank()} does not see {run_dir / 'config.yaml'}, which rank 0 wrote: train.run_dir must "
            "be on a file system that all nodes share"
        )


def after_divergence(run_dir: Path, last_good_step: int) -> str:
    """Return advice for the user of a run that has diverged."""
    parent = run_dir / "checkpoints"
    saved = [directory.of_step(parent, step) for step in directory.steps(parent) if step <= last_good_step][-1:]
    if not saved:
        return "there is no checkpoint from before these steps; lower optimizer.lr, or lengthen optimizer.warmup_steps"
    return (
        f"the last checkpoint before these steps is {saved[0]}; go on from it with a lower optimizer.lr or other data"
    )
