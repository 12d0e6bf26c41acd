"""Dense float64 layers, and which entries of them each tensor-parallel rank holds, written without ParameterSpec.

A case is one layer in one setting. Its logical matrices, multipliers, inputs and output gradients are a function of
the layer and the placement alone, so all tensor-parallel sizes run the same numbers.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megamult.multipliers.reference import effective_weight, gradients

SEQ, BATCH = 8, 3
HEADS, GROUPS, HIDDEN, HEAD_DIM = 12, 2, 96, 8  # 16 fused rows [q*6 k v] * 8 a group: tensor parallel 4 cuts groups
FFN = 60
VOCAB, PADDED_VOCAB = 50, 64

PARTS: dict[str, dict[str, int]] = {
    "column": {"": 72},
    "row": {"": 28},
    "embedding": {"": VOCAB},
    "qkv": {"q": HEADS * HEAD_DIM, "k": GROUPS * HEAD_DIM, "v": GROUPS * HEAD_DIM},
    "gate_up": {"gate": FFN, "up": FFN},
}
"""Rows of each layer's logical matrices."""
COLUMNS = {"column": 40, "row": 72, "embedding": 20, "qkv": HIDDEN, "gate_up": HIDDEN}
ROLE = {"column": "up", "row": "down", "embedding": "embedding"}
"""The role of a single matrix; in a fused one the roles are the parts' names."""

_SINGLE: dict[str, dict[str, str | tuple[str, ...]]] = {"r": {"": "row"}, "c": {"": "col"}, "s": {"": "scalar"}}
_SINGLE["rcs"] = {"": ("row", "col", "scalar")}
PLACEMENTS: dict[str, dict[str, dict[str, str | tuple[str, ...]]]] = {
    "column": _SINGLE,
    "row": _SINGLE,
    "embedding": _SINGLE,
    "qkv": {
        "all": dict.fromkeys("qkv", ("row", "col")),
        "scalar": dict.fromkeys("qkv", "scalar"),
        "rcs": dict.fromkeys("qkv", ("row", "col", "scalar")),
        "symmetry_free": {"q": "row"},
        "mixed": {"q": "row", "v": ("row", "col"), "k": "scalar"},
        "crossed": {"k": "col", "q": ("col", "scalar")},
    },
    "gate_up": {
        "all": dict.fromkeys(("gate", "up"), ("row", "col")),
        "scalar": dict.fromkeys(("gate", "up"), "scalar"),
        "symmetry_free": {"gate": "row"},
        "crossed": {"gate": "col", "up": ("row", "scalar")},
    },
}
"""Sides by part."""


@dataclass(frozen=True)
class LayerCase:
    """One layer in one setting."""

    layer: str
    placement: str
    tensor: int
    sequence: bool
    grad_sync: str

    def __str__(self) -> str:
        sequence = "-sp" if self.sequence else ""
        return f"{self.layer}-{self.placement}-tp{self.tensor}{sequence}-{self.grad_sync}"

    @property
    def has_bias(self) -> bool:
        """The embedding has none."""
        return self.layer != "embedding"

    def sides(self, part: str) -> list[str]:
        """The sides on which a part is scaled."""
        sides = PLACEMENTS[self.layer][self.placement].get(part, ())
        return [sides] if isinstance(sides, str) else list(sides)

    def scaled(self, side: str) -> list[str]:
        """The parts scaled on a side, in the parameter's order."""
        return [part for part in PARTS[self.layer] if side in self.sides(part)]

    def megamult_placement(self) -> dict[Any, frozenset[Any]]:
        """The placement as the layers take it."""
        roles = {part: ROLE.get(self.layer, part) for part in PARTS[self.layer]}
        return {roles[part]: frozenset(self.sides(part)) for part in roles if self.sides(part)}


SETTINGS = [(1, False), (2, False), (2, True), (4, False), (4, True)]
"""(tensor parallel, sequence parallel)"""

CASES = [
    LayerCase(layer, placement, tensor, sequence, grad_sync)
    for tensor, sequence in SETTINGS
    for layer, placements in PLACEMENTS.items()
    for placement in placements
    for grad_sync in ("backward", "step")
]


