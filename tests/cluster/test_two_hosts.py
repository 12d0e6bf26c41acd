"""Two hosts with two processes each: the losses of one process, under every launcher, and how a job ends that cannot
go on."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.jobs import PORT, Job, Launcher, losses, newest_checkpoint, records
from tests.cluster.slow_link import SlowLink
from tests.train.command import REPOSITORY, data_arguments, start

pytestmark = pytest.mark.skipif(Hosts.available() is not None, reason=str(Hosts.available()))

STEPS = 6
ENDLESS = 100_000
RELATIVE = 1e-5
"""As in tests/test_muon_invariance.py: fp32 sums in another order differ by some 1e-7, and few steps amplify that."""

LAUNCHERS: tuple[Launcher, ...] = get_args(Launcher)

TIMEOUT_MINUTES = 0.3
"""Of the watchdog, in the tests that wait for it."""

KILL_SECONDS = 30.0
"""For which DeepSpeed's launcher and torchrun wait before they kill a rank that does not end on SIGTERM."""

SLACK = 15.0
"""Seconds that an ending takes on two cores with four processes, beside what it waits for."""

START = 60.0
"""Seconds that a busy machine may take to start processes that import torch."""


@pytest.fixture(scope="session")
def prefix(corpus: Path) -> Path:
    """The corpus of all tests."""
    return corpus


def arguments(prefix: Path, run_dir: Path, steps: int, *more: str) -> list[str]:
    """A small run with Muon; tensor parallel is the caller's."""
    return [
        *("--config", str(REPOSITORY / "examples" / "configs" / "tiny.yaml"), *data_arguments(prefix)),
        # Four groups, so that four tensor-parallel ranks have one each.
        *("--model.seq_length", "32", "--model.num_query_groups", "4", "--optimizer.name", "muon"),
        *("--train.steps", str(steps), "--optimizer.warmup_steps", "2"),
        *("--train.log_histograms_every", "0", "--train.run_dir", str(run_dir)),
        *more,
    ]


TWO_BY_TWO = ("--parallel.tensor", "2", "--parallel.zero_stage", "2")
SAVING = (*TWO_BY_TWO, "--checkpoint.save_every", "3", "--checkpoint.load", "latest")


