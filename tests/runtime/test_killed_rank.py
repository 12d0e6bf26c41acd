"""A rank that the kernel kills under DeepSpeed's launcher, which ends all others within a second."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from megamult.distributed import environment
from tests.train.command import Launch, data_arguments


def process_of(job: Launch, rank: int) -> int:
    """The process id of a rank."""
    for pid in job.ranks():
        with contextlib.suppress(OSError):
            if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
                return pid
    raise AssertionError(f"no rank {rank}")


@pytest.mark.parametrize("rank", [0, 1])
def test_its_death_is_said_with_rank_host_process_and_step_and_once_more_at_the_next_start(
    rank: int, corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = [
        *("--config", "examples/configs/tiny.yaml", *data_arguments(corpus), "--parallel.tensor", "2"),
        *("--model.seq_length", "32", "--train.run_dir", str(run_dir), "--checkpoint.load", "latest"),
    ]
    job = Launch([*arguments, "--train.steps", "5000"], processes=2, launcher=True)
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").read_text().count("\n"):
        assert time.monotonic() < deadline and job.process.poll() is None
        time.sleep(0.05)
    killed = process_of(job, rank)
    os.kill(killed, signal.SIGKILL)
    ended = job.wait()
    assert ended.code != 0 and ended.left == []
    name = f"rank {rank} on {environment.host()} (process {killed})"
    (line,) = [line for line in ended.errors if line.partition(" ends: ")[2].startswith(name)]
    assert "killed" in line and "at step " in line
    again = Launch([*arguments, "--train.steps", "10"], processes=2).wait()
    assert again.code == 0, again.text
    (line,) = [line for line in again.stdout.splitlines() if line.startswith("in an earlier part of this run")]
    assert line.endswith(name)