@dataclass(frozen=True)
class Data:
    """Logical matrices [rows, cols] and multipliers by part, and what goes in at both ends of the layer."""

    weight: dict[str, Tensor]
    row: dict[str, Tensor]
    col: dict[str, Tensor]
    scalar: dict[str, Tensor]
    bias: dict[str, Tensor]
    x: Tensor
    """[seq, batch, in], or ids [batch, seq]."""
    dy: dict[str, Tensor]
    """By part: [seq, batch, rows]; embedding: [seq, batch, hidden]."""

    def magnitudes(self) -> Data:
        """The same with absolute values: running the dense layer on it gives the sum of each result's |terms|."""
        by_part = {
            name: {part: tensor.abs() for part, tensor in getattr(self, name).items()}
            for name in ("weight", "row", "col", "scalar", "bias", "dy")
        }
        return Data(**by_part, x=self.x.abs())


def draw(case: LayerCase) -> Data:
    """The case's numbers: fp32 values, multipliers on both sides of zero and exactly zero."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case.layer} {case.placement}".encode()))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def multiplier(size: int) -> Tensor:
        values = normal(size)
        values[1] = 0.0
        return values

    parts, cols = PARTS[case.layer], COLUMNS[case.layer]
    embedding = case.layer == "embedding"
    return Data(
        weight={part: normal(rows, cols) for part, rows in parts.items()},
        row={part: multiplier(parts[part]) for part in case.scaled("row")},
        col={part: multiplier(cols) for part in case.scaled("col")},
        scalar={part: torch.tensor([0.0 if part == "k" else float(normal(1))]) for part in case.scaled("scalar")},
        bias={part: normal(rows) for part, rows in parts.items() if case.has_bias},
        x=torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator) if embedding else normal(SEQ, BATCH, cols),
        dy={part: normal(SEQ, BATCH, cols if embedding else rows) for part, rows in parts.items()},
    )


@dataclass(frozen=True)
class Dense:
    """What the layer computes, whole, by part: outputs and the gradients of everything."""

    y: dict[str, Tensor]
    dx: Tensor | None
    weight: dict[str, Tensor]
    row: dict[str, Tensor]
    col: dict[str, Tensor]
    scalar: dict[str, Tensor]
    bias: dict[str, Tensor]


def dense(data: Data) -> Dense:
    """The layer in float64: y = W_eff x + b, G = dL/dW_eff, and the four equations of METHOD.md on G."""
    y, dx, grads = {}, None, {}
    for part, weight in data.weight.items():
        multipliers = {
            side: getattr(data, side)[part].double() for side in ("row", "col", "scalar") if part in getattr(data, side)
        }
        effective = effective_weight(weight.double(), **multipliers)
        dy = data.dy[part].double()
        if data.x.is_floating_point():
            x = data.x.double()
            y[part] = x @ effective.t() + data.bias[part].double()
            upstream = torch.einsum("sbo,sbi->oi", dy, x)
            dx = dy @ effective if dx is None else dx + dy @ effective
        else:
            ids = data.x.t()
            y[part] = effective[ids]
            upstream = torch.zeros_like(effective).index_add_(0, ids.reshape(-1), dy.reshape(-1, dy.shape[-1]))
        grads[part] = gradients(upstream, weight.double(), **multipliers)
    by_side = {side: {p: getattr(g, side) for p, g in grads.items()} for side in ("weight", "row", "col", "scalar")}
    bias = {part: data.dy[part].double().sum((0, 1)) for part in data.bias}
    return Dense(y=y, dx=dx, bias=bias, **by_side)


def qkv_rows(heads: int, groups: int, head_dim: int) -> list[tuple[str, int]]:
    """(part, row) of each global fused row of `linear_qkv`: per query group [q ... q k v]."""
    fused = []
    for group in range(groups):
        per_group = heads // groups * head_dim
        fused += [("q", group * per_group + i) for i in range(per_group)]
        fused += [(part, group * head_dim + i) for part in "kv" for i in range(head_dim)]
    return fused


def gate_up_rows(ffn: int, rank: int, tensor: int) -> list[tuple[str, int]]:
    """(part, row) of each local row of a gated `linear_fc1`: [gate_p; up_p]."""
    piece = ffn // tensor
    return [(part, rank * piece + i) for part in ("gate", "up") for i in range(piece)]


def local_rows(case: LayerCase, rank: int) -> list[tuple[str, int] | None]:
    """(part, row) of each row of a rank's weight; None: padding."""
    if case.layer == "row":
        return [("", i) for i in range(PARTS["row"][""])]
    if case.layer == "gate_up":
        return [*gate_up_rows(FFN, rank, case.tensor)]
    whole: list[tuple[str, int] | None]
    if case.layer == "qkv":
        whole = [*qkv_rows(HEADS, GROUPS, HEAD_DIM)]
    else:
        rows = PARTS[case.layer][""]
        whole = [("", i) for i in range(rows)] + [None] * (PADDED_VOCAB - VOCAB if case.layer == "embedding" else 0)
    piece = len(whole) // case.tensor
    return whole[rank * piece : (rank + 1) * piece]


