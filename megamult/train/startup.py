"""Summary of a run at its start: what will be trained, on what, with what, and where."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

import torch

import megamult
from megamult.config import Config
from megamult.data.config import DataConfig
from megamult.data.dataset import BlendedDataset
from megamult.distributed import device, environment
from megamult.distributed.mesh import Mesh
from megamult.models.architectures import architecture_of
from megamult.monitor import screen
from megamult.optim.ownership import Share
from megamult.train.deepspeed_engine import DeepSpeedEngine
from megamult.train.planning.memory import KINDS, Memory, memory_of
from megamult.train.schedule import Schedule


def memory(config: Config, vocab_size: int, engine: DeepSpeedEngine) -> Memory:
    """Return the memory of the run, of each kind on the rank that needs most of it. Collective over all ranks."""
    zero = engine.settings.get("zero_optimization", {})
    mine = memory_of(config, vocab_size, engine.partition, engine.optimizer, zero, device.has_cuda()).by_kind
    sizes = [mine.get(kind, 0) for kind in KINDS]
    largest = engine.mesh.max_over(torch.tensor(sizes, dtype=torch.float64, device=device.local_device()))
    return Memory({kind: int(size) for kind, size in zip(KINDS, largest.tolist(), strict=True) if size})


def summary(
    config: Config,
    vocab_size: int,
    engine: DeepSpeedEngine,
    samples: BlendedDataset,
    run_dir: Path,
    done: tuple[int, int],
) -> str:
    """Return the lines that say what will run, at most `screen.LINES`. Collective over all ranks; the text is for
    global rank 0, and lacks the versions on others.

    Args:
        vocab_size: exact number of tokens, without padding.
        samples: the training data, at the place from which the run continues.
        done: number of steps and of sequences that earlier starts of the run have trained on.
    """
    train, mesh = config.train, engine.mesh
    held = memory(config, vocab_size, engine)
    owned = engine.optimizer.ownership
    everything = sum(owned.matrices.values(), Share())
    held_in = f"{everything.tensors} matrices and {owned.vectors.tensors} vectors"
    if owned.others.tensors:
        held_in += f" and {owned.others.tensors} tensors of 3 or more dimensions"
    elements = everything.elements + owned.vectors.elements + owned.others.elements
    scaled = f", and {owned.multipliers.elements:,} multipliers ({config.multipliers.implementation})"
    total = Schedule(config).samples_after(done[1], max(0, train.steps - done[0]))
    details = architecture_of(config.model).details(config.model, config.parallel.tensor, train.torch_dtype)
    rows = [
        (
            "model",
            f"{architecture_of(config.model).name}, {config.model.num_layers} layers of width "
            f"{config.model.hidden_size}: {elements:,} parameters in {held_in}"
            + (scaled if owned.multipliers.tensors else "")
            + (f"; {details}" if details else ""),
        ),
        ("optimizer", str(owned)),
        ("learning rate", _schedule(config)),
        ("sharding", _sharding(config, mesh)),
        ("batch", _batch(config, mesh)),
        ("training", _training(config, done, total)),
    ]
    after = [
        ("memory", str(held)),
        ("directory", str(run_dir)),
        ("here", f"{environment.host()}, {_devices(mesh)}"),
        ("versions", _versions() if mesh.rank == 0 else ""),  # asks Git, which one rank is enough for
    ]
    read = _sources(config, samples, done[1], total)
    data = screen.sources(read, screen.LINES - len(rows) - len(after))
    return screen.table([*rows, *zip(["data", *[""] * len(data)], data, strict=False), *after])


def _schedule(config: Config) -> str:
    optimizer, steps = config.optimizer, config.train.steps
    warmup = f" after {optimizer.warmup_steps:,} steps of warm-up" if optimizer.warmup_steps else ""
    parts = [f"{optimizer.lr:g}{warmup}"]
    if optimizer.decay_steps:
        first = steps - optimizer.final_steps - optimizer.decay_steps
        parts.append(f"constant to step {first:,}")
        parts.append(f"{optimizer.decay} to {optimizer.min_lr:g} in {optimizer.decay_steps:,} steps")
    else:
        parts.append(f"constant to step {steps:,}")
    if optimizer.final_steps:
        parts.append(f"constant for {optimizer.final_steps:,}")
    return ", ".join(parts)


def _sharding(config: Config, mesh: Mesh) -> str:
    processes = "1 process" if mesh.size == 1 else f"{mesh.size} processes"
    sequence = ", sequence parallel" if config.parallel.sequence else ""
    return (
        f"{processes} (tensor parallel {config.parallel.tensor}, data parallel {mesh.size_of('data')}), ZeRO "
        f"{config.parallel.zero_stage}, {config.train.dtype}, gradients in {config.train.accumulation_dtype}{sequence}"
    )


def _batch(config: Config, mesh: Mesh) -> str:
    train, data = config.train, mesh.size_of("data")
    text = (
        f"{train.global_batch_size} sequences of {config.model.seq_length:,} tokens = micro-batch "
        f"{train.micro_batch_size} x accumulation {config.accumulation(data)} x data parallel {data}"
    )
    ramp = train.batch_ramp
    return text if ramp.start is None else f"{text}; {ramp.start} at the start, growing for {ramp.samples:,} sequences"


def _training(config: Config, done: tuple[int, int], total: int) -> str:
    """Return the text about steps and tokens: those of the whole run, or what is left of it."""
    steps, length = config.train.steps, config.model.seq_length
    if done[0] == 0:
        return f"{steps:,} steps, {total * length:,} tokens"
    left = max(0, steps - done[0])
    return f"{left:,} of {steps:,} steps, {(total - done[1]) * length:,} of {total * length:,} tokens, are left"


def _sources(config: Config, samples: BlendedDataset, read: int, total: int) -> list[tuple[str, int, float]]:
    """Return (prefix, tokens, epochs) that the run takes from each source, in all of its starts."""
    prefixes = [prefix for prefix, _ in DataConfig.sources(config.data.train)]
    counts = samples.samples_read(max(read, total))
    each = zip(prefixes, counts, samples.samples_per_epoch, strict=True)
    return [(prefix, count * config.model.seq_length, count / epoch) for prefix, count, epoch in each]


def _devices(mesh: Mesh) -> str:
    name = torch.cuda.get_device_name() if device.has_cuda() else f"CPU (threads: {torch.get_num_threads()})"
    return name if mesh.size == 1 else f"{mesh.size} x {name}"


def _versions() -> str:
    """Return the versions of megamult and what it stands on, with the commit if megamult is in a Git repository."""
    names = ("torch", "deepspeed", "megatron-core")
    ours = f"megamult {megamult.__version__}"
    if commit := _commit():
        ours += f" ({commit})"
    return ", ".join([ours, *(f"{name} {_version(name)}" for name in names)])


def _version(name: str) -> str:
    """Return the version of a package; "unknown" if it is not installed as one, but found on PYTHONPATH."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _commit() -> str | None:
    """Return the commit of the Git repository that has megamult's files, or None if there is none, or no Git."""
    here = Path(megamult.__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty=, changed", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
        tracked = subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() if tracked.returncode == 0 else None  # not that of a folder with an environment in it
