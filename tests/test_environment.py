"""What launchers say, and how processes come together."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import HashStore

from megamult import environment, launcher, rendezvous
from tests.distributed import free_port

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


def found() -> list[str | None]:
    return [os.environ.get(key) for key in TORCH]


def test_a_process_without_a_launcher_is_a_world_of_one(bare: pytest.MonkeyPatch) -> None:
    environment.set_defaults()
    assert found()[:4] == ["0", "0", "1", "127.0.0.1"]


def test_a_task_of_srun_takes_its_place_from_slurm(bare: pytest.MonkeyPatch) -> None:
    for key, value in STEP.items():
        bare.setenv(key, value)
    environment.set_defaults()
    # 123457 x 16 + 2 = 1975314
    assert found() == ["3", "1", "4", "gpu007", "25314"]


def test_a_launcher_inside_a_task_of_srun_has_the_last_word(bare: pytest.MonkeyPatch) -> None:
    for key, value in STEP.items():
        bare.setenv(key, value)
    given = ["1", "0", "2", "elsewhere", "29500"]
    for key, value in zip(TORCH, given, strict=True):
        bare.setenv(key, value)
    environment.set_defaults()
    assert found() == given


def test_a_batch_script_is_no_task_of_its_own_job(bare: pytest.MonkeyPatch) -> None:
    for key in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"):
        bare.setenv(key, STEP[key])
    bare.setenv("SLURM_NTASKS", "4")
    environment.set_defaults()
    assert found()[:3] == ["0", "0", "1"]


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


def test_one_node_may_hold_a_group_and_two_may_not() -> None:
    def meeting(machines: list[str]) -> rendezvous.Meeting:
        return rendezvous.Meeting(HashStore(), machines)

    machines = ["n1 a", "n1 a", "n2 b", "n2 b"]
    meeting(machines).check_nodes(2)
    with pytest.raises(ValueError, match=r"ranks 0 to 3 run on n1, n2.*choose parallel.tensor 2, .*across_nodes"):
        meeting(machines).check_nodes(4)
    # One name on two machines is still two nodes; six and two processes share the divisors of two.
    with pytest.raises(ValueError, match=r"ranks 4 to 7 .*choose parallel.tensor 2"):
        meeting(["n a"] * 6 + ["n b"] * 2).check_nodes(4)


_COME = """
import os, sys, time
from megamult import rendezvous
what = sys.argv[1]
if what == "excuse":
    rendezvous.excuse("no such file")
    sys.exit()
try:
    print(rendezvous.meet(float(sys.argv[2])).machines)
except (rendezvous.NobodyThere, ValueError) as error:
    print(type(error).__name__, error, sep=": ")
"""


def come(rank: int, size: int, port: int, *arguments: str) -> subprocess.Popen[str]:
    place = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, "-c", _COME, *arguments],
        env={**os.environ, **place},
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_all_who_come_know_one_another() -> None:
    port = free_port()
    started = [come(rank, 2, port, "meet", "30") for rank in (1, 0)]
    said = [process.communicate(timeout=60)[0] for process in started]
    assert said == [f"{[environment.machine()] * 2}\n"] * 2


def test_who_does_not_come_is_named_on_every_rank_in_time() -> None:
    port = free_port()
    started = [come(rank, 4, port, "meet", "6") for rank in (0, 2)]
    said = [process.communicate(timeout=60)[0] for process in started]
    assert said[0] == said[1]
    assert said[0].startswith("NobodyThere: 2 of 4 processes did not come within 6 s"), said
    assert "rank 1, 3;" in said[0]


def test_who_is_waited_for_is_said_long_before_the_time_is_up() -> None:
    port, began = free_port(), time.monotonic()
    alone = come(0, 2, port, "meet", "100")
    lost = come(1, 3, free_port(), "meet", "100")
    try:
        assert alone.stderr is not None and lost.stderr is not None
        assert alone.stderr.readline() == "waiting for rank 1, up to 100 s in all\n"
        assert lost.stderr.readline().startswith("waiting for rank 0 at 127.0.0.1:")
        assert 15 < time.monotonic() - began < 90
    finally:
        alone.kill()
        lost.kill()


def test_a_rank_that_finds_nobody_says_so() -> None:
    began = time.monotonic()
    said = come(1, 2, free_port(), "meet", "2").communicate(timeout=60)[0]
    assert said.startswith("NobodyThere: rank 1 on ") and "did not reach rank 0 at 127.0.0.1:" in said
    assert time.monotonic() - began < 50, "not torch's own half hour"


def test_what_one_rank_cannot_do_ends_all_with_its_message() -> None:
    port = free_port()
    excused = come(1, 3, port, "excuse")
    said = [
        process.communicate(timeout=60)[0]
        for process in (come(0, 3, port, "meet", "30"), come(2, 3, port, "meet", "30"))
    ]
    assert excused.wait(timeout=30) == 0
    assert said == [f"ValueError: rank 1 on {environment.host()}: no such file\n"] * 2


def test_a_port_in_use_is_named_with_its_remedy() -> None:
    import socket

    with socket.create_server(("", 0)) as taken:
        said = come(0, 2, taken.getsockname()[1], "meet", "5").communicate(timeout=60)[0]
    assert "is in use" in said and "--master_port" in said


def test_hosts_and_launchers_of_deepspeed_are_read_from_the_processes_above(tmp_path: Path) -> None:
    """Rank <- deepspeed.launcher.launch <- deepspeed, played by processes with their command lines."""
    world = "eyJuMSI6IFswLCAxXSwgIm4yIjogWzBdfQ=="  # {"n1": [0, 1], "n2": [0]}
    rank = tmp_path / "rank.py"
    rank.write_text("from megamult import launcher\nprint(launcher.hosts_of_ranks(), len(launcher.launchers()))\n")
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
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        assert done.stdout == f"{{0: 'n1', 1: 'n1', 2: 'n2'}} {count}\n", done.stderr
    assert launcher.hosts_of_ranks() == {}, "pytest is no launcher"
