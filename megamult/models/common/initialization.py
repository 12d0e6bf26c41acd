"""Initial weights that do not depend on the sharding: each rank computes the elements that it holds.

An element's value is a function of the seed, the name of its logical tensor and its position there
(:mod:`megamult.models.common.draw`), so a rank draws nothing that only others hold, and never a whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from megamult.models.common import draw
from megamult.parameters.axes import Coordinates
from megamult.parameters.rectangles import rectangles
from megamult.parameters.spec import Role
from megamult.parameters.stated import named_specs


@torch.no_grad()
def initialize(
    model: torch.nn.Module,
    std: Mapping[Role, float],
    seed: int | None,
    coordinates: Coordinates,
    note: Callable[[str], None] = lambda doing: None,
) -> None:
    """Set this rank's part of every trainable parameter, on the parameter's own device.

    Parts whose role has a `std` are drawn from N(0, std^2), in fp32, then cast; their padding is zero. Everything
    else (norms and multipliers) is 1. Parameters that `deepspeed.zero.Init` has partitioned are set in their
    partitions; nothing is gathered.

    Args:
        model: every trainable parameter has a spec.
        std: standard deviations by role of the logical matrix.
        seed: seed of the weights; None: a checkpoint will be loaded, and until then every element that it must have is
            NaN.
        coordinates: coordinates of this process.
        note: called with a text before each parameter is drawn, as large ones take seconds.

    Raises:
        ValueError: a parameter has no spec, or DeepSpeed keeps its partition quantized or twice.
    """
    for name, parameter, spec in named_specs(model):
        values, start = _held(parameter, name)
        if spec.side is not None or not any(part.role in std for part in spec.parts):
            values.fill_(1.0)
            continue
        note(f"drawing {name}")
        values.zero_()
        for rectangle in rectangles(spec, coordinates, start, values.numel()):
            part = spec.parts[rectangle.part]
            piece = values[rectangle.offset : rectangle.offset + rectangle.numel]
            if seed is None:
                piece.fill_(torch.nan)
                continue
            key = draw.key(seed, spec.logical_name(name, part))
            piece = piece.view(rectangle.height, rectangle.width)
            draw.fill_normal(piece, std[part.role], key, rectangle.row, rectangle.col, part.shape[1])


def _held(parameter: Parameter, name: str) -> tuple[Tensor, int]:
    """Return this rank's flat values of a parameter's tensor-parallel shard, and where in the flat shard they begin."""
    partition = getattr(parameter, "ds_tensor", None)
    if partition is None:
        return parameter.detach().view(-1), 0
    if parameter.ds_secondary_tensor is not None or not partition.is_floating_point():  # type: ignore[attr-defined]
        raise ValueError(
            f"DeepSpeed keeps {name} quantized, or a second time within a node: megamult sets weights in their one "
            "partition; remove zero_quantized_weights and zero_hpz_partition_size from deepspeed.zero_optimization"
        )
    size = partition.numel()
    start = size * parameter.ds_process_group.rank()  # type: ignore[attr-defined]
    length = min(max(parameter.ds_numel - start, 0), size)  # type: ignore[attr-defined]
    return partition.detach().view(-1)[:length], start
