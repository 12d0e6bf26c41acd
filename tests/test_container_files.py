"""The Dockerfile says what it must, as far as that shows without building (tests/cluster/container.sh builds)."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def hold_base(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "docker")
    return importlib.import_module("hold_base")


@pytest.fixture
def targets() -> dict[str, list[list[str]]]:
    """The instructions of each target as words."""
    file = ROOT / "Dockerfile"
    if not file.exists():
        pytest.skip("no Dockerfile here: this is an image that was built from it")
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    found: dict[str, list[list[str]]] = {"": []}
    for instruction in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        words = shlex.split(instruction)
        if words and words[0] == "FROM":
            found[words[3]] = []
        if words:
            found[list(found)[-1]].append(words)
    return found


def test_bases_are_pinned_and_there_are_two_targets(targets: dict[str, list[list[str]]]) -> None:
    assert set(targets) == {"", "cpu", "gpu"}
    bases = dict(words[1].split("=") for words in targets[""] if words[0] == "ARG")
    assert targets["cpu"][0][1] == "${CPU_BASE}" and targets["gpu"][0][1] == "${GPU_BASE}"
    # A minor version alone, or no digit at all, is a name for other images from month to month.
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", bases["CPU_BASE"])
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", bases["GPU_BASE"])


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_an_image_runs_as_the_user_that_it_makes(targets: dict[str, list[list[str]]], target: str) -> None:
    last = [words for words in targets[target] if words[0] == "USER"][-1]
    assert last[1] == "${UID}"
    assert ["ARG", "UID=1000"] in targets[target]
    copies = [words for words in targets[target] if words[0] == "COPY"]
    assert copies and all("--chown=megamult:megamult" in words for words in copies)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_what_an_image_copies_is_in_the_context_and_dependencies_come_before_the_source(
    targets: dict[str, list[list[str]]], target: str
) -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = []
    for words in targets[target]:
        if words[0] == "COPY":
            sources = [word for word in words[1:-1] if not word.startswith("--")]
            copied += sources
            for source in sources:
                assert (ROOT / source).exists()
                assert Path(source).parts[0] in allowed
        elif words[0] == "RUN" and "launch/setup_env.sh" in words:
            assert {"setup.py", "constraints.txt", "launch/setup_env.sh"} <= set(copied)
            assert not {"megamult", "launch", "README.md"} & set(copied), "any change would install everything again"
    assert {"megamult", "launch", "examples", "tests", "docker", "docs", "README.md"} <= set(copied)


def test_the_bases_torch_and_what_is_compiled_against_it_stay_and_other_pins_are_ours(hold_base: ModuleType) -> None:
    ours = (
        "# why\n\ndeepspeed==0.19.8\nnumpy==2.4.6\nnvidia-nccl-cu13==2.30.1\ntorch==2.13.0\ntorchaudio==1\nregex==9\n"
    )
    base = {
        "torch": "2.12.0a0+5aff3928d8.nv26.05",
        "numpy": "2.2.6",
        "nvidia_nccl_cu13": "2.30.4",
        "Triton": "3.7.0",
        "regex": "1",
        "scipy": "1",
    }
    lines = hold_base.held(ours, base).splitlines()
    assert lines[:5] == ["# why", "", "deepspeed==0.19.8", "torchaudio==1", "regex==9"]
    assert set(lines[5:]) == {
        "",
        "# The base image's own.",
        "torch==2.12.0a0+5aff3928d8.nv26.05",
        "numpy==2.2.6",
        "nvidia-nccl-cu13==2.30.4",
        "triton==3.7.0",
    }


def test_a_base_without_torch_is_an_error_and_leaves_the_file_alone(hold_base: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no torch"):
        hold_base.held("torch==2.13.0\n", {"torchvision": "1", "numpy": "2"})
    file = tmp_path / "constraints.txt"
    file.write_text("torch==2.13.0\n")
    # -S: without site-packages there is no torch.
    command = [sys.executable, "-S", str(ROOT / "docker" / "hold_base.py"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: the base image has no torch")
    assert file.read_text() == "torch==2.13.0\n"
