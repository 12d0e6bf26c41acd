"""One live run to a run directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megamult.train import lock
from tests.train.command import REPOSITORY

_HOLD = """
import sys, time
from pathlib import Path
from megamult.train.lock import RunLock
held = RunLock()
held.acquire(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    """Another process that holds the folder's lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, tmp_path],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_by_name_of_the_first(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(ValueError, match=f'belongs to a run that is alive .*"process": {holder.pid}.*--train.run_dir'):
        lock.RunLock().acquire(tmp_path)
    holder.kill()
    holder.wait()
    with lock.RunLock() as mine:
        assert not mine.acquire(tmp_path), "a killed run holds nothing, so nobody was waited for"
        assert not mine.acquire(tmp_path), "what is held already"


def test_an_earlier_run_that_is_about_to_end_is_waited_for(
    tmp_path: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(seconds: float) -> None:
        assert holder.stdin is not None
        holder.stdin.close()
        holder.wait()

    monkeypatch.setattr(lock.time, "sleep", sleep)
    with lock.RunLock() as mine:
        assert mine.acquire(tmp_path), "it was waited for"
    assert capsys.readouterr().out.count("waiting until an earlier run leaves") == 1
