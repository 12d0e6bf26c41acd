"""Signals, time limits, crashes, full disks: a run loses nothing that it had finished saving."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megamult.checkpoint.saved import SavedCheckpoint
from tests import programs
from tests.checkpoint.crash import crash, losses
from tests.checkpoint.interrupted_workers import found_checkpoints, overlapping_saves, stopped_runs
from tests.processes import free_port, run_distributed, starts_processes
from tests.train.command import REPOSITORY, data_arguments, start


def test_a_run_that_is_stopped_and_killed_becomes_the_run_that_was_not(corpus: Path, tmp_path: Path) -> None:
    """Twice here; `python -m tests.checkpoint.crash` does it as often as one likes."""
    lives = crash(tmp_path, corpus, kills=2, steps=45)
    assert any("while writing" in life.how for life in lives)


def test_a_signal_to_one_rank_or_a_deadline_stops_all_after_the_same_step_with_a_checkpoint(tmp_path: Path) -> None:
    both = run_distributed(2, stopped_runs, tmp_path)
    assert (
        both[0]
        == both[1]
        == [
            ("SIGTERM", 3, ["latest", "step_3"]),
            ("SIGUSR1", 3, ["latest", "step_2", "step_3"]),
            ("SIGUSR1", 3, ["latest", "step_3"]),
            ("train.max_minutes", 1, ["latest", "step_1"]),
            (None, 6, ["latest", "step_4", "step_6"]),
            ("SIGUSR1", 2, ["latest", "step_2"]),
        ]
    )
    assert sorted(losses(tmp_path / "1")) == [1, 2, 3]


_TWO_SIGNALS = """
import datetime, os, signal, threading, time, torch
torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:{port}", rank=0, world_size=1)
from megamult.runtime import signals
signals.SAME_REQUEST_SECONDS = 1.0
with signals.StopRequests() as stop:
    assert stop.decided(stop.ballot()) is None
    for _ in range(3):  # to every process of a job, and once more from its launcher
        os.kill(os.getpid(), signal.{first})
    time.sleep(0.2)
    assert stop.decided(stop.ballot()) == "{first}", stop.decided(stop.ballot())
    print("asked", flush=True)
    threading.Timer(1.5, os.kill, (os.getpid(), signal.{second})).start()
    # Waits in C, as in a collective that a peer never joins.
    torch.distributed.TCPStore("127.0.0.1", 0, is_master=True).wait(["never"], datetime.timedelta(seconds=30))
"""


@pytest.mark.parametrize(("first", "second"), [("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGTERM"), ("SIGINT", "SIGINT")])
def test_a_second_request_ends_the_process_at_once_wherever_it_waits(first: str, second: str) -> None:
    done = programs.run(["-c", _TWO_SIGNALS.format(port=free_port(), first=first, second=second)])
    assert (done.returncode, done.stdout) == (128 + signal.Signals[second], "asked\n"), done.stderr


_IGNORED = """
import os, signal, torch
torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:{port}", rank=0, world_size=1)
from megamult.runtime.signals import StopRequests
with StopRequests() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.decided(stop.ballot()) is None
    os.kill(os.getpid(), signal.SIGUSR1)
    while (why := stop.decided(stop.ballot())) is None:
        pass
    print(why)
torch.distributed.destroy_process_group()  # as a program does: gloo has aborted one that ended without
"""


def test_ctrl_c_stays_ignored_and_a_schedulers_signal_is_heard_though_launchers_ignore_it() -> None:
    done = programs.run(["-c", _IGNORED.format(port=free_port())], ignored=[signal.SIGINT, signal.SIGUSR1])
    assert (done.returncode, done.stdout) == (0, "SIGUSR1\n"), done.stderr
    assert done.stderr.count("SIGUSR1: saving at the next step boundary") == 1


def test_ctrl_c_before_training_has_begun_ends_in_one_line(tmp_path: Path) -> None:
    starts_processes()
    process = subprocess.Popen(
        [sys.executable, "launch/pretrain.py", "--config", "examples/configs/tiny.yaml", "--train.run_dir", tmp_path],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while "libtorch_cpu" not in Path(f"/proc/{process.pid}/maps").read_text():  # some seconds of imports are to come
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said and said.splitlines()[-1] == "interrupted", said


def test_a_second_save_waits_and_a_failed_one_is_reported_on_every_rank_and_leaves_nothing(tmp_path: Path) -> None:
    for found in run_distributed(2, overlapping_saves, tmp_path):
        assert found["still writing"] is None
        assert found["order"][:3] == ["the second save waits", "step 1 is written", "the second save is begun"]
        assert found["first"].error is None and found["first"].path.name == "step_1"
        assert found["second"].error is None and found["second"].stall_seconds == 100.0, "what it waited counts"
        assert found["failed"].error == "rank 1: [Errno 28] No space left on device"
        assert found["after"].error is None
        assert found["left"] == ["latest", "step_1", "step_2", "step_4"]
    one, two = (SavedCheckpoint(tmp_path / f"step_{step}").read("model.x") for step in (1, 2))
    assert torch.equal(one, torch.full((8,), 1.0)), "what was staged, not what training made of it meanwhile"
    assert torch.equal(two, torch.full((8,), 2.0))


def test_find_agrees_on_every_rank_and_goes_back_past_what_is_damaged(tmp_path: Path) -> None:
    both = run_distributed(2, found_checkpoints, tmp_path)
    chosen = ["step_2", "it does not fit rank 1", "step_2", "step_1", "step_1", "the values of step_1 do not fit"]
    assert both[0] == both[1] == chosen


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 10 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_on_a_full_disk_training_goes_on_and_the_older_checkpoint_stays(
    corpus: Path, small_disk: Path, asynchronous: str
) -> None:
    run_dir = small_disk / "run"
    outcome = start(
        [
            *("--config", "examples/configs/tiny.yaml", *data_arguments(corpus), "--model.seq_length", "32"),
            *("--train.steps", "10", "--train.run_dir", str(run_dir), "--checkpoint.save_every", "4"),
            *("--checkpoint.asynchronous", asynchronous),
        ]
    )
    assert outcome.text.count(f"warning: {run_dir}/checkpoints/step_8 could not be written (") == 1
    assert "No space left on device" in outcome.text and "Traceback" not in outcome.text
    assert sorted(losses(run_dir)) == list(range(1, 11)), "it trains to its end"
    assert outcome.code == 74 and len(outcome.errors) == 1, "but the last checkpoint is not there"
    assert "the checkpoint of step 10 could not be written" in outcome.errors[0]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["latest", "step_4"]
    SavedCheckpoint(run_dir / "checkpoints" / "step_4").verify()