def local_columns(case: LayerCase, rank: int) -> slice:
    """The columns of a rank's weight."""
    if case.layer != "row":
        return slice(None)
    piece = COLUMNS["row"] // case.tensor
    return slice(rank * piece, (rank + 1) * piece)


def local_tokens(case: LayerCase, rank: int) -> slice:
    """The sequence positions of a rank under sequence parallelism."""
    if not case.sequence:
        return slice(None)
    piece = SEQ // case.tensor
    return slice(rank * piece, (rank + 1) * piece)


def shard(case: LayerCase, rank: int, whole: Data | Dense, unused: float) -> dict[str, Tensor]:
    """A rank's parameters, or their gradients, from the whole ones: `weight`, `bias` and the `*_multiplier`.

    Row multipliers follow each other in the order of the local weight's rows and fill the length that the fullest
    rank needs: what is left over is `unused`, as is padding of the weight.
    """
    rows, columns = local_rows(case, rank), local_columns(case, rank)
    padding = torch.zeros_like(next(iter(whole.weight.values()))[0, columns])
    result = {"weight": torch.stack([padding if r is None else whole.weight[r[0]][r[1], columns] for r in rows])}
    if case.has_bias:
        result["bias"] = torch.stack([whole.bias[r[0]][r[1]] for r in rows if r is not None])
    if case.scaled("row"):

        def chosen(rank: int) -> list[Tensor]:
            held = (r for r in local_rows(case, rank) if r is not None)
            return [whole.row[part][i] for part, i in held if part in case.scaled("row")]

        length = max(len(chosen(other)) for other in range(case.tensor))
        mine = chosen(rank)
        result["row_multiplier"] = torch.stack(mine + [torch.full_like(mine[0], unused)] * (length - len(mine)))
    if case.scaled("col"):
        result["col_multiplier"] = torch.cat([whole.col[part][columns] for part in case.scaled("col")])
    if case.scaled("scalar"):
        result["scalar_multiplier"] = torch.cat([whole.scalar[part].reshape(1) for part in case.scaled("scalar")])
    return result


def local_input(case: LayerCase, rank: int, x: Tensor) -> Tensor:
    """What a rank feeds its layer (and the shape of the input's gradient there)."""
    if case.layer == "embedding":
        return x
    if case.layer == "row":
        return x[..., local_columns(case, rank)]
    return x[local_tokens(case, rank)]


def local_output(case: LayerCase, rank: int, y: dict[str, Tensor]) -> Tensor:
    """What a rank's layer puts out, of the whole output by part."""
    if case.layer == "embedding":
        whole = y[""][local_tokens(case, rank)]
        return whole if case.sequence else whole.transpose(0, 1)
    if case.layer == "row":
        return y[""][local_tokens(case, rank)]
    return torch.stack([y[r[0]][..., r[1]] for r in local_rows(case, rank) if r is not None], dim=-1)
