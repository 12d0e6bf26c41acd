"""Stop a run once and kill it again and again at random moments; it must become the run that was never disturbed.

    python -m tests.checkpoint.crash --kills 20

prints a line for each life, and ends with an assertion on every step's loss.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megamult.checkpoint import directory
from megamult.runtime import exit_codes
from tests.train.command import Launch, Outcome, data_arguments, make_corpus, start

SAVE_EVERY = 3


def arguments(prefix: Path, run_dir: Path, steps: int) -> list[str]:
    """A small run that saves every few steps and goes on from the newest."""
    return [
        *("--config", "examples/configs/tiny.yaml", *data_arguments(prefix)),
        *("--model.seq_length", "32", "--train.steps", str(steps), "--parallel.zero_stage", "2"),
        *("--optimizer.name", "muon", "--train.log_histograms_every", "0", "--train.run_dir", str(run_dir)),
        *("--checkpoint.save_every", str(SAVE_EVERY), "--checkpoint.load", "latest"),
    ]


def losses(run_dir: Path) -> dict[int, float]:
    """Step -> loss; a step that is there twice is an error."""
    found: dict[int, float] = {}
    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "loss" in record:
            assert record["step"] not in found, record["step"]
            found[record["step"]] = record["loss"]
    return found


def newest(run_dir: Path) -> str | None:
    """What `latest` names."""
    path = run_dir / "checkpoints" / "latest"
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def went_on_from(outcome: Outcome) -> str | None:
    """The checkpoint that a run says it goes on from."""
    found = re.search(r"^going on from .*/(step_\d+): ", outcome.stdout, re.MULTILINE)
    return found[1] if found else None


def wait_for(condition: Callable[[], bool], launch: Launch, what: str, seconds: float = 90.0) -> None:
    """Poll every millisecond."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert launch.process.poll() is None, f"ended before {what}: {launch.wait().text}"
        assert time.monotonic() < deadline, f"no {what} within {seconds:.0f} s"
        time.sleep(0.001)


def stepping(run_dir: Path) -> Callable[[], bool]:
    """Whether the run has recorded a step that was not there before."""
    metrics = run_dir / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    started = time.time_ns()
    return lambda: metrics.exists() and metrics.stat().st_mtime_ns > max(before, started) and metrics.stat().st_size > 0


def further(run_dir: Path, steps: int) -> Callable[[], bool]:
    """Whether the run has recorded so many steps more than now: lives get equally far on any machine."""

    def recorded() -> int:
        return (run_dir / "metrics.jsonl").read_bytes().count(b"\n")

    before = recorded()
    return lambda: recorded() >= before + steps


@dataclass
class Life:
    """One start and its end."""

    how: str
    began_at: str | None
    left_at: str | None
    outcome: Outcome


def live_and_die(run_dir: Path, command: list[str], draw: random.Random, inside_save: bool, everyone: bool) -> Life:
    """Start, and kill one rank or all processes: while a checkpoint is written to a slow disk, or at a random step."""
    before = newest(run_dir)
    ready = stepping(run_dir)
    launch = Launch(command, processes=2, first=Path(__file__).parent / "slow_disk" if inside_save else None)
    wait_for(ready, launch, "step")
    wait_for(further(run_dir, draw.randrange(5)), launch, "further steps")
    if inside_save:
        wait_for(lambda: any((run_dir / "checkpoints").glob("step_*.tmp")), launch, "save")
        time.sleep(draw.uniform(0.0, 0.03))
    victims = list(launch.pids()) if everyone else [draw.choice(launch.ranks())]
    writing = sorted(path.name for path in (run_dir / "checkpoints").glob("*.tmp"))
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    outcome = launch.wait()
    how = f"SIGKILL to {'all' if everyone else 'one rank'}{', while writing ' + ', '.join(writing) if writing else ''}"
    assert outcome.code != 0 and outcome.left == [], outcome
    assert went_on_from(outcome) == before, (before, outcome.stdout)
    return Life(how, before, newest(run_dir), outcome)


