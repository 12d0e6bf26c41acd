"""Partition that DeepSpeed would make of a model, on the meta device: without processes, memory or DeepSpeed.

Stand-ins of DeepSpeed's optimizers hold meta tensors of the sizes that DeepSpeed gives them, and the classes of
partitions read them as they read DeepSpeed's. `tests/train/test_startup.py` compares the cuts with those of DeepSpeed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import Parameter

from megamult.distributed.mesh import Mesh
from megamult.parameters.axes import Coordinates, Grid
from megamult.parameters.spec import ParameterSpec
from megamult.parameters.stated import names_of, set_spec
from megamult.zero.bf16 import Bf16Partition
from megamult.zero.flat import Zero12Partition
from megamult.zero.partition import Partition
from megamult.zero.stage3 import Zero3Partition
from megamult.zero.whole import UnfusedPartition, WholePartition

_ALIGNMENT = 2
"""Elements of each rank's part of a flat buffer to a multiple of which DeepSpeed pads it."""
_META = torch.device("meta")


class PlannedModel(torch.nn.Module):
    """Module whose parameters have shapes, dtypes and specs, and no values: one rank's shard of each.

    Args:
        specs: specs of the model's parameters by name.
        tensor: tensor-parallel size.
        dtype: dtype of the model.
    """

    def __init__(self, specs: Mapping[str, ParameterSpec], tensor: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._planned: dict[str, Parameter] = {}
        for name, spec in specs.items():
            shape = spec.local_shape(Grid(tensor=tensor))
            self._planned[name] = parameter = Parameter(torch.empty(shape, dtype=dtype, device=_META))
            set_spec(parameter, spec)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """Yield (name, parameter); names have dots, which torch does not allow in names that it registers."""
        yield from self._planned.items()


@dataclass(frozen=True)
class _Group:
    """Stand-in of the process group along an axis: it has a size and this process's rank, and cannot communicate."""

    ranks: int
    own: int

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.own


def planned_mesh(coordinates: Coordinates) -> Mesh:
    """Return the mesh of a process that does not run. Its groups know their sizes only."""
    data: Any = _Group(coordinates.grid.data, coordinates.data)
    return Mesh(coordinates, {"data": data})


def planned_partition(
    model: PlannedModel, groups: Iterable[Mapping[str, Any]], mesh: Mesh, stage: int, accumulated: torch.dtype
) -> Partition:
    """Return the partition of a rank under DeepSpeed's ZeRO.

    Args:
        model: the model.
        groups: param groups of the optimizer, in their order.
        mesh: mesh of the rank (:func:`planned_mesh`).
        stage: ZeRO stage.
        accumulated: dtype of accumulated gradients.
    """
    names: dict[Parameter, str] = names_of(model)
    members = [list(group["params"]) for group in groups]
    bf16 = next(iter(names)).dtype == torch.bfloat16
    if stage == 0:
        if not bf16:
            return WholePartition([{"params": each} for each in members], names, mesh)
        masters = [[_empty(*parameter.shape) for parameter in each] for each in members]
        return UnfusedPartition(SimpleNamespace(fp16_groups=members, fp32_groups=masters), names, mesh)
    if stage == 3:
        return _stage_3(members, names, mesh)
    data = mesh.size_of("data")
    sizes = [sum(parameter.numel() for parameter in each) for each in members]
    parts = [_empty(math.ceil(size / (_ALIGNMENT * data)) * _ALIGNMENT) for size in sizes]
    common = {"real_dp_process_group": [mesh.groups["data"]] * len(members)}
    if stage == 1 and bf16 and accumulated == torch.float32:
        zero = SimpleNamespace(**common, bf16_groups=members, fp32_groups_flat_partition=parts)
        return Bf16Partition(zero, names, mesh)
    offsets = [[0, *itertools.accumulate(parameter.numel() for parameter in each)][:-1] for each in members]
    zero = SimpleNamespace(
        **common,
        cpu_offload=False,
        single_partition_of_fp32_groups=parts,
        round_robin_bit16_groups=members,
        round_robin_bit16_offsets=offsets,
    )
    return Zero12Partition(zero, names, mesh)


def _stage_3(members: Sequence[Sequence[Parameter]], names: Mapping[Parameter, str], mesh: Mesh) -> Partition:
    """Return the partition of ZeRO 3. Each parameter is cut into equal parts, of which the last may be padding."""
    data = mesh.size_of("data")
    for parameter in itertools.chain(*members):
        size = math.ceil(parameter.numel() / data)
        whole: Any = parameter
        whole.ds_numel, whole.ds_process_group = parameter.numel(), mesh.groups["data"]
        whole.ds_tensor = torch.empty(size, dtype=parameter.dtype, device=_META)
        whole.partition_numel = whole.ds_tensor.numel
    flat = [_empty(sum(parameter.partition_numel() for parameter in each)) for each in members]  # type: ignore[attr-defined]
    zero = SimpleNamespace(
        offload_optimizer=False, offload_param=False, fp16_groups=members, fp32_partitioned_groups_flat=flat
    )
    return Zero3Partition(zero, names, mesh)


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=_META)
