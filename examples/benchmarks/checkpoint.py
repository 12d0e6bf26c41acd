"""Costs of a checkpoint: the time for which training stops, bytes, memory, and the time to load it again.

    deepspeed --num_gpus 2 examples/benchmarks/checkpoint.py

One engine (200 million parameters, ZeRO 2, AdamW: three fp32 tensors per parameter) trains one step, so that there is
optimizer state. Then it saves synchronously and asynchronously in turn. A training step runs while an asynchronous save
is written. Figures are those of the slowest rank, as medians over the repetitions.

Memory is the growth of the process's private memory (RssAnon), sampled every 5 ms: its peak during a save or load,
minus its value before. It is compared with the largest share of the state that a rank has. Bytes written are the sizes
of the files in the checkpoint directory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megamult.checkpoint import resume
from megamult.checkpoint.config import CheckpointConfig
from megamult.checkpoint.saved import SavedCheckpoint
from megamult.checkpoint.state import owned
from megamult.config import Config
from megamult.distributed import device, start
from megamult.distributed.config import ParallelConfig
from megamult.models.llama.config import ModelConfig
from megamult.optim.config import OptimizerConfig
from megamult.train.checkpoints import RunCheckpoints
from megamult.train.config import TrainConfig
from megamult.train.deepspeed_engine import DeepSpeedEngine, build

VOCAB = 32_768


class Memory:
    """Growth of this process's memory within :meth:`watched`, from its value before to its peak, in bytes."""

    def __init__(self) -> None:
        self.extra = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Sample the memory while the context is entered."""
        before, done = _anonymous(), threading.Event()
        self.extra = 0

        def sample() -> None:
            while not done.wait(0.005):
                self.extra = max(self.extra, _anonymous() - before)

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this benchmark needs Linux")


def slowest(value: float) -> float:
    """Return the largest of the ranks' numbers."""
    there = torch.tensor(value, dtype=torch.float64, device=device.local_device())
    torch.distributed.all_reduce(there, torch.distributed.ReduceOp.MAX)
    return there.item()


def total(value: float) -> float:
    """Return the sum of the ranks' numbers."""
    there = torch.tensor(value, dtype=torch.float64, device=device.local_device())
    torch.distributed.all_reduce(there)
    return there.item()


