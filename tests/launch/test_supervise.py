"""launch/supervise.sh, with small scripts that play a training run and its launchers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

SUPERVISE = Path(__file__).parents[2] / "launch" / "supervise.sh"
STEPS = 20

# Plays one life of a run: the next entry of RUN/../plan.json. A life waits for a signal ("until": its name), lingers
# ("linger": seconds), saves a checkpoint ("step"), and ends ("code").
_PRETRAIN = """
import fcntl, json, os, signal, sys, threading, time
from pathlib import Path

run = Path(sys.argv[sys.argv.index("--train.run_dir") + 1])
lives = run.parent / "lives"
with lives.open("a") as file:
    file.write(f"{os.getpid()}\\n")
life = json.loads((run.parent / "plan.json").read_text())[len(lives.read_text().split()) - 1]
got = []
for name in ("SIGUSR1", "SIGTERM"):
    signal.signal(getattr(signal, name), lambda number, _: got.append(signal.Signals(number).name))
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
sections = ("model:", "  steps: 3", "train:", "  seed: 1", "  steps: STEPS", "checkpoint:", "  steps: 4")
(run / "config.yaml").write_text("\\n".join(sections) + "\\n")
guard, over = threading.Lock(), []
def beat():  # as on a node of its own, where flock tells nobody here
    for count in range(10 ** 6):
        with guard:
            if over:
                return
            (run / "beat").write_text(json.dumps({"machine": "n2 its-kernel", "beats": count}))
            (run / "beat").rename(run / "lock")
        time.sleep(0.2)
if life.get("lock") == "far":
    assert not (run / "lock").exists(), "two runs at once"
    threading.Thread(target=beat, daemon=True).start()
elif life.get("lock", True):  # held by rank 0
    lock = (run / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
(run.parent / "ready").touch()
while "until" in life and life["until"] not in got:
    time.sleep(0.01)
time.sleep(life.get("linger", 0))
if "step" in life:
    (run / "checkpoints" / "latest").write_text(f"step_{life['step']}\\n")
with (run.parent / "got").open("a") as file:
    file.write(" ".join(["life", *got]) + "\\n")
if life.get("lock") == "far":
    with guard:
        over.append(True)
        (run / "lock").unlink()
if "dies_at" in life:
    (run / "logs").mkdir()
    name = f"rank 0 on {os.uname().nodename} (process {os.getpid()})"
    (run / "logs" / "rank_0.running").write_text(name + "\\n")
    (run / "logs" / "rank_1.running").write_text("rank 1 on elsewhere (process 5)\\n")
    (run / "metrics.jsonl").write_text(json.dumps({"step": life["dies_at"], "loss": 1.0}) + "\\n")
code = life["code"]
os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
""".replace("STEPS", str(STEPS))

# As DeepSpeed's: dies of a signal at once, leaves its ranks running, and returns 0 where a signal ended its child.
_DEEPSPEED = """
import subprocess, sys
sys.exit(max(0, subprocess.run([sys.executable, "-u", *sys.argv[1:]]).returncode))
"""

# Leaves as soon as its rank is there; the rank does not show where it comes from, like one on another host.
_FAR_AWAY = """
import os, subprocess, sys, time
from pathlib import Path
ready = Path(sys.argv[1]) / "ready"
ready.unlink(missing_ok=True)
environment = {key: value for key, value in os.environ.items() if not key.startswith("MEGAMULT_")}
subprocess.Popen([sys.executable, *sys.argv[2:]], env=environment)
while not ready.exists():
    time.sleep(0.01)
sys.exit(1)
"""

# As srun: hands SIGUSR1 on to its ranks and kills them when it gets SIGTERM.
_SRUN = """#!PYTHON
import signal, subprocess, sys
rank = subprocess.Popen(sys.argv[1:])
signal.signal(signal.SIGUSR1, lambda *_: rank.send_signal(signal.SIGTERM))
signal.signal(signal.SIGTERM, lambda *_: rank.kill())
sys.exit(rank.wait() % 256)
""".replace("PYTHON", sys.executable)


def _hear_all() -> None:
    """Under nohup, or in a script's background, signals are ignored that no child of bash could trap any more."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@dataclass
class Supervised:
    """A folder in which supervise.sh runs a play."""

    folder: Path
    plan: list[dict[str, Any]]
    options: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.folder / "launch").mkdir()
        (self.folder / "launch" / "pretrain.py").write_text(_PRETRAIN)
        (self.folder / "deepspeed").write_text(_DEEPSPEED)
        (self.folder / "far_away").write_text(_FAR_AWAY)
        (self.folder / "srun").write_text(_SRUN)
        (self.folder / "srun").chmod(0o755)
        (self.folder / "plan.json").write_text(json.dumps(self.plan))

    @property
    def said(self) -> Path:
        """Its standard error."""
        return self.folder / "stderr"

    @property
    def command(self) -> list[str]:
        """pretrain.py and its arguments, without a launcher."""
        run = str(self.folder / "run")
        return [str(self.folder / "launch" / "pretrain.py"), "--train.run_dir", run, "--checkpoint.load", "latest"]

    def start(self, *launcher: str) -> subprocess.Popen[bytes]:
        """Supervise the play under `launcher`."""
        with self.said.open("w") as said:  # no pipe: a rank that stays would keep it open
            return subprocess.Popen(
                [SUPERVISE, "--pause", "0", *self.options, *(launcher or (sys.executable,)), *self.command],
                stdout=subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,
                preexec_fn=_hear_all,
            )

    def finish(self, process: subprocess.Popen[bytes]) -> tuple[int, list[str]]:
        """Exit code and the decisions, without their time."""
        code = process.wait(timeout=60)
        prefix = "supervise: "
        lines = self.said.read_text().splitlines()
        return code, [line.removeprefix(prefix).split(": ", 1)[1] for line in lines if line.startswith(prefix)]

    def lives(self) -> list[int]:
        """Process ids of all lives."""
        path = self.folder / "lives"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def got(self) -> list[str]:
        """For each life that ended, the signals that it got."""
        return [line.removeprefix("life").strip() for line in (self.folder / "got").read_text().splitlines()]

    def wait_until_ready(self) -> None:
        """A life has set its handlers up."""
        _wait(lambda: (self.folder / "ready").exists())


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Callable[..., Supervised]]:
    """Makes plays; what is left of them is killed."""
    made: list[Supervised] = []

    def make(*plan: dict[str, Any], options: list[str] | None = None) -> Supervised:
        made.append(Supervised(tmp_path, list(plan), options or []))
        return made[-1]

    yield make
    for each in made:
        for pid in each.lives():
            if _alive(pid):
                os.kill(pid, signal.SIGKILL)