@pytest.fixture(scope="session")
def reference(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Step -> loss of one process."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    outcome = start(arguments(prefix, run_dir, STEPS))
    assert outcome.code == 0, outcome.text
    found = losses(run_dir)
    assert sorted(found) == list(range(1, STEPS + 1))
    return found


@pytest.fixture(scope="session")
def all_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(2, tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture
def hosts(all_hosts: Hosts) -> Iterator[Hosts]:
    """n1 and n2, switched on, and connected again afterwards."""
    yield all_hosts
    for i in all_hosts.all():
        all_hosts.power_on(i)


@pytest.fixture
def launch(hosts: Hosts, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """launch(launcher, arguments, ...) -> Job, of which nothing is left afterwards. Every host that is on has an sshd
    once pdsh needs one, or those of `sshd_on` alone."""
    jobs: list[Job] = []
    programs: Path | None = None
    with contextlib.ExitStack() as stack:

        def made(
            launcher: Launcher, chosen: list[str], on: list[int] | None = None, sshd_on: list[int] | None = None
        ) -> Job:
            nonlocal programs
            if launcher == "pdsh" and programs is None:
                if missing := [each for each in ("pdsh", "ssh", "/usr/sbin/sshd") if shutil.which(each) is None]:
                    pytest.skip(f"no {', '.join(missing)} here: tests/cluster/install.sh")
                programs = stack.enter_context(hosts.ssh(sshd_on))
            jobs.append(Job(hosts, launcher, chosen, tmp_path / f"job{len(jobs)}", on=on, ssh=programs))
            stack.callback(jobs[-1].end)
            return jobs[-1]

        yield made


def started(launch: Callable[..., Job], launcher: Launcher, prefix: Path, run_dir: Path, *more: str) -> Job:
    """A job without an end that has done four steps, and so saved a checkpoint or is about to."""
    job = launch(launcher, arguments(prefix, run_dir, ENDLESS, *SAVING, *more))
    job.wait_for(lambda: len(records(run_dir)) >= 4, "step 4")
    assert sorted(job.ranks()) == [0, 1, 2, 3]
    return job


def assert_same(found: dict[int, float], expected: dict[int, float]) -> None:
    assert sorted(found) == sorted(expected)
    assert found == {step: pytest.approx(loss, rel=RELATIVE) for step, loss in expected.items()}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_losses_on_two_hosts_are_those_of_one_process(
    launch: Callable[..., Job],
    prefix: Path,
    reference: dict[int, float],
    tmp_path: Path,
    launcher: Launcher,
) -> None:
    job = launch(launcher, arguments(prefix, tmp_path / "run", STEPS, *TWO_BY_TWO))
    job.wait_for(lambda: len(records(tmp_path / "run")) > 0, "step")
    where = {rank: i for rank, pid in job.ranks().items() for i in job.hosts.all() if pid in job.hosts.pids(i)}
    assert where == {0: 1, 1: 1, 2: 2, 3: 2}, "two ranks on each host"
    ended = job.wait()
    assert set(ended.codes.values()) == {0}, ended.text
    assert_same(losses(tmp_path / "run"), reference)


def test_a_tensor_parallel_group_over_two_hosts_is_a_users_mistake(
    launch: Callable[..., Job], prefix: Path, tmp_path: Path
) -> None:
    ended = launch("no_ssh", arguments(prefix, tmp_path / "run", STEPS, "--parallel.tensor", "4")).wait()
    assert set(ended.codes.values()) == {2}, ended.text
    told = [line for line in ended.text.splitlines() if line.startswith("error:")]
    assert len(told) == 1 and "parallel.tensor_across_nodes" in told[0], ended.text
    assert "n1" in told[0] and "n2" in told[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.cluster
def test_a_tensor_parallel_group_over_two_hosts_has_the_same_losses_if_it_is_asked_for(
    launch: Callable[..., Job], prefix: Path, reference: dict[int, float], tmp_path: Path
) -> None:
    asked = ("--parallel.tensor", "4", "--parallel.tensor_across_nodes", "true")
    ended = launch("no_ssh", arguments(prefix, tmp_path / "run", STEPS, *asked)).wait()
    assert set(ended.codes.values()) == {0}, ended.text
    assert_same(losses(tmp_path / "run"), reference)


def round_trip(hosts: Hosts) -> float:
    """Seconds for one byte from n1 to n2 and back, on a connection that is there."""
    serve = "import socket; s = socket.create_server(('', 5000)); c, _ = s.accept(); c.send(c.recv(1))"
    ask = (
        "import socket, time\n"
        "c = socket.create_connection(('n2', 5000)); t = time.time(); c.send(b'x'); c.recv(1); print(time.time() - t)"
    )
    server = hosts.start(2, [sys.executable, "-c", serve])
    try:
        deadline = time.monotonic() + 20.0
        while (asked := hosts.run(1, [sys.executable, "-c", ask])).returncode:
            assert time.monotonic() < deadline, asked.stderr
    finally:
        server.kill()
    return float(asked.stdout)


def step_seconds(run_dir: Path) -> float:
    """The median of a run's steps."""
    seconds = sorted(record["seconds"] for record in records(run_dir))
    return seconds[len(seconds) // 2]


@pytest.mark.cluster
def test_a_slow_link_slows_a_run_down_and_changes_no_loss(
    launch: Callable[..., Job], hosts: Hosts, prefix: Path, reference: dict[int, float], tmp_path: Path
) -> None:
    assert round_trip(hosts) < 0.020, "the fast link"
    fast = launch("no_ssh", arguments(prefix, tmp_path / "fast", STEPS, *TWO_BY_TWO)).wait()
    with SlowLink(hosts, delay=0.020, megabits=100.0):
        assert round_trip(hosts) >= 0.040
        slow = launch("no_ssh", arguments(prefix, tmp_path / "slow", STEPS, *TWO_BY_TWO)).wait(600.0)
    assert set(fast.codes.values()) | set(slow.codes.values()) == {0}, fast.text + slow.text
    assert_same(losses(tmp_path / "slow"), reference)
    # A step sums gradients over the link and exchanges momentum: at least four times there and back.
    assert step_seconds(tmp_path / "slow") > step_seconds(tmp_path / "fast") + 0.160
    print(f"seconds per step: {step_seconds(tmp_path / 'fast'):.3f} fast, {step_seconds(tmp_path / 'slow'):.3f} slow")


@pytest.mark.cluster
def test_a_cut_of_three_seconds_heals_and_the_run_goes_on(
    launch: Callable[..., Job], hosts: Hosts, prefix: Path, reference: dict[int, float], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with SlowLink(hosts, delay=0.020, megabits=100.0) as link:
        # Each of the groups that ranks join takes several round trips before one may hear of another.
        chosen = (*TWO_BY_TWO, "--parallel.timeout_minutes", "0.6")
        job = launch("no_ssh", arguments(prefix, run_dir, STEPS, *chosen))
        job.wait_for(lambda: len(records(run_dir)) >= 2, "step 2")
        link.cut(2)
        time.sleep(1.0)
        before = len(records(run_dir))
        time.sleep(2.0)
        assert before < STEPS and len(records(run_dir)) == before, "nothing moves without the link"
        link.heal(2)
        ended = job.wait(300.0)
    assert set(ended.codes.values()) == {0}, ended.text
    assert_same(losses(run_dir), reference)


@pytest.mark.cluster
def test_a_longer_cut_is_ended_by_the_watchdog_on_both_sides(
    launch: Callable[..., Job], hosts: Hosts, prefix: Path, tmp_path: Path
) -> None:
    timeout = ("--parallel.timeout_minutes", str(TIMEOUT_MINUTES))
    job = started(launch, "no_ssh", prefix, tmp_path / "run", *timeout)
    hosts.cut(2)
    since = time.monotonic()
    try:
        ended = job.wait(60 * TIMEOUT_MINUTES + SLACK, since)
    finally:
        hosts.heal(2)
    assert ended.seconds >= 60 * TIMEOUT_MINUTES / 2, "not before a rank asks"
    assert ended.codes == {1: 70, 2: 70}, ended.text
    assert "n2" in why(ended.texts[1]) and "n1" in why(ended.texts[2]), ended.text


def why(screen: str) -> str:
    """The lines on a launcher's screen that say why the job has ended."""
    # pdsh puts the host's name and a colon before each line.
    lines = [line.removeprefix("n1: ").removeprefix("n2: ") for line in screen.splitlines()]
    return "\n".join(line for line in lines if line.startswith("error:"))


@pytest.mark.cluster
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_rank_ends_the_job_everywhere_and_is_named(
    launch: Callable[..., Job], prefix: Path, tmp_path: Path, launcher: Launcher, rank: int
) -> None:
    job = started(launch, launcher, prefix, tmp_path / "run")
    ended = job.wait(30.0, since=job.signal(rank, signal.SIGKILL))
    assert ended.seconds < 30.0
    assert 0 not in ended.codes.values(), ended.text
    told = "\n".join(map(why, ended.texts.values()))
    assert f"rank {rank} on n{1 + rank // 2}" in told, ended.text
    print(f"{launcher}: gone {ended.seconds:.1f} s after rank {rank} was killed, exit codes {ended.codes}\n{told}")


@pytest.mark.cluster
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("launcher", ["no_ssh", "torchrun"])
def test_a_stopped_rank_is_ended_by_the_watchdog_and_named(
    launch: Callable[..., Job], prefix: Path, tmp_path: Path, launcher: Launcher, rank: int
) -> None:
    timeout = ("--parallel.timeout_minutes", str(TIMEOUT_MINUTES))
    job = started(launch, launcher, prefix, tmp_path / "run", *timeout)
    since = job.signal(rank, signal.SIGSTOP)
    job.wait_for(lambda: not job.ranks(), "end of all ranks", 60 * TIMEOUT_MINUTES + SLACK)
    ranks_gone = time.monotonic() - since
    ended = job.wait(SLACK, since)
    assert ranks_gone < 60 * TIMEOUT_MINUTES
    assert 0 not in ended.codes.values(), ended.text
    told = "\n".join(map(why, ended.texts.values()))
    assert f"rank {rank} on n{1 + rank // 2}" in told, ended.text
    print(
        f"{launcher}: ranks gone after {ranks_gone:.1f} s, launchers after {ended.seconds:.1f} s, {ended.codes}\n{told}"
    )


@pytest.mark.cluster
@pytest.mark.parametrize("launcher", ["no_ssh", "pdsh"])
def test_a_host_that_is_off_at_the_start_is_named_within_a_minute(
    launch: Callable[..., Job], hosts: Hosts, prefix: Path, tmp_path: Path, launcher: Launcher
) -> None:
    hosts.power_off(2)
    job = launch(launcher, arguments(prefix, tmp_path / "run", STEPS, *TWO_BY_TWO), on=[1])
    check_missing(job, launcher)


@pytest.mark.cluster
def test_a_host_without_sshd_is_named_within_a_minute(launch: Callable[..., Job], prefix: Path, tmp_path: Path) -> None:
    job = launch("pdsh", arguments(prefix, tmp_path / "run", STEPS, *TWO_BY_TWO), sshd_on=[1])
    check_missing(job, "pdsh")


def check_missing(job: Job, launcher: Launcher) -> None:
    """The ranks say that n2 is missing, within a minute of their meeting, and end."""

    # The minute begins when rank 0 waits for the others: before it, two busy cores import torch.
    job.wait_for(lambda: job.hosts.listens(1, PORT), "rank 0")
    since = time.monotonic()
    job.wait_for(lambda: "n2" in why(job.text()[1]), "word of n2", 60.0)
    now = time.monotonic()
    said = f"named {now - since:.1f} s after rank 0 was there, {now - job.began:.1f} s after the start"
    print(f"{launcher}: {said}\n{why(job.text()[1])}")
    ended = job.wait(30.0)
    assert 0 not in ended.codes.values(), ended.text


@pytest.mark.cluster
def test_another_learning_rate_on_the_second_host_ends_both_with_the_key(
    launch: Callable[..., Job], prefix: Path, tmp_path: Path
) -> None:
    jobs = [
        launch(
            "no_ssh", arguments(prefix, tmp_path / "run", STEPS, *TWO_BY_TWO, "--optimizer.lr", f"{host}e-3"), on=[host]
        )
        for host in (1, 2)
    ]
    ended = [job.wait(60.0 + START) for job in jobs]
    assert ended[0].codes == {1: 2} and ended[1].codes == {2: 2}, ended[0].text + ended[1].text
    told = "optimizer.lr is 0.002 on rank 2 (n2) and 0.001 on rank 0 (n1)"
    assert all(told in why(each.text) for each in ended), ended[0].text + ended[1].text
    assert not (tmp_path / "run").exists()


@pytest.mark.cluster
def test_a_job_that_comes_to_another_ones_port_is_refused_and_the_other_one_trains(
    launch: Callable[..., Job], prefix: Path, reference: dict[int, float], tmp_path: Path
) -> None:
    # The second host's half of a job whose first half did not start, before the job that does.
    stranger = launch("no_ssh", arguments(prefix, tmp_path / "other", STEPS, *TWO_BY_TWO), on=[2])
    stranger.wait_for(lambda: len(stranger.ranks()) == 2, "the stranger's ranks")
    ours = launch("no_ssh", arguments(prefix, tmp_path / "run", STEPS, *TWO_BY_TWO))
    refused = stranger.launchers[2].wait(timeout=60.0 + START)
    ended = ours.wait()
    assert refused == 2, stranger.text()
    assert "which refuses it: train.run_dir is " in why(stranger.text()[2])
    assert set(ended.codes.values()) == {0}, ended.text
    assert_same(losses(tmp_path / "run"), reference)


@pytest.mark.parametrize("first_host", ["off", "idle"])
def test_nobody_waits_longer_than_asked_for_a_first_host_that_does_not_come(hosts: Hosts, first_host: str) -> None:
    if first_host == "off":
        hosts.power_off(1)
    meet = (
        "import time\n"
        "from megamult.distributed import rendezvous\n"
        "began = time.monotonic()\n"
        "try:\n"
        "    rendezvous.meet(8.0)\n"
        "except rendezvous.RanksMissingError as error:\n"
        "    assert error.rank_0_is_missing and '10.77.0.1' in str(error)\n"
        "    print(time.monotonic() - began)\n"
    )
    place = {"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": hosts.address(1), "MASTER_PORT": str(PORT)}
    environment = {**os.environ, **place, "PYTHONPATH": str(REPOSITORY)}
    asked = hosts.run(2, [sys.executable, "-c", meet], timeout=120.0, env=environment)
    assert asked.returncode == 0, asked.stderr
    # Not much less either: a host may be about to come. A connection attempt may be in its last second.
    assert 7.0 < float(asked.stdout) < 10.0


@pytest.mark.cluster
@pytest.mark.parametrize("first_host", ["off", "idle"])
def test_the_first_host_missing_is_said_by_the_second(
    launch: Callable[..., Job], hosts: Hosts, prefix: Path, tmp_path: Path, first_host: str
) -> None:
    if first_host == "off":
        hosts.power_off(1)
    job = launch("no_ssh", arguments(prefix, tmp_path / "run", STEPS, *TWO_BY_TWO), on=[2])
    job.wait_for(lambda: len(job.ranks()) == 2, "ranks")
    ended = job.wait(60.0 + START, since=time.monotonic())
    assert ended.codes[2] not in (0, 2), ended.text
    assert hosts.address(1) in why(ended.texts[2]), ended.text
    print(f"ended {ended.seconds:.1f} s after its ranks began\n{why(ended.texts[2])}")


@pytest.mark.cluster
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_sigterm_to_one_launcher_saves_a_checkpoint_and_leaves_no_rank(
    launch: Callable[..., Job], prefix: Path, tmp_path: Path, launcher: Launcher
) -> None:
    run_dir = tmp_path / "run"
    job = started(launch, launcher, prefix, run_dir)
    job.launchers[1].terminate()
    ended = job.wait(KILL_SECONDS + SLACK, since=time.monotonic())
    done = max(losses(run_dir))
    assert newest_checkpoint(run_dir) == f"step_{done}", ended.text
    assert subprocess.run(
        ["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=run_dir / "checkpoints" / f"step_{done}", check=True
    )
    print(f"{launcher}: step {done} saved, gone after {ended.seconds:.1f} s, exit codes {ended.codes}")
    # The same command goes on from there.
    again = launch(launcher, arguments(prefix, run_dir, done + 2, *SAVING)).wait()
    assert set(again.codes.values()) == {0}, again.text
    assert sorted(losses(run_dir)) == list(range(1, done + 3))
