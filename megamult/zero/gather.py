"""Gather logical tensors (Q, K, V, gate, up ... and multipliers) from all ranks, one at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megamult.parameters.rectangles import rectangles
from megamult.parameters.spec import ParameterSpec, Role, Side
from megamult.parameters.stated import named_specs
from megamult.zero.partition import Partition, Slice


def gather(
    model: torch.nn.Module,
    partition: Partition,
    value: Callable[[int], Tensor] | None = None,
    select: Callable[[ParameterSpec], bool] = lambda spec: True,
) -> Iterator[tuple[str, ParameterSpec, int, Tensor]]:
    """Yield logical tensors that are complete on global rank 0. Collective over all ranks.

    Args:
        model: model whose parameters carry the specs. Results come in the order of its parameters.
        partition: partition of this rank.
        value: function that returns the values to gather for slice i of the partition, [length]; default: the fp32
            master of the slice.
        select: function that takes a parameter's spec and returns whether to gather the parameter. Its answers must be
            the same on all ranks.

    Yields:
        (logical name, spec, index of the part, tensor). The tensor is complete on global rank 0 only. Only the tensors
        of one parameter exist at a time.
    """
    pieces: dict[str, list[tuple[Slice, int]]] = defaultdict(list)
    for i, piece in enumerate(partition.slices):
        pieces[piece.name].append((piece, i))
    mesh = partition.mesh
    replica = not partition.sharded and mesh.rank_on("data") != 0
    for name, parameter, spec in named_specs(model):
        if not select(spec):
            continue
        full = [torch.zeros(part.shape, device=parameter.device) for part in spec.parts]
        for piece, i in pieces[name] if not replica else ():
            source = piece.master if value is None else value(i)
            for r in rectangles(spec, mesh.coordinates, piece.start, piece.length):
                if not r.counted:
                    continue
                target = full[r.part].view(spec.parts[r.part].rows, spec.cols)
                elements = source[r.offset : r.offset + r.numel].view(r.height, r.width)
                target[r.row : r.row + r.height, r.col : r.col + r.width] = elements
        for index, part in enumerate(spec.parts):
            # Each element is held by one rank, and all others add zero to it, so the sum is exact.
            mesh.sum_on_first(full[index])
            yield spec.logical_name(name, part), spec, index, full[index]


@dataclass(frozen=True)
class Logical:
    """One logical tensor of a training run: a weight without its multipliers, or a vector of multipliers."""

    name: str
    kind: str
    """Name of the tensor's param group."""
    role: Role
    side: Side | None
    """Side of a matrix that the tensor scales, or None if the tensor is a weight."""
    tensor: Tensor
    """Value in fp32, complete on global rank 0 only."""


def trained(
    model: torch.nn.Module, partition: Partition, optimizer: Any, kinds: Container[str] | None = None
) -> Iterator[Logical]:
    """Yield every weight and multiplier. Names and values are the same for both implementations of multipliers, layer
    and folded. Collective over all ranks.

    Args:
        model, partition: the same as for :func:`gather`.
        optimizer: the optimizer of this package that trains the model.
        kinds: names of the param groups to yield, or None for all.
    """
    found = gather(
        model,
        partition,
        lambda i: optimizer.weight(partition.slices[i]),
        lambda spec: kinds is None or spec.kind in kinds,
    )
    for name, spec, part, full in found:
        yield Logical(name, spec.kind, spec.parts[part].role, spec.side, full)
    if optimizer.folded is not None and (kinds is None or "multiplier" in kinds):
        for vector in optimizer.folded.vectors:
            values = optimizer.folded.values[vector.entries]
            yield Logical(vector.name, "multiplier", vector.role, vector.side, values)
