"""The runs of `examples/reproduce/run.sh`: the quickstart's model with and without multipliers, for several seeds.

Every run is a call of `launch/quickstart.sh` with its own run directory. It resumes from its newest checkpoint if there
is one. At the end `report.py` writes the report. Exit code 75 means that this program was interrupted, and that the
same command will continue.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import report

from examples.running.attempts import attempts, complete, record_attempt
from examples.running.children import ROOT, Interrupted, last_lines
from examples.running.children import run as started
from megamult.runtime import exit_codes

QUICKSTART = ROOT / "launch" / "quickstart.sh"


def keys(run_dir: Path, implementation: str, seed: int, steps: int) -> dict[str, str]:
    """Return the configuration keys that a run sets in addition to `examples/configs/quickstart.yaml`.

    The schedule has the proportions of that file: a warm-up, a plateau, and a decay over the second half. Both
    implementations get the same keys and the same learning rate.
    """
    parts = max(1, steps // 6)
    return {
        "train.run_dir": str(run_dir),
        "train.seed": str(seed),
        "train.steps": str(steps),
        "train.eval_every": str(parts),
        "train.log_histograms_every": str(parts),
        "multipliers.implementation": implementation,
        "optimizer.warmup_steps": str(steps // 10),
        "optimizer.decay_steps": str(steps // 2),
        "checkpoint.save_every": str(parts),
        "checkpoint.keep": "1",
        "checkpoint.load": "latest",
    }


class Failed(Exception):
    """A run ended with an error."""


def train(output: Path, command: Callable[[Path, str, int], list[str]], seeds: Sequence[int]) -> None:
    """Train every run until it is complete.

    Args:
        output: folder of the runs.
        command: function that returns the command of a run, given run directory, implementation and seed.
        seeds: seeds of the runs.

    Raises:
        Interrupted: this process got a signal. The same command will continue.
        Failed: a run ended with an error.
    """
    planned = [(implementation, seed) for seed in seeds for implementation in report.IMPLEMENTATIONS]
    for number, (implementation, seed) in enumerate(planned, 1):
        run_dir = report.run_dir(output, implementation, seed)
        made = attempts(run_dir)
        name = f"{number}/{len(planned)} {implementation}, seed {seed}"
        if complete(made):
            print(f"{name}: complete", flush=True)
            continue
        log = run_dir.with_suffix(".log")
        print(f"{name}: {'going on' if made else 'training'}; its output is in {log}", flush=True)
        began, code = time.time(), exit_codes.RESUME
        try:
            code = started(command(run_dir, implementation, seed), log)
        finally:
            record_attempt(run_dir, time.time() - began, code)
        if code == exit_codes.RESUME:
            raise Interrupted
        if code:
            raise Failed(
                f"{name} ended with exit code {code}; run the same command again to resume it. {log} ends:\n"
                f"{last_lines(log)}"
            )


def claim(output: Path, settings: dict[str, object]) -> None:
    """Record the settings of the runs in `output`, or check them if they are recorded.

    Raises:
        ValueError: `output` has runs with other settings.
    """
    file = output / "settings.json"
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found != settings:
            raise ValueError(f"{output} holds runs of {found}, and this command says {settings}: give another --output")
        return
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the runs that are not complete, and write the report."""
    made = argparse.ArgumentParser(prog="examples/reproduce/run.sh", description=__doc__.split("\n")[0])
    made.add_argument("--steps", type=int, default=300, help="optimizer steps of each run (300)")
    made.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds of weights and data order (default: 1 2 3)"
    )
    made.add_argument("--output", type=Path, help="directory for all results (default: runs/reproduce_N for N steps)")
    made.add_argument("further", nargs="*", help="keys of launch/pretrain.py for every run, after --")
    chosen = made.parse_args(arguments)
    if chosen.steps < 1 or len(set(chosen.seeds)) != len(chosen.seeds):
        made.error("--steps must be positive, and --seeds all different")
    output = (chosen.output or ROOT / "runs" / f"reproduce_{chosen.steps}").resolve()

    def command(run_dir: Path, implementation: str, seed: int) -> list[str]:
        chosen_keys = keys(run_dir, implementation, seed, chosen.steps)
        pairs = [part for key, value in chosen_keys.items() for part in (f"--{key}", value)]
        return [str(QUICKSTART), *pairs, *chosen.further]

    try:
        claim(output, {"steps": chosen.steps, "further": chosen.further})
        train(output, command, chosen.seeds)
        text = report.write(
            output, chosen.seeds, shlex.join([made.prog, *(sys.argv[1:] if arguments is None else arguments)])
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.USER_ERROR
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted:
        print("interrupted: run the same command again to resume", file=sys.stderr)
        return exit_codes.RESUME
    print(f"\n{text}\nwritten: {output / 'report.md'}, {output / report.PLOT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