def configuration(arguments: argparse.Namespace) -> Config:
    """Return the configuration of a run of the benchmark's model."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return Config(
        model=ModelConfig(
            num_layers=arguments.layers,
            hidden_size=arguments.hidden,
            num_attention_heads=arguments.hidden // 64,
            ffn_hidden_size=arguments.ffn,
            seq_length=64,
        ),
        optimizer=OptimizerConfig(name=arguments.optimizer, lr=1e-4),
        parallel=ParallelConfig(tensor=arguments.tensor, zero_stage=arguments.zero),
        train=TrainConfig(
            global_batch_size=processes // arguments.tensor, micro_batch_size=1, dtype=arguments.dtype, steps=1000
        ),
    )


def train_step(engine: DeepSpeedEngine) -> float:
    """Take one training step; return its seconds."""
    text = torch.randint(0, VOCAB, (1, 65), generator=torch.Generator().manual_seed(0)).to(device.local_device())
    began = time.perf_counter()
    objective, _ = engine.deepspeed(text[:, :-1].contiguous(), text[:, 1:].contiguous())
    engine.deepspeed.backward(objective)
    engine.deepspeed.step()
    if device.has_cuda():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def saves(engine: DeepSpeedEngine, config: Config, folder: Path, repeats: int) -> dict[str, list[float]]:
    """Save several times in both ways; return the seconds and bytes of every save, as one list per figure."""
    memory = Memory()
    found: dict[str, list[float]] = {}

    def note(key: str, value: float) -> None:
        found.setdefault(key, []).append(slowest(value))

    savers = {}
    for asynchronous in (False, True):
        config.checkpoint = CheckpointConfig(keep=1, asynchronous=asynchronous)
        savers[asynchronous] = RunCheckpoints(folder / str(asynchronous), config, VOCAB, engine.mesh)
    for repeat in range(repeats + 1):  # the first save of each is a warm-up: it allocates the memory for copies
        for asynchronous, saver in savers.items():
            torch.distributed.barrier()
            kind = ("asynchronous" if asynchronous else "synchronous") + (", the first" if repeat == 0 else "")
            with memory.watched():
                outcome = saver.save(engine, repeat + 1, 0, None, {})
                if asynchronous:
                    note(f"step while saving{', the first' if repeat == 0 else ''}", train_step(engine))
                    outcome = saver.wait()
            assert outcome is not None and outcome.error is None, outcome
            note(f"{kind}: stall", outcome.stall_seconds)
            note(f"{kind}: until complete", outcome.seconds)
            note(f"{kind}: extra memory", memory.extra)
    return found


def load(engine: DeepSpeedEngine, path: Path) -> dict[str, float]:
    """Load a checkpoint; return the seconds that verification and reading take, and the extra memory in bytes."""
    memory = Memory()
    torch.distributed.barrier()
    with memory.watched():
        began = time.perf_counter()
        checkpoint = SavedCheckpoint(path)
        checkpoint.verify((torch.distributed.get_rank(), torch.distributed.get_world_size()))
        torch.distributed.barrier()
        verified = time.perf_counter()
        resume.restore(checkpoint, engine.partition, engine.optimizer)
        read = time.perf_counter()
    return {
        "verify": slowest(verified - began),
        "read": slowest(read - verified),
        "extra memory": slowest(memory.extra),
    }


def main() -> None:
    """Print the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--hidden", type=int, default=1024)
    made.add_argument("--ffn", type=int, default=2816)
    made.add_argument("--layers", type=int, default=11)
    made.add_argument("--tensor", type=int, default=1)
    made.add_argument("--zero", type=int, default=2)
    made.add_argument("--optimizer", default="adamw")
    made.add_argument("--dtype", default="fp32")
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--folder", default=None, help="where to write; default: a temporary directory")
    made.add_argument("--local_rank", type=int, default=None, help="set by the launcher")
    arguments = made.parse_args()
    config = configuration(arguments)
    engine = build(config, VOCAB, start.initialize(arguments.tensor))
    main_rank = torch.distributed.get_rank() == 0
    train_step(engine)
    share = sum(chunk.nbytes for chunk in owned(engine.partition, engine.optimizer))
    state, largest = total(share), slowest(share)
    chosen = [tempfile.mkdtemp(dir=arguments.folder) if main_rank else ""]
    torch.distributed.broadcast_object_list(chosen, src=0)
    folder = Path(chosen[0])
    try:
        figures = saves(engine, config, folder, arguments.repeats)
        usual = min(train_step(engine) for _ in range(2))
        (path,) = (folder / "True" / "checkpoints").glob("step_*")
        written = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        loaded = load(engine, path)
    finally:
        torch.distributed.barrier()
        if main_rank:
            shutil.rmtree(folder)
    if main_rank:
        report(engine, figures, loaded, state, largest, written, usual)
    torch.distributed.barrier()
    start.destroy()


def report(
    engine: DeepSpeedEngine,
    figures: dict[str, list[float]],
    loaded: dict[str, float],
    state: float,
    share: float,
    written: int,
    usual: float,
) -> None:
    """Print the median and range of every figure."""
    gigabyte = 1e9
    print(
        f"{engine.parameter_count:,} parameters, {torch.distributed.get_world_size()} processes; state "
        f"{state / gigabyte:.3f} GB, {share / gigabyte:.3f} on the rank with most; written {written / gigabyte:.3f} GB "
        f"= {written / state:.4f} of it"
    )
    for key, values in figures.items():
        middle = statistics.median(values)
        if "memory" in key:
            print(f"{key:42s} {middle / gigabyte:8.3f} GB = {middle / share:.3f} of the share")
        else:
            print(f"{key:42s} {middle:8.3f} s  ({min(values):.3f} to {max(values):.3f})")
    stall, whole = (statistics.median(figures[f"{kind}: stall"]) for kind in ("asynchronous", "synchronous"))
    print(
        f"stall of an asynchronous save over a synchronous one's time: {stall / whole:.4f}; a step takes {usual:.3f} s"
    )
    print(
        f"load: {loaded['verify']:.3f} s to verify checksums, {loaded['read']:.3f} s to read, extra memory "
        f"{loaded['extra memory'] / gigabyte:.3f} GB"
    )


if __name__ == "__main__":
    main()
