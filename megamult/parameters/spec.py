"""What a parameter is: its logical tensors, its tensor-parallel shard, its kind. Stated once, by the layer.

Megatron stores several logical matrices in one parameter (Q, K and V interleaved per query group, gate and up
in one projection) and shards the fused rows over tensor-parallel (TP) ranks. Everything that needs the logical
matrices (param groups, clipping, saving, later Muon and resharding) reads the :class:`Layout` that the layer
attached to its parameter, and guesses nothing from names or local shapes.

The map is derived from the *global* fused rows, so it stays right where TP exceeds the number of query groups
and a shard cuts through ``[q ... q k v]``.

Pure: no torch.distributed, testable for any number of ranks in one process.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch

Kind = Literal["matrix", "multiplier", "norm", "embedding", "head"]
Role = Literal["q", "k", "v", "attention_out", "gate", "up", "down", "embedding", "head", "norm"]
Side = Literal["row", "col", "scalar"]

MULTIPLIER_ROLES: tuple[Role, ...] = ("q", "k", "v", "attention_out", "gate", "up", "down", "embedding")
"""The roles that can carry multipliers. The head carries none: its column multipliers are the final norm's
weights, and row multipliers there made results worse (arXiv 2601.04890)."""

_ATTRIBUTE = "logical_layout"  # torch.Tensor already has an attribute named `layout`


@dataclass(frozen=True)
class Part:
    """One logical tensor of a parameter: a matrix W[rows, cols], or a vector."""

    name: str
    """Distinguishes the parts of a fused parameter ("q", "gate", ...); empty where there is one part."""
    role: Role
    shape: tuple[int, ...]
    """Global shape, without padding."""


@dataclass(frozen=True)
class Segment:
    """`length` consecutive entries along dim 0, from `start`, are the entries of `part` from `part_start`."""

    start: int
    part: int
    part_start: int
    length: int


@dataclass(frozen=True)
class ParameterSpec:
    """The logical content of one parameter and how tensor parallelism shards it.

    Dim 0 of the global parameter is tiled by `segments` (what no run covers is padding, or belongs to rows that
    carry no multiplier). TP shards dim `tp_dim` as Megatron does: dim 0 is cut into `stride` equal blocks and
    rank p holds the p-th piece of every block; dim 1 is cut evenly.
    """

    kind: Kind
    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    """Global shape, with padding."""
    tp_dim: int | None
    """The dimension that TP shards; None: replicated on every TP rank."""
    segments: tuple[Segment, ...]
    stride: int = 1
    side: Side | None = None
    """For a multiplier: which side of its matrices it scales."""
    compact: bool = False
    """A rank stores the entries of its segments alone, without the gaps between them. The local length is the same
    on every TP rank (the largest that any needs); the entries after a rank's last run are unused."""
    partial_over_tp: bool = False
    """The gradient that backward leaves must still be summed over TP ranks, once per optimizer step."""

    def local_segments(self, tp_rank: int, tp_size: int) -> tuple[Segment, ...]:
        """The segments of the shard of `tp_rank`, with local starts, in local order."""
        return _local_runs(self, tp_rank, tp_size)

    def local_shape(self, tp_size: int) -> tuple[int, ...]:
        """Shape of the shard of one TP rank."""
        if self.compact:
            return (max(sum(run.length for run in self.local_segments(p, tp_size)) for p in range(tp_size)),)
        shape = list(self.shape)
        if self.tp_dim is not None:
            shape[self.tp_dim] //= tp_size
        return tuple(shape)

    def local_columns(self, tp_rank: int, tp_size: int) -> tuple[int, int]:
        """First column and number of columns of a matrix shard."""
        cols = self.shape[1]
        if self.tp_dim != 1:
            return 0, cols
        return tp_rank * (cols // tp_size), cols // tp_size

    def counted_on(self, tp_rank: int) -> bool:
        """Whether this TP rank's copy counts in a sum over ranks: replicas count once."""
        return self.tp_dim is not None or tp_rank == 0

    def logical_name(self, parameter_name: str, part: Part) -> str:
        """Name of a logical tensor: `a.linear_qkv.weight` and part `q` give `a.linear_qkv.q.weight`."""
        if not part.name:
            return parameter_name
        module, _, leaf = parameter_name.rpartition(".")
        return ".".join(filter(None, (module, part.name, leaf)))

    def parts_with(self, sides: dict[Role, frozenset[Side]], side: Side) -> list[int]:
        """Indices of the parts whose role carries multipliers on `side`."""
        return [i for i, part in enumerate(self.parts) if side in sides.get(part.role, frozenset())]

    @cached_property
    def numel_logical(self) -> int:
        """Elements of all logical tensors, without padding."""
        return sum(torch.Size(part.shape).numel() for part in self.parts)


@lru_cache(maxsize=4096)
def _local_runs(spec: ParameterSpec, tp_rank: int, tp_size: int) -> tuple[Segment, ...]:
    if spec.tp_dim != 0:
        pieces = [(0, spec.shape[0], 0)]
    else:
        block = spec.shape[0] // spec.stride
        piece = block // tp_size
        pieces = [(b * block + tp_rank * piece, piece, b * piece) for b in range(spec.stride)]
    segments: list[Segment] = []
    for piece_start, piece_length, local_start in pieces:
        for run in spec.segments:
            start = max(run.start, piece_start)
            stop = min(run.start + run.length, piece_start + piece_length)
            if start < stop:
                segments.append(
                    Segment(
                        local_start + start - piece_start,
                        run.part,
                        run.part_start + start - run.start,
                        stop - start,
                    )
                )
    if spec.compact:
        compacted, position = [], 0
        for run in segments:
            compacted.append(Segment(position, run.part, run.part_start, run.length))
            position += run.length
        segments = compacted
    return tuple(segments)


def set_spec(parameter: torch.nn.Parameter, spec: ParameterSpec) -> None:
    """State on `parameter` what it is, for us and (the `tensor_model_parallel` trio) for Megatron and DeepSpeed."""
    setattr(parameter, _ATTRIBUTE, spec)
    parameter.tensor_model_parallel = spec.tp_dim is not None  # type: ignore[attr-defined]
    parameter.partition_dim = -1 if spec.tp_dim is None else spec.tp_dim  # type: ignore[attr-defined]
    parameter.partition_stride = spec.stride  # type: ignore[attr-defined]


def spec_of(parameter: torch.nn.Parameter, name: str = "a parameter") -> ParameterSpec:
    """The layout stated on `parameter`.

    Raises:
        ValueError: the parameter has none.
    """
    spec = getattr(parameter, _ATTRIBUTE, None)
    if spec is None:
        raise ValueError(
            f"{name} of shape {tuple(getattr(parameter, 'ds_shape', parameter.shape))} states no layout: "
            "build its layer from megamult.layers, or call megamult.parameters.spec.attach(parameter, layout)"
        )
    return spec


def has_spec(tensor: torch.Tensor) -> bool:
    """Whether a layout was attached to it."""
    return hasattr(tensor, _ATTRIBUTE)


def names_of(module: torch.nn.Module) -> dict[torch.nn.Parameter, str]:
    """Name of each trainable parameter."""
    return {parameter: name for name, parameter in module.named_parameters() if parameter.requires_grad}


def check_complete(held: Container[str], names: Iterable[str]) -> None:
    """Every one of `names`, of trainable parameters, is among those `held` by a param group.

    Raises:
        ValueError: one is not.
    """
    missing = [name for name in names if name not in held]
    if missing:
        raise ValueError(
            f"{len(missing)} trainable parameters are in no group, the first is {missing[0]}: it would never be "
            "trained; add it to a group, or set its requires_grad to False"
        )


# ---- layouts of the parameters of a GPT ----------------------------------------------------------------------


def single_matrix(
    role: Role, rows: int, cols: int, tp_dim: int | None, kind: Kind = "matrix", partial_over_tp: bool = False
) -> ParameterSpec:
    """A parameter that is one logical matrix W[rows, cols]. One that TP replicates (`tp_dim` None) has a partial
    gradient where each rank sees a part of the tokens, as under sequence parallelism."""
    part, segments = Part("", role, (rows, cols)), (Segment(0, 0, 0, rows),)
    return ParameterSpec(kind, (part,), (rows, cols), tp_dim, segments, partial_over_tp=partial_over_tp)


def fused_qkv(num_heads: int, num_groups: int, head_dim: int, cols: int) -> ParameterSpec:
    """Megatron's `linear_qkv`: per query group `[q ... q k v]`, heads of `head_dim` rows each."""
    q_rows = num_heads // num_groups * head_dim
    segments: list[Segment] = []
    for group in range(num_groups):
        start = group * (q_rows + 2 * head_dim)
        segments += [
            Segment(start, 0, group * q_rows, q_rows),
            Segment(start + q_rows, 1, group * head_dim, head_dim),
            Segment(start + q_rows + head_dim, 2, group * head_dim, head_dim),
        ]
    kv_rows = num_groups * head_dim
    parts = (
        Part("q", "q", (num_heads * head_dim, cols)),
        Part("k", "k", (kv_rows, cols)),
        Part("v", "v", (kv_rows, cols)),
    )
    return ParameterSpec("matrix", parts, (num_heads * head_dim + 2 * kv_rows, cols), 0, tuple(segments))


def fused_gate_up(ffn_hidden_size: int, cols: int) -> ParameterSpec:
    """Megatron's gated `linear_fc1`: `[gate; up]`, of which TP rank p holds `[gate_p; up_p]` (stride 2)."""
    f = ffn_hidden_size
    parts = (Part("gate", "gate", (f, cols)), Part("up", "up", (f, cols)))
    return ParameterSpec("matrix", parts, (2 * f, cols), 0, (Segment(0, 0, 0, f), Segment(f, 1, 0, f)), stride=2)


def vocabulary(role: Role, vocab_size: int, padded_vocab_size: int, cols: int) -> ParameterSpec:
    """Embedding or head: rows from `vocab_size` on are padding, part of no logical tensor."""
    kind: Kind = "head" if role == "head" else "embedding"
    part = Part("", role, (vocab_size, cols))
    return ParameterSpec(kind, (part,), (padded_vocab_size, cols), 0, (Segment(0, 0, 0, vocab_size),))


def norm(size: int, partial_over_tp: bool) -> ParameterSpec:
    """A norm's weight [size]: replicated; under sequence parallelism each rank sees a part of the tokens."""
    return ParameterSpec(
        "norm", (Part("", "norm", (size,)),), (size,), None, (Segment(0, 0, 0, size),), partial_over_tp=partial_over_tp
    )


# ---- layouts of the multipliers of a matrix parameter --------------------------------------------------------


def row_multiplier(weight: ParameterSpec, selected: Sequence[int], partial_over_tp: bool) -> ParameterSpec:
    """r[rows] of the selected parts of `weight`: sharded where the rows are, in the same order."""
    index = {part: i for i, part in enumerate(selected)}
    return ParameterSpec(
        "multiplier",
        tuple(Part(weight.parts[i].name, weight.parts[i].role, weight.parts[i].shape[:1]) for i in selected),
        weight.shape[:1],
        0 if weight.tp_dim == 0 else None,
        tuple(Segment(r.start, index[r.part], r.part_start, r.length) for r in weight.segments if r.part in index),
        stride=weight.stride,
        side="row",
        compact=True,
        partial_over_tp=partial_over_tp and weight.tp_dim != 0,
    )


def col_multiplier(weight: ParameterSpec, selected: Sequence[int], partial_over_tp: bool) -> ParameterSpec:
    """c[cols] of each selected part of `weight`, one after the other: sharded where the columns are."""
    cols = weight.shape[1]
    return ParameterSpec(
        "multiplier",
        tuple(Part(weight.parts[i].name, weight.parts[i].role, (cols,)) for i in selected),
        (len(selected) * cols,),
        0 if weight.tp_dim == 1 else None,
        tuple(Segment(i * cols, i, 0, cols) for i in range(len(selected))),
        stride=len(selected),
        side="col",
        partial_over_tp=partial_over_tp and weight.tp_dim != 1,
    )


def scalar_multiplier(weight: ParameterSpec, selected: Sequence[int], partial_over_tp: bool) -> ParameterSpec:
    """One scalar per selected part of `weight`, replicated."""
    return ParameterSpec(
        "multiplier",
        tuple(Part(weight.parts[i].name, weight.parts[i].role, (1,)) for i in selected),
        (len(selected),),
        None,
        tuple(Segment(i, i, 0, 1) for i in range(len(selected))),
        side="scalar",
        partial_over_tp=partial_over_tp,
    )


def named_specs(module: torch.nn.Module) -> Iterable[tuple[str, torch.nn.Parameter, ParameterSpec]]:
    """(name, parameter, layout) of every trainable parameter, each once, in the module's order.

    Raises:
        ValueError: a parameter without layout.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield name, parameter, spec_of(parameter, name)