def stop(run_dir: Path, command: list[str], draw: random.Random, whom: str) -> Life:
    """Start, and ask for a save and an end: one rank; all of them twice, as a scheduler and a launcher together do; or
    DeepSpeed's launcher, which passes nothing on."""
    before = newest(run_dir)
    ready = stepping(run_dir)
    launch = Launch(command, processes=2, launcher=whom == "the launcher")
    wait_for(ready, launch, "step")
    wait_for(further(run_dir, draw.randrange(4)), launch, "further steps")
    ranks = launch.ranks()
    asked = {"one rank": [draw.choice(ranks)], "all ranks, twice": ranks * 2, "the launcher": [launch.process.pid]}
    number = signal.SIGUSR1 if whom == "one rank" else signal.SIGTERM
    for pid in asked[whom]:
        os.kill(pid, number)
    outcome = launch.wait()
    assert outcome.code == (-number if whom == "the launcher" else exit_codes.RESUME) and outcome.left == [], outcome
    assert newest(run_dir) == f"step_{max(losses(run_dir))}", "it saves the step that it has just done"
    return Life(f"{number.name} to {whom}", before, newest(run_dir), outcome)


def damage_newest(checkpoints: Path) -> tuple[str, str]:
    """Flip a byte in a shard of the newest checkpoint; its name, and that of the one before it."""
    named = (checkpoints / "latest").read_text(encoding="utf-8").strip()
    at = directory.steps(checkpoints).index(int(named.removeprefix("step_")))
    shard = sorted((checkpoints / named).glob("shard_*"))[-1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return named, f"step_{directory.steps(checkpoints)[at - 1]}"


def crash(folder: Path, prefix: Path, kills: int, steps: int, seed: int = 0) -> list[Life]:
    """The whole experiment in `folder`, on the corpus `prefix`; what each life was.

    Raises:
        AssertionError: a restart did not go on from the newest finished checkpoint, or a loss is another one than that
            of the run that was never killed.
    """
    draw = random.Random(seed)
    whole = start(arguments(prefix, folder / "whole", steps), processes=2, timeout=600)
    assert whole.code == 0, whole.text
    command = arguments(prefix, folder / "killed", steps)
    asked = ("one rank", "all ranks, twice", "the launcher")
    lives = [stop(folder / "killed", command, draw, whom) for whom in asked]
    lives += [
        live_and_die(folder / "killed", command, draw, inside_save=i % 2 == 0, everyone=i % 4 >= 2)
        for i in range(kills)
    ]
    damaged, before = damage_newest(folder / "killed" / "checkpoints")
    last = start(command, processes=2, timeout=600)
    assert last.code == 0, last.text
    assert went_on_from(last) == before
    told = [line for line in last.stderr.splitlines() if line.startswith("warning: ") and damaged in line]
    assert len(told) == 1 and told[0].endswith("trying the one before it"), last.stderr
    lives.append(Life(f"{damaged} was damaged; to its end", before, newest(folder / "killed"), last))
    assert not list((folder / "killed" / "checkpoints").glob("*.tmp"))
    expected, found = losses(folder / "whole"), losses(folder / "killed")
    assert sorted(expected) == list(range(1, steps + 1))
    assert found == expected  # one layout and one thread: bit by bit
    return lives


def main() -> None:
    """Print the lives."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--kills", type=int, default=20)
    made.add_argument("--steps", type=int, default=200)
    made.add_argument("--seed", type=int, default=0)
    chosen = made.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for i, life in enumerate(
            crash(Path(folder), make_corpus(Path(folder)), chosen.kills, chosen.steps, chosen.seed)
        ):
            print(f"life {i + 1:2d}: went on from {life.began_at}, newest at its end {life.left_at}; {life.how}")
    print(f"{chosen.steps} losses are those of the run that was never killed")


if __name__ == "__main__":
    main()
