"""Locks in torch's cache of compiled extensions: waited for, removed when stale, never taken from a live process."""

from __future__ import annotations

import fcntl
import importlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megamult.distributed import extensions
from tests.processes import run_distributed

HOUR = 3600.0


def locked(root: Path, age: float = 0.0) -> Path:
    """A lock without a process, and an object file beside it, both so many seconds old."""
    folder = root / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    for name in ("lock", "shm.o"):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - age,) * 2)
    return folder / "lock"


@contextmanager
def holder(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the lock open, as torch has while it compiles; a line to it ends it and releases the lock."""
    code = "import os, sys; os.open(sys.argv[1], os.O_CREAT); print(1, flush=True); input(); os.remove(sys.argv[1])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("below", ["", "py311_cpu"], ids=["TORCH_EXTENSIONS_DIR", "torch's default"])
def test_a_lock_of_a_process_that_is_gone_is_removed_with_a_word(tmp_path: Path, below: str) -> None:
    lock, said = locked(tmp_path / below, age=HOUR), list[str]()
    extensions.release(tmp_path, said.append)
    assert not lock.exists()
    assert said == [f"removed {lock}: the process that made it has ended"]


def test_a_lock_is_waited_for_until_its_process_has_compiled(tmp_path: Path) -> None:
    lock, said = locked(tmp_path, age=HOUR), list[str]()
    with holder(lock) as process:
        thread = threading.Thread(target=extensions.release, args=(tmp_path, said.append))
        thread.start()
        thread.join(1.0)
        assert thread.is_alive() and lock.exists()
        assert len(said) == 1 and said[0].startswith(
            f"waiting until {lock} is gone: process {process.pid} ({sys.executable} "
        )
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        thread.join(30.0)
        assert not thread.is_alive() and not lock.exists()
        assert len(said) == 1, "the process itself released it"


def test_the_wait_for_a_live_process_has_a_limit_and_names_it(tmp_path: Path) -> None:
    lock = locked(tmp_path, age=HOUR)
    with (
        holder(lock) as process,
        pytest.raises(TimeoutError, match=rf"{lock} has been held by process {process.pid} .*TORCH_EXTENSIONS_DIR"),
    ):
        extensions.release(tmp_path, lambda _: None, limit=0.1)
    assert lock.exists()


def test_a_folder_that_another_machine_writes_to_keeps_its_lock(tmp_path: Path) -> None:
    """No process here holds it: only what is written there says that someone compiles."""
    lock, said = locked(tmp_path, age=HOUR), list[str]()
    written = threading.Event()

    def compile_elsewhere() -> None:
        for _ in range(6):
            (lock.parent / "shm.o").touch()
            assert lock.exists()
            time.sleep(0.25)
        written.set()

    (lock.parent / "shm.o").touch()
    thread = threading.Thread(target=compile_elsewhere)
    thread.start()
    extensions.release(tmp_path, said.append, patience=1.0)
    assert written.is_set(), "removed while files were being written"
    thread.join()
    assert [line.split(" ")[0] for line in said] == ["waiting", "removed"]


def test_a_lock_that_a_faster_process_has_taken_meanwhile_is_not_removed(tmp_path: Path) -> None:
    lock, said = locked(tmp_path, age=HOUR), list[str]()
    guard = os.open(lock.parent, os.O_RDONLY)
    fcntl.flock(guard, fcntl.LOCK_EX)  # another process is just judging the same stale lock
    failed: list[BaseException] = []

    def release() -> None:
        try:
            extensions.release(tmp_path, said.append, limit=0.0)
        except TimeoutError as error:
            failed.append(error)

    thread = threading.Thread(target=release)
    thread.start()
    time.sleep(0.5)
    lock.unlink()
    with holder(lock):
        os.close(guard)
        thread.join(30.0)
        assert failed and lock.exists(), said


def test_it_runs_as_a_program_before_anything_is_installed(tmp_path: Path) -> None:
    """As launch/setup_env.sh runs it: -I and -S leave only the standard library."""
    lock = locked(tmp_path, age=HOUR)
    done = subprocess.run(
        [sys.executable, "-I", "-S", extensions.__file__, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert not lock.exists() and done.stderr == f"megamult: removed {lock}: the process that made it has ended\n"


def start(root: str) -> list[bool]:
    """Tell whether a lock was there each time that DeepSpeed loaded its operator."""
    backend = importlib.import_module("deepspeed.comm.torch")  # its package has an attribute `torch` that is torch
    from megamult.distributed import start

    os.environ["TORCH_EXTENSIONS_DIR"] = root
    seen: list[bool] = []
    backend.build_shm_op = lambda: seen.append((Path(root) / "deepspeed_shm_comm" / "lock").exists())
    start.initialize(1)
    return seen


def test_no_leftover_lock_is_there_when_deepspeed_loads_its_operator(tmp_path: Path) -> None:
    locked(tmp_path, age=HOUR)
    assert run_distributed(1, start, str(tmp_path)) == [[False]]
