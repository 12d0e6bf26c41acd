"""Processes of a launch that meet, and strangers that come to their port."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from megamult.distributed import environment, rendezvous
from megamult.distributed.claims import Claim
from megamult.distributed.reception import CLAIMS, Reception, answer_key, claim_key, heard_key
from tests.processes import REPOSITORY, free_port, starts_processes
from tests.programs import Program


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
import json, os, sys, time
from megamult.distributed import reception, rendezvous
what = sys.argv[1]
if what == "impatient":
    reception.TELL_SECONDS = rendezvous.TELL_SECONDS = 1.0
if what == "late":
    time.sleep(3)
if what == "mistaken":
    rendezvous.report_mistake("no such file")
    sys.exit()
try:
    meeting = rendezvous.meet(float(sys.argv[2]), json.loads(sys.argv[3]) if sys.argv[3:] else None)
    print(meeting.machines, flush=True)
    if what == "stay":
        time.sleep(60)
except (rendezvous.RanksMissingError, rendezvous.RefusedError, ValueError) as error:
    print(type(error).__name__, error, sep=": ")
"""

# Starts its ranks, each with its own arguments, as torchrun does; rank R writes to said_R in a folder. They are forks
# that have torch already.
_TORCHRUN = """
import json, os, sys
from megamult.distributed import rendezvous
folder, code, ranks = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
started = []
for local, (rank, arguments) in enumerate(ranks.items()):
    process = os.fork()
    if process == 0:
        os.dup2(os.open(f"{folder}/said_{rank}", os.O_WRONLY | os.O_CREAT), 1)
        os.environ.update(RANK=rank, LOCAL_RANK=str(local), LOCAL_WORLD_SIZE=str(len(ranks)))
        sys.argv = ["-c", *arguments]
        exec(code)
        sys.exit()
    started.append(process)
for process in started:
    os.waitpid(process, 0)
"""


def come(rank: int, size: int, port: int, *arguments: str) -> Program:
    place = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return Program(["-c", _COME, *arguments], {**os.environ, **place})


MET = f"{[environment.machine()] * 2}\n"


