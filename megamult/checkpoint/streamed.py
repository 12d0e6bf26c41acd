"""Write a checkpoint of given weights, with constant multipliers and without optimizer state.

A weight is divided into blocks of rows. The values of a block are asked for only when its file is written, so that
memory does not hold the whole model.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megamult.checkpoint import directory
from megamult.checkpoint.chunks import Chunk
from megamult.checkpoint.info import CheckpointInfo
from megamult.checkpoint.saved import write

BLOCK_BYTES = 256 << 20
"""Maximum bytes of a block in fp32, unless a single row is larger."""


@dataclass(frozen=True)
class Streamed:
    """Weight to write, whose values are computed or read when they are written."""

    name: str
    """Logical name."""
    shape: tuple[int, ...]
    rows: Callable[[int, int], Tensor]
    """Function (start, stop) -> rows [start, stop) in fp32."""


def blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of consecutive blocks of rows, each of at most :data:`BLOCK_BYTES`.

    A row that is larger is a block by itself.
    """
    step = max(1, BLOCK_BYTES // (4 * math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def write_streamed(
    path: Path,
    weights: Iterable[Streamed],
    multipliers: Mapping[str, tuple[int, ...]],
    info: CheckpointInfo,
    files: Mapping[str, bytes],
    doing: str,
    values: Mapping[str, float] = {},
) -> None:
    """Write a checkpoint without optimizer state. Memory holds one file of the checkpoint at a time. If writing fails
    or is interrupted, no part of the new checkpoint is left.

    Args:
        path: path of the checkpoint. An existing checkpoint is replaced.
        weights: all weights of the model.
        multipliers: {logical name: shape} of multipliers.
        info: content of checkpoint.json.
        files: {name: content} of further files.
        doing: label of the progress bar, which counts the bytes of the weights.
        values: {logical name: value} of multipliers that are not 1.

    Raises:
        ValueError, OSError, RuntimeError: writing failed.
    """
    weights = list(weights)
    total = 4 * sum(math.prod(weight.shape) for weight in weights)
    # With disable=None, tqdm draws the bar only on a terminal, so it is not in log files.
    with tqdm(total=total, desc=doing, unit="B", unit_scale=True, disable=None) as bar:
        chunks = [chunk for weight in weights for chunk in _chunks(weight, bar.update)]
        for name, shape in multipliers.items():
            chunks.append(Chunk.whole(f"model.{name}", torch.full(shape, values.get(name, 1.0))))
        try:
            write(path, chunks, info, files)
        finally:
            shutil.rmtree(directory.temporary(path), ignore_errors=True)


def _chunks(weight: Streamed, done: Callable[[int], object]) -> Iterator[Chunk]:
    """Yield a weight as chunks, each of them a block of rows. Loading a chunk calls `done` with its size in bytes."""
    for start, stop in blocks(weight.shape):

        def load(start: int = start, stop: int = stop) -> Tensor:
            values = weight.rows(start, stop)
            done(values.nbytes)
            return values

        rest = weight.shape[1:]
        offsets = (start, *(0 for _ in rest))
        yield Chunk(f"model.{weight.name}", weight.shape, offsets, (stop - start, *rest), load)
