"""Parts of examples/running (losses of a run, signals), and examples/reproduce, which runs examples/paper elsewhere."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.running.children import Interrupted, run
from examples.running.curves import read_curves

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"step": 10, "valid_loss": 5.0}\n{"step": 11, "loss": 6.0}\n', "not complete"),
        ('{"step": 10, "loss": 6.0}\n', "not complete"),
        ('{"step": 10, "loss": null}\n{"step": 10, "valid_loss": null}\n', "diverged"),
    ],
    ids=["steps after the last evaluation", "no evaluation", "not finite"],
)
def test_a_run_without_a_result_has_no_report(tmp_path: Path, lines: str, said: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=said):
        read_curves(tmp_path)


@pytest.fixture
def first_process() -> Iterator[None]:
    """This process inherits orphans, as the first one of a container does."""
    subreaper, prctl = 36, ctypes.CDLL(None).prctl
    assert prctl(subreaper, 1, 0, 0, 0) == 0
    yield
    prctl(subreaper, 0, 0, 0, 0)


def test_a_signal_ends_the_run_in_progress_after_it_has_saved(first_process: None, tmp_path: Path) -> None:
    began, saved = tmp_path / "began", tmp_path / "saved"
    # The script ends at the signal, its child half a second later, as ranks do that write a checkpoint.
    child = f"trap 'sleep 0.5; touch {saved}; exit' TERM; touch {began}; while :; do sleep 0.1; done"
    words = ["bash", "-c", f"bash -c {json.dumps(child)} & wait"]
    asked = []

    def interrupt() -> None:
        while not began.exists():
            time.sleep(0.05)
        asked.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    with pytest.raises(Interrupted):
        run(words, tmp_path / "log")
    assert saved.exists()
    # It waits for the child and no longer, though nobody but this process buries it.
    assert time.monotonic() - asked[0] < 30
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.fixture
def engine(tmp_path: Path) -> dict[str, str]:
    """An environment in which docker is a script that writes its arguments to `calls`, has an image once it has built
    one, and ends with exit code 75 when it runs."""
    script = tmp_path / "bin" / "docker"
    script.parent.mkdir()
    script.write_text(
        f"""#!/usr/bin/env bash
printf '%s\\n' "$*" >>{tmp_path}/calls
case "$1" in
    image) test -e {tmp_path}/built ;;
    build) touch {tmp_path}/built ;;
    run) exit 75 ;;
esac
"""
    )
    script.chmod(0o755)
    return {**os.environ, "PATH": f"{script.parent}:{os.environ['PATH']}", "PIP_EXTRA_INDEX_URL": "the index"}


def reproduce(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    script = REPOSITORY / "examples" / "reproduce" / "run.sh"
    return subprocess.run([script, *arguments], env=environment, capture_output=True, text=True)


def test_the_container_form_builds_once_and_passes_arguments_and_exit_code_on(
    engine: dict[str, str], tmp_path: Path
) -> None:
    corpus = tmp_path / "a folder" / "my"
    corpus.parent.mkdir()
    for _ in range(2):
        done = reproduce(engine, "--only", "E5", "--corpus", str(corpus), "--seeds", "1")
        assert (done.returncode, done.stderr) == (75, "")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["image", "build", "run", "image", "run"]
    assert "--target cpu -t megamult:cpu" in calls[1] and calls[1].endswith(f"PIP_EXTRA_INDEX_URL {REPOSITORY}")
    assert f"-v {REPOSITORY}/runs:/opt/megamult/runs" in calls[2]
    assert f"-v {corpus.parent}:/corpus:ro" in calls[2]
    assert calls[2].endswith("megamult:cpu examples/paper/run.sh --only E5 --corpus /corpus/my --seeds 1")
    assert reproduce(engine, "--gpu", "--list").returncode == 75
    last = (tmp_path / "calls").read_text().splitlines()[-1]
    assert "--gpus all" in last and last.endswith("megamult:gpu examples/paper/run.sh --gpu --list")


def test_the_container_form_says_what_it_cannot_do(engine: dict[str, str], tmp_path: Path) -> None:
    done = reproduce(engine, "--output", "elsewhere")
    assert done.returncode == 2 and "runs/paper; leave it out" in done.stderr
    (tmp_path / "bin" / "docker").unlink()
    plain = {**engine, "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    if not any(Path(folder, name).exists() for folder in ("/usr/bin", "/bin") for name in ("docker", "podman")):
        done = reproduce(plain, "--list")
        assert done.returncode == 2 and "neither docker nor podman is installed" in done.stderr