class Job:
    """Ranks on one node that one launcher has started, each with its own arguments."""

    def __init__(self, folder: Path, port: int, size: int, ranks: dict[int, list[str]]) -> None:
        starts_processes()
        launcher = folder / "torchrun"  # ranks know it by its name
        launcher.write_text(_TORCHRUN)
        self._outputs = [folder / f"said_{rank}" for rank in ranks]
        place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.process = subprocess.Popen(
            [sys.executable, launcher, folder, _COME, json.dumps(ranks)],
            env={**os.environ, **place},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def said(self) -> tuple[list[str], str]:
        """What each rank printed, and the standard error of all."""
        _, errors = self.process.communicate(timeout=90)
        assert self.process.returncode == 0, errors
        return [output.read_text() for output in self._outputs], errors


def meet(seconds: float, **configuration: Any) -> list[str]:
    """Arguments of a rank that meets the others."""
    return ["meet", str(seconds), json.dumps(configuration)]


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
    assert said[0].startswith("RanksMissingError: 2 of 4 processes did not come within 6 s"), said
    assert "rank 1, 3." in said[0]


def test_who_is_waited_for_is_said_long_before_the_time_is_up() -> None:
    alone = come(0, 2, free_port(), "impatient", "100")
    lost = come(1, 3, free_port(), "impatient", "100")
    try:
        assert alone.stderr is not None and lost.stderr is not None
        assert alone.stderr.readline() == "waiting for rank 1, up to 100 s in all\n"
        assert lost.stderr.readline().startswith("waiting for rank 0 at 127.0.0.1:")
        assert alone.poll() is None and lost.poll() is None, "they wait on"
    finally:
        alone.kill()
        lost.kill()


def test_a_rank_that_finds_nobody_says_so() -> None:
    # Within the limit here, not in torch's own half hour.
    said = come(1, 2, free_port(), "meet", "2").communicate(timeout=60)[0]
    assert said.startswith("RanksMissingError: rank 1 on ") and "did not reach rank 0 at 127.0.0.1:" in said


def test_what_one_rank_cannot_do_ends_all_of_its_launch_with_its_message(tmp_path: Path) -> None:
    # They would wait longer for one another than this test for them.
    said, _ = Job(tmp_path, free_port(), 3, {0: meet(600), 1: ["mistaken"], 2: meet(600)}).said()
    told = f"ValueError: rank 1 on {environment.host()}: no such file\n"
    assert said == [told, "", told]


def test_another_configuration_of_the_same_launch_is_the_mistake_of_all_with_every_key(tmp_path: Path) -> None:
    ranks = {0: meet(60, lr=1, decay=0.1, seed=1), 1: meet(60, lr=2, seed=1), 2: meet(60, lr=2, seed=1)}
    said, _ = Job(tmp_path, free_port(), 3, ranks).said()
    here = environment.host()
    expected = (
        "ValueError: the ranks were started with different configurations: "
        f"lr is 2 on rank 1-2 ({here}) and 1 on rank 0 ({here}); "
        f"decay is not set on rank 1-2 ({here}) and 0.1 on rank 0 ({here}). Start every rank with the same command"
    )
    assert len(set(said)) == 1 and said[0].startswith(expected), said


def test_a_stranger_is_refused_by_name_and_the_run_goes_on_with_its_own_rank(tmp_path: Path) -> None:
    """Two jobs of one configuration start on one port; the second one's rank is there first."""
    port = free_port()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    stranger = Job(tmp_path / "b", port, 2, {1: meet(60, lr=1)})
    time.sleep(1.0)
    ours = Job(tmp_path / "a", port, 2, {0: meet(60, lr=1), 1: ["late", *meet(60, lr=1)[1:]]})
    said, errors = ours.said()
    assert said == [MET, MET]
    refused, _ = stranger.said()
    assert refused[0].startswith(f"RefusedError: rank 1 on {environment.host()} (process ")
    assert "came to the port of rank 0 on" in refused[0] and "it belongs to another launch" in refused[0]
    assert "--master_port" in refused[0]
    assert f"refused rank 1 on {environment.host()} (process " in errors


def test_another_configuration_on_a_node_of_its_own_is_refused_at_once_and_named_by_rank_0_in_the_end() -> None:
    """Nothing tells whether a node that was started by hand is this launch's or another's: rank 0 waits for its own."""
    port = free_port()
    first, second = come(0, 2, port, *meet(10, lr=1)), come(1, 2, port, *meet(10, lr=2))
    said = second.communicate(timeout=60)[0]
    here = environment.host()
    differs = f"lr is 2 on rank 1 ({here}) and 1 on rank 0 ({here})"
    assert said.startswith("RefusedError: ") and differs in said
    assert first.poll() is None, "rank 0 still waits for its own"
    said, errors = first.communicate(timeout=60)
    assert said.startswith("ValueError: rank 1 did not come within 10 s; rank 0 refused rank 1 on ") and differs in said
    assert "refused rank 1 on " in errors


def test_a_process_of_another_version_is_refused_and_ends_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    store, places = HashStore(), {"launch": "", "launcher": "A", "command": "pretrain.py", "configuration": "a"}
    ours = [Claim(rank, 2, "n1", 10 + rank, "n1", siblings=(0, 2), **places) for rank in (0, 1)]
    other = dataclasses.asdict(ours[1]) | {"colour": "blue", "pid": 99}
    for claim in (other, dataclasses.asdict(ours[1])):
        store.set(claim_key(store.add(CLAIMS, 1)), json.dumps(claim))
    store.set(heard_key(2), "")
    met = Reception(store, ours[0], {}).receive(5.0, time.monotonic() + 5.0)
    assert met["numbers"] == [2] and met["problem"] is None and met["missing"] is None
    told = json.loads(store.get(answer_key(1)))
    assert told["configuration"] and "rank 1 on n1 (process 99) came to the port of rank 0 on n1" in told["why"]
    assert "another version of megamult" in told["why"] and "refused rank 1 on n1" in capsys.readouterr().err


def test_who_comes_when_all_have_met_is_told_so() -> None:
    port = free_port()
    first, second = (come(rank, 2, port, "stay", *meet(60)[1:]) for rank in (0, 1))
    assert first.stdout is not None and second.stdout is not None
    assert first.stdout.readline() == second.stdout.readline() == MET
    said = come(1, 2, port, *meet(60)).communicate(timeout=60)[0]
    assert said.startswith("RefusedError: rank 1 on ") and "rank 0's launch already has all of its processes" in said
    for process in (first, second):
        process.kill()


def test_a_port_in_use_is_named_with_its_remedy_and_nobody_waits_for_ever_for_who_listens_there() -> None:
    with socket.create_server(("", 0)) as taken:
        started = [come(rank, 2, taken.getsockname()[1], *meet(5)) for rank in (0, 1)]
        said = [process.communicate(timeout=60)[0] for process in started]
    assert "is in use (" in said[0] and "--master_port" in said[0]
    assert "is not torch's store: no greeting within 5 s" in said[1]


def test_a_port_that_another_run_listens_at_is_said_with_that_runs_name() -> None:
    port = free_port()
    first = come(0, 2, port, *meet(60))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            break
    said = come(0, 3, port, *meet(5)).communicate(timeout=60)[0]
    first.kill()
    assert f"is in use by the run of rank 0 on {environment.host()} (process {first.pid}: -c meet" in said


_AGAIN = """
import os, sys
from megamult.distributed import environment, rendezvous
from megamult.distributed.claims import Claim
from megamult.distributed.reception import CLAIMS, Reception, answer_key, claim_key, heard_key
for _ in range(2):  # a change of members starts ranks again, at the same store and with the same count
    meeting = rendezvous.meet(60, {"lr": 1})
    meeting.store.set(f"here {environment.rank()}", "")
    meeting.store.wait(["here 0", "here 1"])
    with open(f"{sys.argv[1]}/rank_{environment.rank()}", "a") as file:
        file.write(os.environ["TORCHELASTIC_RESTART_COUNT"])
sys.exit(os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and environment.rank() == 1)
"""


def test_torchruns_store_serves_the_ranks_that_it_starts_again(tmp_path: Path) -> None:
    starts_processes()
    (tmp_path / "again.py").write_text(_AGAIN)
    ranks = ["--nproc-per-node", "2", "--max-restarts", "1", "--rdzv-backend", "c10d"]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *ranks, "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
        + [str(tmp_path / "again.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=True,
        capture_output=True,
        timeout=180,
    )
    assert [(tmp_path / f"rank_{rank}").read_text() for rank in (0, 1)] == ["0011", "0011"]
