"""A partial folder is its process's while that lives, and nobody's once it is known to be dead."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megamult.distributed import environment
from megamult.runtime import partial
from megamult.runtime.partial import partial_folder

HOLD = """
import sys, time
from pathlib import Path
from megamult.runtime.partial import partial_folder
with partial_folder(Path(sys.argv[1])) as folder:
    (folder / "work").write_text("x")
    print(folder, flush=True)
    time.sleep(600)
"""


def hold(final: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(final)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip()).parent


def test_folders_of_the_dead_go_and_those_of_the_living_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (live, living), (dead, left), (other, others) = (hold(tmp_path / name) for name in ("a", "a", "a.b"))
    try:
        for process in (dead, other):
            process.kill()
            process.wait()
        with partial_folder(tmp_path / "a") as folder:
            assert list(folder.iterdir()) == []
            assert (living.exists(), left.exists(), others.exists()) == (True, False, True)
        assert capsys.readouterr().err == f"removed {left}, which process {dead.pid} left unfinished\n"
        assert not folder.exists() and (living / "contents" / "work").exists()
    finally:
        live.kill()
        live.wait()


def record(folder: Path, **changes: object) -> Path:
    folder.mkdir()
    content = {"machine": environment.machine(), "host": environment.host(), "process": 7, **changes}
    (folder / "owner").write_text(json.dumps(content))
    return folder


def test_only_what_is_known_to_be_dead_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rebooted = record(tmp_path / ".a.aaaaaaaa.partial", machine=f"{environment.host()} another-boot")
    elsewhere = record(tmp_path / ".a.bbbbbbbb.partial", machine="n2 boot", host="n2")
    unknown = tmp_path / ".a.cccccccc.partial"
    unknown.mkdir()
    just_made = tmp_path / ".a.dddddddd.partial"
    just_made.mkdir()
    (just_made / "owner").touch()
    with partial_folder(tmp_path / "a"):
        pass
    assert all(path.exists() for path in (rebooted, elsewhere, unknown, just_made))
    said = capsys.readouterr().err
    assert f"{rebooted} is unfinished" in said and "removed" not in said
    assert f"{elsewhere} is unfinished, and this process cannot tell whether its writer still runs" in said
    assert "(its writer is process 7 on n2)" in said


def test_nothing_is_removed_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(partial.fcntl, "flock", refuse)
    with partial_folder(tmp_path / "a") as first:
        (first / "work").touch()
        with partial_folder(tmp_path / "a"):
            assert (first / "work").exists()
    assert f"{first.parent} is unfinished, and this process cannot tell whether its writer" in capsys.readouterr().err


def test_a_folder_is_locked_though_an_onlooker_held_its_lock_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = [BlockingIOError(), BlockingIOError()]
    flock = partial.fcntl.flock

    def late(*arguments: object) -> None:
        if refusals:
            raise refusals.pop()
        flock(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(partial.fcntl, "flock", late)
    with partial_folder(tmp_path / "a") as first:
        assert partial.is_being_written(tmp_path / "a")
        with partial_folder(tmp_path / "a"):
            assert first.exists()


def test_names_with_patterns_in_them_are_taken_literally(tmp_path: Path) -> None:
    record(tmp_path / ".ab.aaaaaaaa.partial")
    with partial_folder(tmp_path / "a*"):
        pass
    assert (tmp_path / ".ab.aaaaaaaa.partial").exists()
    record(tmp_path / ".a*.aaaaaaaa.partial")
    with partial_folder(tmp_path / "a*"):
        pass
    assert not (tmp_path / ".a*.aaaaaaaa.partial").exists()


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), partial_folder(tmp_path / "a") as folder:
        (folder / "work").touch()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
