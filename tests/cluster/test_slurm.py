"""launch/slurm/ on a real Slurm: jobs submitted as a user would, and what becomes of them."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.jobs import losses, newest_checkpoint, records
from tests.cluster.slurm import Slurm
from tests.train.command import REPOSITORY, data_arguments, start

NODES = 3
"""Jobs take two; the third is spare for when one is lost."""

STEPS = 40


@pytest.fixture(scope="module")
def prefix(corpus: Path) -> Path:
    """The corpus of all tests."""
    return corpus


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Compute nodes, and the login node."""
    if reason := Slurm.available():
        pytest.skip(reason)
    with Hosts(NODES + 1, tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(scope="module")
def slurm(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Slurm on them."""
    with Slurm(hosts, tmp_path_factory.mktemp("slurm")) as made:
        yield made


@pytest.fixture(scope="module")
def whole(slurm: Slurm, prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Step -> loss of a run that nobody disturbs."""
    job = Submitted(slurm, tmp_path_factory.mktemp("whole"), *arguments(prefix, STEPS))
    job.finish()
    found = losses(job.run_dir)
    assert sorted(found) == list(range(1, STEPS + 1))
    return found


def arguments(prefix: Path, steps: int, *more: str) -> list[str]:
    """Of pretrain.py, without a run directory."""
    return [
        *("--config", "examples/configs/tiny.yaml", *data_arguments(prefix), "--train.steps", str(steps)),
        *("--model.seq_length", "32", "--optimizer.name", "muon", "--train.log_histograms_every", "0"),
        *("--parallel.zero_stage", "1", "--parallel.tensor", "2", *more),
    ]


def slow(batches: int = 4) -> list[str]:
    """Keys that have so many batches evaluated after each step: time to catch a run in its middle, the same losses."""
    return ["--train.eval_every", "1", "--train.eval_batches", str(batches)]


SMALL = ("--cpus-per-task=1", "--gpus-per-node=0", "--ntasks-per-node=2")
"""Options of sbatch for a node of these: two ranks on the CPU."""


class Submitted:
    """A job of launch/slurm/pretrain.sbatch on two nodes, tensor parallel inside a node."""

    def __init__(self, slurm: Slurm, folder: Path, *arguments: str, options: Sequence[str] = ()) -> None:
        self.slurm, self.run_dir, self.log = slurm, folder / "run", folder / "log"
        self.job = slurm.submit(
            *("--nodes=2", *SMALL, f"--output={self.log}", *options, "launch/slurm/pretrain.sbatch", *arguments),
            *("--train.run_dir", str(self.run_dir)),
            cwd=REPOSITORY,
        )

    @property
    def text(self) -> str:
        """Its log."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 180.0) -> None:
        """Poll."""
        deadline = time.monotonic() + seconds
        while not condition():
            shown = self.slurm.show(self.job)
            assert shown["JobState"] not in ENDED or condition(), f"ended before {what}: {shown}\n{self.text}"
            assert time.monotonic() < deadline, f"no {what} within {seconds:.0f} s: {shown}\n{self.text}"
            time.sleep(0.1)

    def train_until(self, step: int) -> None:
        """It has done so many steps."""
        self.wait_until(lambda: len(records(self.run_dir)) >= step, f"step {step}")

    def finish(self, seconds: float = 420.0) -> None:
        """Until Slurm says that it is complete."""
        shown = self.slurm.wait_for(self.job, ENDED, seconds)
        assert (shown["JobState"], shown["ExitCode"]) == ("COMPLETED", "0:0"), self.text

    def stopped_after(self) -> list[tuple[str, int]]:
        """(why, after which step) for each time that it saved and stopped."""
        found = re.findall(r"^0: (\S+): stopped after step (\d+) of \d+, exit code 75;", self.text, re.MULTILINE)
        return [(why, int(step)) for why, step in found]

    def went_on_from(self) -> list[int]:
        """The steps of the checkpoints that its later lives began with."""
        return [int(step) for step in re.findall(r"^0: going on from \S+: step (\d+),", self.text, re.MULTILINE)]

    def starts(self) -> list[tuple[int, str]]:
        """(Slurm's count of restarts, nodes) of each start of the batch script."""
        return [(int(count), nodes) for count, nodes in re.findall(r": start (\d+) on (\S+), 4 ranks;", self.text)]


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def test_pretrain_sbatch_on_two_nodes_trains_as_one_process_does(slurm: Slurm, prefix: Path, tmp_path: Path) -> None:
    job = Submitted(slurm, tmp_path, *arguments(prefix, 12))
    alone = start(arguments(prefix, 12, "--parallel.tensor", "1", "--train.run_dir", str(tmp_path / "alone")))
    assert alone.code == 0, alone.text
    job.finish()
    assert job.starts() == [(0, "n[1-2]")]
    assert "4 processes (tensor parallel 2, data parallel 2)" in job.text
    assert sorted(losses(job.run_dir)) == list(range(1, 13))
    # Sums in another order: float32 rounding.
    assert losses(job.run_dir) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)


@pytest.mark.cluster
def test_a_requeued_job_saves_and_becomes_the_run_that_was_not_disturbed(
    slurm: Slurm, prefix: Path, whole: dict[int, float], tmp_path: Path
) -> None:
    job = Submitted(slurm, tmp_path, *arguments(prefix, STEPS, *slow()))
    job.train_until(5)
    slurm.run("scontrol", "requeue", job.job)
    job.wait_until(lambda: len(job.starts()) == 2, "second start")
    job.finish()
    ((_, step),) = job.stopped_after()  # SIGTERM from Slurm and SIGUSR1 through srun come at the same time
    assert 5 <= step < STEPS and job.went_on_from() == [step]
    assert [count for count, _ in job.starts()] == [0, 1]
    assert losses(job.run_dir) == whole


@pytest.mark.cluster
def test_a_preempted_job_saves_makes_way_and_goes_on_afterwards(
    slurm: Slurm, prefix: Path, whole: dict[int, float], tmp_path: Path
) -> None:
    job = Submitted(slurm, tmp_path, *arguments(prefix, STEPS, *slow()))
    job.train_until(5)
    other = slurm.submit(
        *("--partition=high", f"--nodes={NODES}", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3"), cwd="/"
    )
    slurm.wait_for(other, ("COMPLETED",))
    assert slurm.show(job.job)["JobState"] not in ENDED
    job.finish()
    ((_, step),) = job.stopped_after()
    assert 5 <= step < STEPS and job.went_on_from() == [step]
    assert losses(job.run_dir) == whole


@pytest.mark.cluster
def test_a_job_saves_before_its_time_is_up_and_goes_on_in_the_next_slot(
    slurm: Slurm, prefix: Path, whole: dict[int, float], tmp_path: Path
) -> None:
    job = Submitted(slurm, tmp_path, *arguments(prefix, STEPS, *slow(32)), options=["--time=60", "--signal=USR1@120"])
    job.train_until(5)
    # Two minutes from now or less: the signal is due, and comes within half a minute.
    hours, minutes, _ = map(int, slurm.show(job.job)["RunTime"].split(":"))
    slurm.run("scontrol", "update", f"JobId={job.job}", f"TimeLimit={60 * hours + minutes + 2}")
    job.wait_until(lambda: len(job.starts()) == 2, "second start")
    slurm.run("scontrol", "update", f"JobId={job.job}", "TimeLimit=60")
    job.finish()
    ((why, step),) = job.stopped_after()
    assert why == "SIGUSR1" and 5 <= step < STEPS and job.went_on_from() == [step]
    assert losses(job.run_dir) == whole


@pytest.mark.cluster
def test_a_job_that_loses_a_node_goes_on_with_another_one(
    hosts: Hosts, slurm: Slurm, prefix: Path, whole: dict[int, float], tmp_path: Path
) -> None:
    job = Submitted(slurm, tmp_path, *arguments(prefix, STEPS, *slow(), "--checkpoint.save_every", "4"))
    job.train_until(10)
    hosts.power_off(2)
    try:
        job.finish()
    finally:
        hosts.power_on(2)
        slurm.start_node(2)
    assert job.starts()[0] == (0, "n[1-2]") and job.starts()[-1] == (1, "n[1,3]")
    (step,) = job.went_on_from()
    assert step >= 8 and step % 4 == 0
    assert losses(job.run_dir) == whole


def ranks(hosts: Hosts) -> dict[int, tuple[int, int]]:
    """Rank -> (host, process id) of every rank of the only job."""
    found = {}
    for i in hosts.all():
        for pid, line in hosts.pids(i).items():
            if re.match(r"\S*python launch/pretrain.py", line):
                variables = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
                (rank,) = [each for each in variables if each.startswith(b"SLURM_PROCID=")]
                found[int(rank.split(b"=")[1])] = i, pid
    return found


@pytest.mark.cluster
def test_a_killed_rank_ends_all_within_seconds_is_named_and_the_run_restarted_within_the_job(
    hosts: Hosts, slurm: Slurm, prefix: Path, whole: dict[int, float], tmp_path: Path
) -> None:
    job = Submitted(slurm, tmp_path, *arguments(prefix, STEPS, *slow(), "--checkpoint.save_every", "4"))
    job.train_until(10)
    before = ranks(hosts)
    assert [before[rank][0] for rank in range(4)] == [1, 1, 2, 2]
    os.kill(before[3][1], signal.SIGKILL)
    killed = time.monotonic()
    while any(Path(f"/proc/{pid}").exists() for _, pid in before.values()):
        assert time.monotonic() - killed < 30, job.text
        time.sleep(0.1)
    job.finish()
    assert re.search(r"rank 3 \D*n2", job.text), job.text
    assert job.starts() == [(0, "n[1-2]")], "the job itself was not requeued"
    assert len(re.findall(r"supervise: .* restart 1 of 10 in \d+ s", job.text)) == 1
    (step,) = job.went_on_from()
    assert step >= 8 and step % 4 == 0
    assert losses(job.run_dir) == whole


@pytest.mark.cluster
def test_a_cancelled_job_saves_and_does_not_come_back(slurm: Slurm, prefix: Path, tmp_path: Path) -> None:
    job = Submitted(slurm, tmp_path, *arguments(prefix, STEPS, *slow()))
    job.train_until(5)
    slurm.run("scancel", job.job)
    slurm.wait_for(job.job, ("CANCELLED",))
    time.sleep(10)  # a requeued job starts again after 5 s
    assert slurm.show(job.job)["JobState"] == "CANCELLED"
    ((_, step),) = job.stopped_after()
    assert newest_checkpoint(job.run_dir) == f"step_{step}"
    assert len(job.starts()) == 1


@pytest.mark.cluster
def test_a_mistake_in_the_command_fails_the_job_and_is_not_tried_again(
    slurm: Slurm, prefix: Path, tmp_path: Path
) -> None:
    job = Submitted(slurm, tmp_path, *arguments(prefix, 12, "--train.global_batch_size", "3"))
    assert slurm.wait_for(job.job, ENDED)["ExitCode"] == "2:0"
    assert len(job.starts()) == 1 and job.text.count("error: train.global_batch_size") == 1


@pytest.mark.cluster
def test_array_sbatch_runs_each_line_of_a_file_in_a_directory_of_its_own(
    slurm: Slurm, prefix: Path, tmp_path: Path
) -> None:
    sweep, run_dir = tmp_path / "sweep.txt", tmp_path / "sweep"
    sweep.write_text("# two learning rates\n--optimizer.lr 2e-3 --train.seed 5\n\n--optimizer.lr=1e-3\n")
    array = slurm.submit(
        *("--array=1-2", "--nodes=1", *SMALL, f"--output={tmp_path}/log_%a", "launch/slurm/array.sbatch", sweep),
        *(*arguments(prefix, 20, *slow()), "--train.run_dir", str(run_dir)),
        cwd=REPOSITORY,
    )
    deadline = time.monotonic() + 180
    while len(records(run_dir / "1")) < 3:
        assert time.monotonic() < deadline, [path.read_text() for path in tmp_path.glob("log_*")]
        time.sleep(0.1)
    # One task is asked to save and stop, and requeued; the other is left alone.
    slurm.run("scancel", "--signal=USR1", f"{array}_1")
    for task, restarts in (("1", "1"), ("2", "0")):
        text = (tmp_path / f"log_{task}").read_text
        shown = slurm.wait_for(f"{array}_{task}", ENDED)
        assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", restarts), text()
    for task, more in (("1", ["--optimizer.lr", "2e-3", "--train.seed", "5"]), ("2", ["--optimizer.lr", "1e-3"])):
        alone = tmp_path / f"alone_{task}"
        outcome = start([*arguments(prefix, 20), *more, "--train.run_dir", str(alone)], processes=2)
        assert outcome.code == 0, outcome.text
        assert losses(run_dir / task) == pytest.approx(losses(alone), rel=1e-5)
    assert losses(run_dir / "1")[20] != pytest.approx(losses(run_dir / "2")[20], rel=1e-2)
