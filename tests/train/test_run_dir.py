"""The directory that a run without train.run_dir chooses."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from megamult.distributed.mesh import ALONE
from megamult.train import run_dir
from tests.train.command import REPOSITORY


@pytest.fixture
def one_second(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working directory in which all runs start in the same second, each on one rank."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_dir.time, "strftime", lambda form: "runs/20261126-040000")
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda objects, src: None)
    return tmp_path


def test_runs_that_start_in_the_same_second_have_directories_of_their_own(one_second: Path) -> None:
    found, everybody = [], threading.Barrier(4)

    def begin() -> None:
        everybody.wait()
        with run_dir.chosen(None, ALONE) as path:
            found.append(str(path))
            everybody.wait()

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = "runs/20261126-040000"
    assert sorted(found) == [first, f"{first}-2", f"{first}-3", f"{first}-4"]


def test_a_directory_that_was_not_used_goes_and_one_that_was_stays(one_second: Path) -> None:
    with contextlib.suppress(ValueError), run_dir.chosen(None, ALONE):
        raise ValueError("a user's mistake")
    assert list(one_second.iterdir()) == [], "nothing was written"
    with run_dir.chosen(None, ALONE) as path:
        (path / "config.yaml").touch()
    assert path.exists()


def test_a_working_directory_that_cannot_be_written_is_an_error_with_its_remedy(one_second: Path) -> None:
    (one_second / "runs").touch()
    with pytest.raises(ValueError, match=r"under runs/ .Not a directory.*--train.run_dir"), run_dir.chosen(None, ALONE):
        pass


def test_two_quickstarts_in_the_same_second_train_in_two_directories(tmp_path: Path) -> None:
    for folder in ("launch", "data", "bin"):
        (tmp_path / folder).mkdir()
    for name in ("quickstart.sh", "default_corpus.sh"):
        shutil.copy(REPOSITORY / "launch" / name, tmp_path / "launch" / name)
    (tmp_path / "launch" / "setup_env.sh").write_text("MEGAMULT_GPUS=0\n")
    for name in ("sotu_train.bin", "sotu_train.idx", "sotu_valid.bin", "sotu_valid.idx", "sotu.model"):
        (tmp_path / "data" / name).touch()
    for name, text in {"deepspeed": 'echo "$@" >>said\n', "date": "echo 20261126-040000\n"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", str(tmp_path / "launch" / "quickstart.sh")]
    (tmp_path / "runs" / "quickstart-20261126-040000").mkdir(parents=True)  # the other one's
    for _ in range(2):
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
    said = (tmp_path / "said").read_text()
    assert said.count("--train.run_dir runs/quickstart-20261126-040000-2\n") == 2, "it went, unused, in between"
