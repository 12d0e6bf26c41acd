"""The package of `examples/paper/run.sh`: trains the runs that are not complete, measures the claims, and reports.

Exit codes: 0 if all runs are complete, 1 if a run has failed, 2 for a mistake in the command, 75 if the program was
interrupted and the same command will continue.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.paper import (
    e01_projector,
    e02_brownian_motion,
    e03_mlp_scalars,
    e05_row_norms,
    e06_product_symmetry,
    e07_residual_growth,
    e08_width,
    e09_clipping,
    e10_tuning,
    e13_placement,
    e14_gradient_snr,
    e15_log,
    falcon_h1,
    headline,
    kept,
    multiplier_rates,
    report,
    scales,
    transfer,
)
from examples.paper.experiment import Experiment, NotRun, Results
from examples.paper.grid import Failure, Grid, Run, plan
from examples.paper.setting import DEFAULT_CORPUS, Setting, gpu, small
from examples.running.children import ROOT, Interrupted
from megamult.runtime import exit_codes

EXPERIMENTS: tuple[Experiment, ...] = (
    headline.EXPERIMENT,
    e02_brownian_motion.EXPERIMENT,
    e05_row_norms.EXPERIMENT,
    e14_gradient_snr.EXPERIMENT,
    e03_mlp_scalars.EXPERIMENT,
    e01_projector.EXPERIMENT,
    e13_placement.EXPERIMENT,
    e06_product_symmetry.EXPERIMENT,
    e07_residual_growth.EXPERIMENT,
    e08_width.EXPERIMENT,
    e09_clipping.EXPERIMENT,
    e10_tuning.EXPERIMENT,
    e15_log.EXPERIMENT,
    multiplier_rates.EXPERIMENT,
    scales.EXPERIMENT,
    transfer.EXPERIMENT,
    falcon_h1.EXPERIMENT,
)
"""All experiments, in the order of the report."""

GPU_NEEDS = (
    "--gpu trains 16M parameters in bf16 on 98M tokens a run. It needs a CUDA GPU that torch sees, and --corpus PREFIX "
    "of a corpus of 25M tokens or more that launch/prepare_data.py has written (PREFIX_train, PREFIX_valid, "
    "PREFIX.model)"
)


def chosen_experiments(names: Sequence[str]) -> list[Experiment]:
    """Return the experiments with these names, or all.

    Raises:
        ValueError: a name is unknown.
    """
    known = {each.name.lower(): each for each in EXPERIMENTS}
    unknown = [name for name in names if name.lower() not in known]
    if unknown:
        raise ValueError(
            f"the experiment {unknown[0]!r} is unknown: use {', '.join(each.name for each in EXPERIMENTS)}"
        )
    return [each for each in EXPERIMENTS if not names or each.name.lower() in {name.lower() for name in names}]


def chosen_runs(
    results: Results, experiments: Sequence[Experiment], named: bool = False, full: bool = False
) -> list[Run]:
    """Return the runs that experiments need, as far as they are decided, each configuration once.

    Runs that the results of others decide come last, so that the numbers of those before them stay. Runs whose losses
    are kept are left out where losses are enough.

    Args:
        results: setting, seeds, and the runs that are complete.
        experiments: the experiments.
        named: whether the experiments were named, so that those outside the package count too.
        full: whether to add what is outside the package.
    """
    setting, seeds = results.setting, results.seeds
    first: list[Run] = []
    later: list[Run] = []
    for each in experiments:
        if not (each.package or named or full):
            continue
        arms = [*each.arms(setting), *(each.full_arms(setting) if full else ())]
        wanted = plan(setting, arms, seeds if full else seeds[: each.seeds])
        decided: list[Run] = []
        with contextlib.suppress(NotRun):
            decided = plan(setting, each.decided(results), seeds)
        for found, runs in ((first, wanted), (later, decided)):
            found += [run for run in runs if not (each.losses_only and run.name in results.kept)]
    return list({run.name: run for run in [*first, *later]}.values())


def train(results: Results, experiments: Sequence[Experiment], named: bool, full: bool, workers: int) -> list[Failure]:
    """Train the runs that experiments need, and then those that the results of these decide.

    Returns:
        The runs that failed. They are not started again.

    Raises:
        Interrupted: this process got a signal, or a run was stopped by one. The same call continues.
    """
    failures: list[Failure] = []
    tried: set[str] = set()
    while runs := [run for run in chosen_runs(results, experiments, named, full) if run.name not in tried]:
        failures += results.grid.train(runs, workers)
        tried |= {run.name for run in runs}
    return failures


def chosen_setting(on_gpu: bool, corpus: str | None) -> Setting:
    """Return the setting that the command asks for.

    Raises:
        ValueError: there is no GPU or no corpus for it.
    """
    if on_gpu and (corpus is None or os.environ.get("MEGAMULT_GPUS", "0") == "0"):
        raise ValueError(GPU_NEEDS)
    if corpus is None:
        return small()
    prefix = str(Path(corpus).resolve())
    missing = [
        f"{prefix}{end}" for end in ("_train.bin", "_valid.bin", ".model") if not Path(f"{prefix}{end}").exists()
    ]
    if missing:
        raise ValueError(f"{missing[0]} does not exist: give --corpus the prefix that launch/prepare_data.py wrote")
    return gpu(prefix) if on_gpu else small(prefix)


def prepare(setting: Setting) -> None:
    """Make the default corpus, if the setting reads it.

    Raises:
        ValueError: it could not be made.
    """
    if setting.corpus == DEFAULT_CORPUS and subprocess.run([ROOT / "launch" / "default_corpus.sh"]).returncode:
        raise ValueError("the default corpus could not be made; the reason is above")


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="examples/paper/run.sh", description=__doc__.split("\n")[0])
    made.add_argument("--full", action="store_true", help="also the runs that the package of 90 minutes leaves out")
    made.add_argument("--gpu", action="store_true", help=f"the larger setting. {GPU_NEEDS}")
    made.add_argument("--only", nargs="+", default=[], metavar="NAME", help="experiments, such as E5 (default: all)")
    made.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds of every arm (default: 1 2 3)")
    made.add_argument("--workers", type=int, default=2, help="number of runs side by side, with one thread each (2)")
    made.add_argument("--output", type=Path, default=ROOT / "runs" / "paper", help="directory of results (runs/paper)")
    made.add_argument("--corpus", metavar="PREFIX", help="corpus instead of the State of the Union speeches")
    made.add_argument(
        "--kept",
        type=Path,
        metavar="FILE",
        help="losses of runs, one JSON line for each: runs in it are not trained again where claims need only losses, "
        "and complete runs are added. examples/paper/results has those of this project",
    )
    mode = made.add_mutually_exclusive_group()
    mode.add_argument("--list", action="store_true", help="print number, name and state of every run, and end")
    mode.add_argument(
        "--run", type=int, metavar="N", help="train only run N of --list; SLURM_ARRAY_TASK_ID does the same"
    )
    mode.add_argument("--report", action="store_true", help="train nothing, report on what is there")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    made = _parser()
    chosen = made.parse_args(arguments)
    if chosen.workers < 1 or len(set(chosen.seeds)) != len(chosen.seeds):
        made.error("--workers must be positive, and --seeds all different")
    number: int | None = chosen.run
    if number is None and not (chosen.list or chosen.report) and "SLURM_ARRAY_TASK_ID" in os.environ:
        number = int(os.environ["SLURM_ARRAY_TASK_ID"])
    try:
        setting, experiments = chosen_setting(chosen.gpu, chosen.corpus), chosen_experiments(chosen.only)
        grid = Grid(chosen.output.resolve() / setting.name)
        known = kept.read(chosen.kept) if chosen.kept else {}
        results, named = Results(setting, grid, chosen.seeds, known), bool(chosen.only)
        runs = chosen_runs(results, experiments, named, chosen.full)
        if chosen.list:
            for position, run in enumerate(runs, 1):
                print(f"{position:3d}  {grid.state(run):12s} {run.label}  {run.name}")
            return 0
        if number is not None and not 1 <= number <= len(runs):
            raise ValueError(f"there is no run {number}: --list shows runs 1 to {len(runs)}")
        failures: list[Failure] = []
        if not chosen.report:
            prepare(setting)
            if number is None:
                failures = train(results, experiments, named, chosen.full, chosen.workers)
            else:
                failures = grid.train([runs[number - 1]], chosen.workers)
        if chosen.kept:
            added = kept.add(chosen.kept, grid, chosen_runs(results, experiments, named, chosen.full))
            print(f"{added} {'run' if added == 1 else 'runs'} added to {chosen.kept}")
        if number is None:
            words = shlex.join([made.prog, *(sys.argv[1:] if arguments is None else arguments)])
            name = "-".join(["report", *(each.name.lower() for each in experiments if chosen.only)])
            grid.folder.mkdir(parents=True, exist_ok=True)
            file = grid.folder / f"{name}.md"
            text = report.write(results, experiments, words, file)
            print(f"\n{text}\nwritten: {file}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.USER_ERROR
    except Interrupted:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return exit_codes.RESUME
    for failure in failures:
        print(f"\nerror: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
