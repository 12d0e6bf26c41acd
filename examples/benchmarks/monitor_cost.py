"""Cost of the monitor: seconds of a step with and without its figures.

    python examples/benchmarks/monitor_cost.py
    python examples/benchmarks/monitor_cost.py --implementation folded --optimizer muon
    deepspeed --num_gpus 2 examples/benchmarks/monitor_cost.py --zero 2

One engine takes plain steps and monitored steps in turn. A monitored step includes the hooks, the copy of the weights,
the figures, and writing them to metrics.jsonl and TensorBoard. The difference of the medians, divided by monitor.every,
is what the monitor adds to a step. Default sizes are those of examples/configs/quickstart.yaml on a CPU, and of the
project's target on a GPU.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from engine_runs import batches, parser_of, run_config, setting, table

from megamult.distributed import device, start
from megamult.monitor.writers import Writers
from megamult.train.deepspeed_engine import build
from megamult.train.monitoring import RunMonitor


def main() -> None:
    """Run the command line."""
    parser = parser_of(__doc__, ("none", "layer", "folded"))
    micro = 4 if device.has_cuda() else 1
    parser.add_argument("--accumulation", type=int, default=micro, help="micro-batches per step")
    arguments = parser.parse_args()
    mesh = start.initialize(1)
    config = run_config(arguments, mesh.size, arguments.accumulation)
    engine = build(config, arguments.vocab, mesh)
    monitor = RunMonitor(config, engine.model, engine.partition, engine.optimizer, arguments.vocab)
    seconds: dict[str, list[float]] = {"plain": [], "monitored": []}
    count = 0
    with tempfile.TemporaryDirectory() as folder, Writers(Path(folder), 10**9) as writers:
        for step in range(1, arguments.warmup + arguments.steps + 1):
            for name in seconds if step % 2 else reversed(seconds):
                mesh.barrier()
                began = time.perf_counter()
                if name == "monitored":
                    monitor.begin()
                loss = engine.train_batch(batches(arguments, arguments.accumulation), arguments.accumulation).item()
                if name == "monitored":
                    figures = monitor.figures(step)
                    count = len(figures)
                    if mesh.rank == 0:
                        writers.figures(step, figures)
                assert loss == loss
                if step > arguments.warmup:
                    seconds[name].append(time.perf_counter() - began)
    if mesh.rank == 0:
        every = config.monitor.every
        plain, full = (statistics.median(times) for times in seconds.values())
        print(setting(arguments, engine.parameter_count, arguments.accumulation, mesh.size, f", {count} figures"))
        print(table(seconds))
        print(f"added to a step at monitor.every {every}: {(full - plain) / every / plain:.4%} of {plain:.4f} s")
    start.destroy()


if __name__ == "__main__":
    main()
