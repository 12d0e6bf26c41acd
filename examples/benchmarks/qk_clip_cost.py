"""Cost of QK-clip: seconds of a step with `multipliers.qk_clip` over those without.

    python examples/benchmarks/qk_clip_cost.py
    python examples/benchmarks/qk_clip_cost.py --seq 1024 --batch 2
    deepspeed --num_gpus 2 examples/benchmarks/qk_clip_cost.py --implementation folded

Two engines of the same model take steps in turn. One measures the attention logits of every micro-batch and clips; the
other does not. Default sizes are those of examples/configs/quickstart.yaml on a CPU, and of the project's target on a
GPU.
"""

from __future__ import annotations

import statistics
import time

from engine_runs import batches, parser_of, run_config, setting, table

from megamult.distributed import start
from megamult.train.deepspeed_engine import build


def main() -> None:
    """Run the command line."""
    parser = parser_of(__doc__, ("layer", "folded"))
    parser.add_argument("--threshold", type=float, default=0.01, help="multipliers.qk_clip; the default clips heads")
    arguments = parser.parse_args()
    mesh = start.initialize(1)
    engines = {
        name: build(run_config(arguments, mesh.size, 1, threshold), arguments.vocab, mesh)
        for name, threshold in (("plain", None), ("QK-clip", arguments.threshold))
    }
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for step in range(arguments.warmup + arguments.steps):
        for name in engines if step % 2 else reversed(engines):
            mesh.barrier()
            began = time.perf_counter()
            loss = engines[name].train_batch(batches(arguments, 1), 1).item()
            figures = engines[name].further_figures
            assert loss == loss and (name == "plain" or step > 0 or figures["qk_clip_heads"] > 0)
            if step >= arguments.warmup:
                seconds[name].append(time.perf_counter() - began)
    if mesh.rank == 0:
        ratio = statistics.median(b / a for a, b in zip(seconds["plain"], seconds["QK-clip"], strict=True))
        print(setting(arguments, engines["plain"].parameter_count, 1, mesh.size))
        print(table(seconds))
        print(f"median of the ratios of neighbouring steps: {ratio:.4f}")
    start.destroy()


if __name__ == "__main__":
    main()