Play = Callable[..., Supervised]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "no command"),
        (["no-such-launcher", "launch/pretrain.py"], "no-such-launcher is not a command here"),
        (["python3", "train.py", "--train.run_dir", "r", "--checkpoint.load", "latest"], "no launch/pretrain.py in: "),
        (["python3", "launch/pretrain.py", "--checkpoint.load", "latest"], "add --train.run_dir RUN"),
        (["python3", "launch/pretrain.py", "--train.run_dir", "r"], "add --checkpoint.load latest"),
        (
            ["python3", "pretrain.py", "--train.run_dir=r", "--checkpoint.load=latest", "--checkpoint.load", "r/x"],
            "add --checkpoint.load latest",
        ),
        (["--checkpoint.load", "latest", "python3", "pretrain.py"], "unknown option --checkpoint.load"),
        (["--max_failures", "often", "python3"], "--max_failures is 'often'"),
        (["--max_failures", "0", "python3"], "--max_failures is 0"),
    ],
)
def test_a_command_that_a_restart_could_not_go_on_with_is_an_error_that_says_what_to_add(
    arguments: list[str], told: str, tmp_path: Path
) -> None:
    done = subprocess.run([SUPERVISE, *arguments], capture_output=True, text=True, timeout=30, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: supervise.sh: {told}") and done.stderr.count("\n") == 1


def test_a_finished_run_is_done(play: Play) -> None:
    run = play({"code": 0, "step": STEPS})
    assert run.finish(run.start()) == (0, [f"exit code 0, newest checkpoint step_{STEPS}: done"])
    assert len(run.lives()) == 1


@pytest.mark.parametrize("code", [2, 65, 74, 75])
def test_what_a_restart_would_not_mend_is_passed_on(play: Play, code: int) -> None:
    run = play({"code": code, "step": 4})
    assert run.finish(run.start()) == (code, [f"exit code {code}, newest checkpoint step_4: not restarted"])
    assert len(run.lives()) == 1


@pytest.mark.parametrize("code", [1, 70, 255, -signal.SIGKILL])
def test_a_crash_is_restarted(play: Play, code: int) -> None:
    run = play({"code": code, "step": 4}, {"code": 0, "step": STEPS})
    seen = 128 - code if code < 0 else code
    assert run.finish(run.start()) == (
        0,
        [
            f"exit code {seen}, newest checkpoint step_4: restart 1 of 10 in 0 s",
            f"exit code 0, newest checkpoint step_{STEPS}: done",
        ],
    )


def test_exit_code_0_before_the_last_step_is_a_crash(play: Play) -> None:
    """DeepSpeed's launcher returns 0 where a signal ended its child."""
    run = play({"code": -signal.SIGKILL}, {"code": 0, "step": STEPS})
    code, said = run.finish(run.start(sys.executable, str(run.folder / "deepspeed")))
    assert code == 0 and len(run.lives()) == 2
    assert said[0] == f"exit code 0, no checkpoint, not the last of {STEPS} steps: restart 1 of 10 in 0 s"


def test_it_gives_up_after_failures_in_a_row_without_a_newer_checkpoint(play: Play) -> None:
    lives = [{"code": 1, "step": step} for step in (3, 3, 3, 6, 6, 3, 5)]
    run = play(*lives, *lives, options=["--max_failures", "3"])
    code, said = run.finish(run.start())
    assert (code, len(run.lives())) == (1, 7)
    assert (
        said[-1]
        == "exit code 1, newest checkpoint step_5: giving up after 3 failures in a row without a newer checkpoint"
    )


def test_it_gives_up_after_so_many_restarts_even_with_progress_and_never_says_that_all_is_well(play: Play) -> None:
    run = play(*({"code": 0, "step": step} for step in (1, 2, 3, 4)), options=["--max_restarts", "2"])
    code, said = run.finish(run.start())
    assert (code, len(run.lives())) == (1, 3)
    assert (
        said[-1] == f"exit code 0, newest checkpoint step_3, not the last of {STEPS} steps: giving up after 2 restarts"
    )


def test_pauses_grow_while_there_is_no_progress(play: Play) -> None:
    run = play(*({"code": 1, "step": step} for step in (1, 1, 1, 2, 2)), {"code": 0, "step": STEPS})
    run.options = ["--pause", "1", "--max_failures", "9"]
    began = time.monotonic()
    code, said = run.finish(run.start())
    assert code == 0
    assert [line.rsplit(" ", 2)[1] for line in said[:-1]] == ["1", "1", "2", "1", "1"]
    assert time.monotonic() - began > 6


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_a_request_reaches_the_ranks_and_not_the_launcher_that_would_lose_their_exit_code(
    play: Play, name: str
) -> None:
    run = play({"until": "SIGUSR1", "linger": 0.2, "step": 7, "code": 75})
    process = run.start(sys.executable, str(run.folder / "deepspeed"))
    run.wait_until_ready()
    # To all of its group, as a terminal's Ctrl-C or a scheduler would.
    os.killpg(process.pid, getattr(signal, name))
    assert run.finish(process) == (
        75,
        [
            f"{name}: asking the run to save and stop, no checkpoint",
            "exit code 75, newest checkpoint step_7: not restarted",
        ],
    )
    assert run.got() == ["SIGUSR1"]


def test_srun_gets_sigusr1_which_it_hands_on_and_not_sigterm_of_which_it_kills_its_ranks(play: Play) -> None:
    run = play({"until": "SIGTERM", "step": 7, "code": 75})  # the srun of the play renames what it hands on
    process = run.start(str(run.folder / "srun"), sys.executable)
    run.wait_until_ready()
    process.terminate()
    assert run.finish(process)[0] == 75
    assert run.got() == ["SIGTERM"], "from srun alone"


def test_a_request_that_comes_twice_at_once_is_handed_on_once(play: Play) -> None:
    """A second signal would end the ranks before they have saved."""
    run = play({"until": "SIGUSR1", "linger": 0.5, "step": 7, "code": 75})
    process = run.start()
    run.wait_until_ready()
    process.terminate()
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    code, said = run.finish(process)
    assert (code, len(said)) == (75, 2)
    assert run.got() == ["SIGUSR1"]


@pytest.mark.parametrize("code", [0, 1, -signal.SIGTERM])
def test_whatever_ends_a_run_that_was_asked_to_stop_it_is_not_started_again(play: Play, code: int) -> None:
    run = play({"until": "SIGUSR1", "step": 7, "code": code})
    process = run.start()
    run.wait_until_ready()
    process.terminate()
    assert run.finish(process)[0] == 75
    assert len(run.lives()) == 1


def test_a_run_that_finishes_although_it_was_asked_to_stop_is_done(play: Play) -> None:
    run = play({"until": "SIGUSR1", "step": STEPS, "code": 0})
    process = run.start()
    run.wait_until_ready()
    process.terminate()
    assert run.finish(process)[0] == 0


def test_a_request_during_the_pause_ends_it(play: Play) -> None:
    run = play({"code": 1, "step": 3}, {"code": 0, "step": STEPS}, options=["--pause", "50"])
    process = run.start()
    _wait(lambda: run.said.read_text().endswith("restart 1 of 10 in 50 s\n"))
    process.terminate()
    code, said = run.finish(process)
    assert (code, len(run.lives())) == (75, 1)
    assert said[-1] == "stopped by SIGTERM between two starts, newest checkpoint step_3: returning 75"


@pytest.mark.parametrize("lock", [True, False])
def test_it_waits_for_ranks_that_outlive_their_launcher_and_asks_them_too(play: Play, lock: bool) -> None:
    run = play({"until": "SIGUSR1", "linger": 2.5, "step": 7, "code": 75, "lock": lock})
    process = run.start(sys.executable, str(run.folder / "deepspeed"))
    run.wait_until_ready()
    (rank,) = run.lives()
    parent = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    time.sleep(0.3)
    assert process.poll() is None, "the rank is still there"
    process.terminate()
    assert run.finish(process) == (
        75,
        [
            "SIGTERM: asking the run to save and stop, no checkpoint",
            "exit code 137, newest checkpoint step_7: stopped by SIGTERM, returning 75",
        ],
    )
    assert not _alive(rank)
    assert run.got() == ["SIGUSR1"], "once: a second one later would end it without a checkpoint"


def test_it_does_not_start_a_second_run_while_a_rank_on_another_host_holds_the_lock(play: Play) -> None:
    run = play(*({"linger": 1.5, "step": step, "code": 0} for step in (7, 8)), options=["--max_restarts", "1"])
    process = run.start(sys.executable, str(run.folder / "far_away"), str(run.folder))
    assert run.finish(process) == (
        1,
        [
            "exit code 1, newest checkpoint step_7: restart 1 of 1 in 0 s",
            "exit code 1, newest checkpoint step_8: giving up after 1 restarts",
        ],
    )
    assert len(run.got()) == 2, "both lives had the lock to themselves"


def test_it_knows_a_live_run_on_another_host_by_its_beats_where_locks_do_not_reach(play: Play) -> None:
    run = play(
        *({"lock": "far", "linger": 3, "step": step, "code": 0} for step in (7, 8)), options=["--max_restarts", "1"]
    )
    _, said = run.finish(run.start(sys.executable, str(run.folder / "far_away"), str(run.folder)))
    assert said == [
        "exit code 1, newest checkpoint step_7: restart 1 of 1 in 0 s",
        "exit code 1, newest checkpoint step_8: giving up after 1 restarts",
    ]
    assert len(run.got()) == 2, "both lives had the lock to themselves"


def test_a_lock_on_another_host_that_stands_still_is_the_next_runs_business(play: Play) -> None:
    run = play({"code": 1, "lock": False}, {"code": 0, "step": STEPS, "lock": False})
    (run.folder / "run").mkdir()
    (run.folder / "run" / "lock").write_text(json.dumps({"machine": "n2 its-kernel", "beats": 5}))
    code, said = run.finish(run.start())
    assert (code, len(run.lives())) == (0, 2), said


def test_ranks_that_were_killed_are_named_with_the_last_step(play: Play) -> None:
    run = play({"code": -signal.SIGKILL, "dies_at": 12}, {"code": 0, "step": STEPS})
    code, said = run.finish(run.start())
    name = f"rank 0 on {os.uname().nodename} (process {run.lives()[0]})"
    assert code == 0
    assert said[0] == f"{name} ended without a message (killed, or out of memory?), last step in metrics.jsonl: 12"
    assert said[1].endswith("restart 1 of 10 in 0 s") and len(said) == 3, "once"
    assert (run.folder / "run" / "logs" / "rank_1.running").exists(), "which may still be about to end"


def test_a_lock_that_is_never_released_ends_it(play: Play) -> None:
    run = play({"until": "never", "code": 0}, options=["--patience", "1"])
    code, said = run.finish(run.start(sys.executable, str(run.folder / "far_away"), str(run.folder)))
    assert (code, len(run.lives())) == (1, 1)
    assert said[-1].startswith(f"{run.folder}/run/lock is still held 1 s after the command's end")


def test_ranks_that_never_end_are_killed_and_the_run_restarted(play: Play) -> None:
    run = play({"until": "never", "code": 0}, {"code": 0, "step": STEPS}, options=["--patience", "1"])
    process = run.start(sys.executable, str(run.folder / "deepspeed"))
    run.wait_until_ready()
    (rank,) = run.lives()
    os.kill(int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)
    code, said = run.finish(process)
    assert (code, len(run.lives())) == (0, 2)
    assert said[0].startswith("still there 1 s after the command's end, killed: ")
