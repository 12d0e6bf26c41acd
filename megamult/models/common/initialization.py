"""Initial weights that do not depend on the sharding. Each rank computes only the elements that it holds.

The value of an element is a function of the seed, the name of the logical tensor and the element's position in it
(:mod:`megamult.models.common.draw`). A rank therefore needs neither whole matrices nor elements of other ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from megamult.models.common import draw
from megamult.parameters.axes import Coordinates
from megamult.parameters.initial import Initial
from megamult.parameters.rectangles import rectangles
from megamult.parameters.roles import Placement
from megamult.parameters.shards import cols_of
from megamult.parameters.spec import Role
from megamult.parameters.stated import named_specs


@torch.no_grad()
def initialize(
    model: torch.nn.Module,
    std: Mapping[Role, float],
    seed: int | None,
    coordinates: Coordinates,
    note: Callable[[str], None] = lambda doing: None,
    placement: Placement | None = None,
    initial: Initial | None = None,
    quantiles: Mapping[str, Callable[[Tensor], Tensor]] = {},
) -> None:
    """Set the elements that this rank holds of every trainable parameter, on the parameter's own device.

    Logical matrices whose role is in `std` are drawn from N(0, std^2), rounded to fp32 and then cast to the parameter's
    dtype. If `initial.divide_weights` is True, their std is divided by the product of their initial multipliers.
    What `quantiles` names is drawn from its distributions. Padding is zero, and so are other biases. Multipliers get
    their initial values, and all other parameters (norms) are set to 1. If `deepspeed.zero.Init` has partitioned a
    parameter, this rank's partition is set, and nothing is gathered.

    Args:
        model: a model whose trainable parameters all have specs.
        std: standard deviations by role of the logical matrix.
        seed: seed of the weights. If None, the elements that would be drawn are NaN until a checkpoint is loaded.
        coordinates: coordinates of this process on the mesh.
        note: function that is called with a text before each parameter is drawn, because large ones take seconds.
        placement: placement of the multipliers in the model; None if it has none.
        initial: initial values of the multipliers; None means ones.
        quantiles: quantile functions of logical tensors that are not drawn from a normal distribution
            (:func:`megamult.models.common.draw.fill_by_quantile`), by the last part of the parameter's name, which
            comes first, or by role.

    Raises:
        ValueError: a parameter has no spec, or DeepSpeed quantizes a parameter's partition or keeps a second partition
            of the parameter within a node.
    """
    initial = initial or Initial()
    for name, parameter, spec in named_specs(model):
        values, start = _held(parameter, name)
        leaf = name.rpartition(".")[2]
        others = {part.role: quantiles.get(leaf) or quantiles.get(part.role) for part in spec.parts}
        if spec.side is not None or not any(part.role in std or others[part.role] for part in spec.parts):
            values.fill_(0.0 if all(part.role == "bias" for part in spec.parts) else 1.0)
            if spec.side is not None:
                for begin, end, value in initial.intervals(spec, coordinates, start, values.numel()):
                    values[begin:end] = value
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
            piece, columns = piece.view(rectangle.height, rectangle.width), cols_of(part.shape)
            if (quantile := others[part.role]) is not None:
                draw.fill_by_quantile(piece, quantile, key, rectangle.row, rectangle.col, columns)
                continue
            drawn_std = std[part.role] * initial.weight_factor(part.role, placement or {})
            draw.fill_normal(piece, drawn_std, key, rectangle.row, rectangle.col, columns)


def _held(parameter: Parameter, name: str) -> tuple[Tensor, int]:
    """Return the elements that this rank holds of a parameter's flattened tensor-parallel shard, and the index of the
    first of these elements within the shard. Under ZeRO 3 a rank holds a piece of the shard, otherwise all of it."""
    partition = getattr(parameter, "ds_tensor", None)
    if partition is None:
        return parameter.detach().view(-1), 0
    if parameter.ds_secondary_tensor is not None or not partition.is_floating_point():  # type: ignore[attr-defined]
        raise ValueError(
            f"DeepSpeed keeps {name} quantized, or keeps a second partition of it within a node: megamult cannot write "
            "initial values to either; remove zero_quantized_weights and zero_hpz_partition_size from "
            "deepspeed.zero_optimization"
        )
    size = partition.numel()
    start = size * parameter.ds_process_group.rank()  # type: ignore[attr-defined]
    length = min(max(parameter.ds_numel - start, 0), size)  # type: ignore[attr-defined]
    return partition.detach().view(-1)[:length], start
