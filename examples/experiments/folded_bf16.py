"""Does folding lose accuracy in bf16? Runs of `folded` at ZeRO 1, 2 and 3, and runs of `layer`, with three seeds.

    python examples/experiments/folded_bf16.py [--steps 200] [-- further keys of launch/pretrain.py]

Every run is `examples/configs/tiny.yaml` in bf16 on two data-parallel processes. The program prints a table of valid
losses. For each stage it prints the difference of the means, and the spread of `layer` over the seeds. Runs that are
complete in --output are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SEEDS = (1, 2, 3)
RUNS = [("layer", 1), ("layer", 3), ("folded", 1), ("folded", 2), ("folded", 3)]
"""(implementation, ZeRO stage) of each set of runs. ZeRO 2 sums in the same order as ZeRO 1, but ZeRO 3 sums in another
order, so `folded` at ZeRO 3 is compared with `layer` at ZeRO 3."""


def valid_loss(run_dir: Path) -> float | None:
    """Return the last valid loss of a run, or None if the run is not complete."""
    metrics = run_dir / "metrics.jsonl"
    if not (run_dir / "complete").exists():
        return None
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [record["valid_loss"] for record in records if "valid_loss" in record][-1]


def train(run_dir: Path, implementation: str, zero: int, seed: int, steps: int, further: list[str]) -> float:
    """Train one run unless it is complete; return its valid loss."""
    found = valid_loss(run_dir)
    if found is not None:
        return found
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    keys = {
        "config": "examples/configs/tiny.yaml",
        "multipliers.implementation": implementation,
        "parallel.zero_stage": str(zero),
        "train.dtype": "bf16",
        "train.seed": str(seed),
        "train.steps": str(steps),
        "train.run_dir": str(run_dir),
        "train.log_histograms_every": "0",
        "checkpoint.load": "latest",
    }
    arguments = [part for key, value in keys.items() for part in (f"--{key}", value)]
    command = [launcher, "--num_gpus", "2", "launch/pretrain.py", *arguments, *further]
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with run_dir.with_suffix(".log").open("w", encoding="utf-8") as log:
        subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=subprocess.STDOUT)
    (run_dir / "complete").touch()
    found = valid_loss(run_dir)
    assert found is not None
    return found


def main() -> None:
    """Train the runs that are not complete, and print the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--steps", type=int, default=200)
    made.add_argument("--output", type=Path, default=ROOT / "runs" / "folded_bf16")
    made.add_argument("further", nargs="*", help="keys of launch/pretrain.py, after --")
    chosen = made.parse_args()
    losses: dict[tuple[str, int], list[float]] = {}
    for implementation, zero in RUNS:
        losses[implementation, zero] = [
            train(
                chosen.output.resolve() / f"{implementation}_zero{zero}_seed{seed}",
                implementation,
                zero,
                seed,
                chosen.steps,
                chosen.further,
            )
            for seed in SEEDS
        ]
        print(implementation, zero, losses[implementation, zero], flush=True)
    print("\n| | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " | mean | largest - smallest |")
    print("|---|" + "---|" * (len(SEEDS) + 2))
    for (implementation, zero), values in losses.items():
        shown = " | ".join(f"{value:.4f}" for value in values)
        spread = max(values) - min(values)
        print(f"| {implementation}, ZeRO {zero} | {shown} | {statistics.mean(values):.4f} | {spread:.4f} |")
    for zero in (1, 2, 3):
        layer, folded = losses["layer", 3 if zero == 3 else 1], losses["folded", zero]
        gap = statistics.mean(folded) - statistics.mean(layer)
        print(f"ZeRO {zero}: mean of folded - mean of layer {gap:+.4f}; spread of layer {max(layer) - min(layer):.4f}")


if __name__ == "__main__":
    main()
