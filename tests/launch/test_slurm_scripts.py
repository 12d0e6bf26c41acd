"""launch/slurm/'s batch scripts, with small programs in the place of Slurm's; tests/cluster/ has them on a real one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"

# Notes its arguments; ends with the code that it is told, after SIGUSR1 if it should wait for that.
_SRUN = """#!PYTHON
import json, os, signal, sys
from pathlib import Path
here = Path(__file__).parent
(here / "srun.json").write_text(json.dumps(sys.argv[1:]))
run = Path(sys.argv[len(sys.argv) - 1 - sys.argv[::-1].index("--train.run_dir") + 1])
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
(run / "config.yaml").write_text("train:\\n  steps: 5\\n")
(run / "checkpoints" / "latest").write_text("step_5\\n")
if os.environ.get("PLAY_WAITS"):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM])
    (here / "waits").touch()
    (here / "got").write_text(signal.Signals(signal.sigtimedwait([signal.SIGUSR1, signal.SIGTERM], 60).si_signo).name)
sys.exit(int(os.environ["PLAY_CODE"]))
""".replace("PYTHON", sys.executable)

_SCONTROL = """#!/bin/sh
echo "$*" >> "$(dirname "$0")/scontrol.log"
echo "JobId=7 JobName=x JobState=$PLAY_STATE Reason=None"
"""


@dataclass
class Batch:
    """A copy of the scripts, as a repository to submit from."""

    folder: Path

    def start(self, script: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """The batch script, as Slurm starts it: a copy, in the directory that it was submitted from."""
        spooled = self.folder / "spool" / "slurm_script"
        spooled.parent.mkdir(exist_ok=True)
        shutil.copy(LAUNCH / "slurm" / script, spooled)
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            **{"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "play", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "4"},
            **{"PLAY_CODE": "0", "PLAY_STATE": "RUNNING"},
            **variables,
        }
        return subprocess.Popen(
            ["bash", spooled, *arguments],
            cwd=self.folder / "repository",
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *arguments: str, **variables: str) -> tuple[int, str]:
        """Exit code and what it said."""
        process = self.start(script, *arguments, **variables)
        stdout, stderr = process.communicate(timeout=60)
        return process.returncode, stdout + stderr

    @property
    def step(self) -> list[str]:
        """What srun was given."""
        found: list[str] = json.loads((self.folder / "bin" / "srun.json").read_text())
        return found

    @property
    def pretrain(self) -> list[str]:
        """What pretrain.py would have been given."""
        return self.step[self.step.index("launch/pretrain.py") + 1 :]

    @property
    def requeued(self) -> list[str]:
        """What was requeued."""
        log = self.folder / "bin" / "scontrol.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [line.split()[1] for line in lines if line.startswith("requeue")]


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    """Scripts and programs."""
    launch = tmp_path / "repository" / "launch"
    (launch / "slurm").mkdir(parents=True)
    shutil.copy(LAUNCH / "supervise.sh", launch)
    shutil.copy(LAUNCH / "slurm" / "job.sh", launch / "slurm")
    (launch / "pretrain.py").touch()
    (launch / "setup_env.sh").write_text("export OF_SETUP=1\n")
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return Batch(tmp_path)


def test_a_job_gets_a_run_directory_of_its_own_and_goes_on_from_its_newest_checkpoint(batch: Batch) -> None:
    code, said = batch.run("pretrain.sbatch", "--config", "x.yaml", SLURM_CPUS_PER_TASK="3")
    assert code == 0, said
    assert batch.pretrain == ["--config", "x.yaml", "--train.run_dir", "runs/play-7", "--checkpoint.load", "latest"]
    assert "--cpus-per-task=3" in batch.step
    assert "start 0 on n[1-2], 4 ranks; runs/play-7" in said
    batch.run("pretrain.sbatch", "--train.run_dir", "runs/mine", "--checkpoint.load=latest")
    assert batch.pretrain == ["--train.run_dir", "runs/mine", "--checkpoint.load=latest"]


def test_a_checkpoint_that_a_requeued_job_would_start_from_again_and_again_is_an_error(batch: Batch) -> None:
    code, said = batch.run("pretrain.sbatch", "--checkpoint.load", "runs/other/checkpoints/step_5")
    assert code == 2 and "add --checkpoint.load latest" in said
    assert batch.requeued == []


def test_a_job_that_is_not_submitted_from_the_repository_says_so(batch: Batch) -> None:
    (batch.folder / "repository" / "launch" / "pretrain.py").unlink()
    for script in ("pretrain.sbatch", "array.sbatch"):
        code, said = batch.run(script)
        assert code == 2 and said.startswith("error: no launch/pretrain.py in ") and "--chdir=REPOSITORY" in said


@pytest.mark.parametrize(
    ("variables", "requeued", "told"),
    [
        ({}, ["7"], "saved and stopped; requeued"),
        ({"SLURM_RESTART_COUNT": "99"}, ["7"], "saved and stopped; requeued"),
        ({"SLURM_RESTART_COUNT": "100"}, [], "requeued 100 times, and max_requeues is 100"),
        ({"SLURM_RESTART_COUNT": "2", "MEGAMULT_MAX_REQUEUES": "2"}, [], "requeued 2 times, and max_requeues is 2"),
        ({"MEGAMULT_REQUEUE": "no"}, [], "submit the same command with --train.run_dir runs/play-7"),
        ({"PLAY_STATE": "COMPLETING"}, [], "Slurm is ending this job (COMPLETING)"),
        ({"PLAY_STATE": "CANCELLED"}, [], "Slurm is ending this job (CANCELLED)"),
    ],
)
def test_a_run_that_saved_and_stopped_is_requeued_unless_something_speaks_against_it(
    batch: Batch, variables: dict[str, str], requeued: list[str], told: str
) -> None:
    code, said = batch.run("pretrain.sbatch", PLAY_CODE="75", **variables)
    assert (code, batch.requeued) == (75, requeued)
    assert told in said


@pytest.mark.parametrize("code", [2, 65, 74])
def test_a_job_that_would_fail_again_fails_and_is_not_requeued(batch: Batch, code: int) -> None:
    assert batch.run("pretrain.sbatch", PLAY_CODE=str(code))[0] == code
    assert batch.requeued == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_batch_script_reaches_the_ranks_and_their_end_is_awaited(
    batch: Batch, number: signal.Signals
) -> None:
    process = batch.start("pretrain.sbatch", PLAY_CODE="75", PLAY_WAITS="1")
    deadline = time.monotonic() + 30
    while not (batch.folder / "bin" / "waits").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert (process.returncode, batch.requeued) == (75, ["7"])
    assert (batch.folder / "bin" / "got").read_text() == "SIGUSR1", "srun kills its ranks when it gets SIGTERM"


def test_a_container_is_pyxis_s_or_by_its_name_apptainer_s(batch: Batch) -> None:
    here, rank = str(batch.folder / "repository"), ["python", "launch/pretrain.py"]
    mounts = {"MEGAMULT_CONTAINER_MOUNTS": "/data,/scratch:/s"}
    batch.run("pretrain.sbatch", MEGAMULT_CONTAINER="image.sqsh", **mounts)
    at = batch.step.index("--container-image=image.sqsh")
    assert batch.step[at + 1 : at + 5] == [
        f"--container-mounts={here}:{here},/data,/scratch:/s",
        f"--container-workdir={here}",
        *rank,
    ]
    batch.run("pretrain.sbatch", MEGAMULT_CONTAINER="/images/image.sif", SLURM_GPUS_ON_NODE="8", **mounts)
    at = batch.step.index("apptainer")
    options = ["exec", "--bind", f"{here},/data,/scratch:/s", "--pwd", here, "--nv", "/images/image.sif"]
    assert batch.step[at + 1 : at + 10] == [*options, *rank]
    batch.run("pretrain.sbatch", MEGAMULT_CONTAINER="/images/image.sif")
    assert "--nv" not in batch.step and "--container-image" not in " ".join(batch.step)


_SWEEP = """# learning rates

