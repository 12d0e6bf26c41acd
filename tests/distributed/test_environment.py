"""What launchers say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megamult.distributed import environment, launcher

STEP = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[007-010,12],login",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123457",
    "SLURM_STEP_ID": "2",
}
TORCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that no launcher has touched; what is set in it goes with the test."""
    for key in [*TORCH, *STEP]:
        monkeypatch.setenv(key, "")  # so that it is restored
        monkeypatch.delenv(key)
    return monkeypatch


def current_mesh() -> list[str | None]:
    return [os.environ.get(key) for key in TORCH]


def test_a_process_without_a_launcher_is_a_world_of_one(bare: pytest.MonkeyPatch) -> None:
    environment.set_defaults()
    assert current_mesh()[:4] == ["0", "0", "1", "127.0.0.1"]


def test_a_task_of_srun_takes_its_place_from_slurm(bare: pytest.MonkeyPatch) -> None:
    for key, value in STEP.items():
        bare.setenv(key, value)
    environment.set_defaults()
    # 123457 x 16 + 2 = 1975314
    assert current_mesh() == ["3", "1", "4", "gpu007", "25314"]


def test_a_launcher_inside_a_task_of_srun_has_the_last_word(bare: pytest.MonkeyPatch) -> None:
    for key, value in STEP.items():
        bare.setenv(key, value)
    given = ["1", "0", "2", "elsewhere", "29500"]
    for key, value in zip(TORCH, given, strict=True):
        bare.setenv(key, value)
    environment.set_defaults()
    assert current_mesh() == given


def test_a_batch_script_is_no_task_of_its_own_job(bare: pytest.MonkeyPatch) -> None:
    for key in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"):
        bare.setenv(key, STEP[key])
    bare.setenv("SLURM_NTASKS", "4")
    environment.set_defaults()
    assert current_mesh()[:3] == ["0", "0", "1"]


def test_what_names_a_launch_is_torchruns_id_or_slurms_step_whose_tasks_are_the_ranks(bare: pytest.MonkeyPatch) -> None:
    assert launcher.launch() == ""
    for key, value in STEP.items():
        bare.setenv(key, value)
    environment.set_defaults()
    assert launcher.launch() == "Slurm 123457.2"
    bare.setenv("WORLD_SIZE", "32")  # a launcher in each of the four tasks
    assert launcher.launch() == ""
    bare.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun's default, which two jobs share
    assert launcher.launch() == ""
    bare.setenv("TORCHELASTIC_RUN_ID", "a1")
    assert launcher.launch() == "torchrun a1"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-3,7]", "n1"),
        ("gpu[007-010,12],login", "gpu007"),
        ("rack[2-3]-node[05,07]-ib", "rack2-node05-ib"),
        ("a-[10],b[1-2]", "a-10"),
    ],
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert environment.first_host(nodes) == first


def test_hosts_and_launchers_of_deepspeed_are_read_from_the_processes_above(tmp_path: Path) -> None:
    """Rank <- deepspeed.launcher.launch <- deepspeed, played by processes with their command lines."""
    world = "eyJuMSI6IFswLCAxXSwgIm4yIjogWzBdfQ=="  # {"n1": [0, 1], "n2": [0]}
    rank = tmp_path / "rank.py"
    rank.write_text(
        "from megamult.distributed import launcher\n"
        "print(launcher.hosts_of_ranks(), len(launcher.launchers()), launcher.siblings(), bool(launcher.process()))\n"
    )
    run_next = "import subprocess, sys\nsys.exit(subprocess.run(sys.argv[sys.argv.index('--') + 1:]).returncode)\n"
    (tmp_path / "deepspeed").write_text(run_next)
    (tmp_path / "other").write_text(run_next)
    launch = [sys.executable, "-c", run_next, "deepspeed.launcher.launch", f"--world_info={world}"]
    for runner, count in (("deepspeed", 2), ("other", 1)):
        done = subprocess.run(
            [sys.executable, tmp_path / runner, "--", *launch, "--", sys.executable, rank],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "RANK": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert done.stdout == f"{{0: 'n1', 1: 'n1', 2: 'n2'}} {count} (0, 2) True\n", done.stderr
    assert launcher.hosts_of_ranks() == {} and launcher.process() == "", "pytest is no launcher"