--optimizer.lr 1e-3 --train.seed 1
   # in between
--optimizer.lr=2e-3 --data.train '{"a b": 1}'
--train.run_dir runs/third
"""


@pytest.mark.parametrize(
    ("task", "common", "pretrain"),
    [
        ("1", [], ["--optimizer.lr", "1e-3", "--train.seed", "1", "--train.run_dir", "runs/play-40/1"]),
        ("2", [], ["--optimizer.lr=2e-3", "--data.train", '{"a b": 1}', "--train.run_dir", "runs/play-40/2"]),
        ("3", ["--train.run_dir=r"], ["--train.run_dir=r", "--train.run_dir", "runs/third"]),
        (
            "1",
            ["--train.run_dir", "r"],
            ["--train.run_dir", "r", "--optimizer.lr", "1e-3", "--train.seed", "1", "--train.run_dir", "r/1"],
        ),
    ],
)
def test_each_task_of_an_array_has_its_line_of_the_file_and_a_directory_of_its_own(
    batch: Batch, task: str, common: list[str], pretrain: list[str]
) -> None:
    (batch.folder / "repository" / "sweep").write_text(_SWEEP)
    of_array = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": task}
    code, said = batch.run("array.sbatch", "sweep", *common, PLAY_CODE="75", SLURM_JOB_ID="40", **of_array)
    assert code == 75, said
    assert batch.pretrain == [*pretrain, "--checkpoint.load", "latest"]
    assert batch.requeued == [f"40_{task}"], "and not all of array 40"


@pytest.mark.parametrize(
    ("arguments", "task", "told"),
    [
        ([], "1", "error: the first argument is ''"),
        (["no-such-file"], "1", "error: the first argument is 'no-such-file'"),
        (["sweep"], "4", "error: task 4, but sweep has 3 lines: give --array=1-3"),
        (["sweep"], "0", "error: task 0, but sweep has 3 lines: give --array=1-3"),
        (["sweep"], "", "give sbatch --array=1-N"),
    ],
)
def test_a_task_without_a_line_is_an_error(batch: Batch, arguments: list[str], task: str, told: str) -> None:
    (batch.folder / "repository" / "sweep").write_text(_SWEEP)
    code, said = batch.run("array.sbatch", *arguments, SLURM_ARRAY_JOB_ID="40", SLURM_ARRAY_TASK_ID=task)
    assert code != 0 and told in said
