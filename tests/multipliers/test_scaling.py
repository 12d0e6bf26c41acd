"""Bands of pieces: every element is scaled by what its place in its logical matrix says, in few bands."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megamult.multipliers import scaling
from megamult.multipliers.scaling import PackedScaling, bands
from megamult.parameters import megatron
from megamult.parameters.axes import Grid, tensor_shard
from megamult.parameters.rectangles import rectangles
from megamult.parameters.spec import ParameterSpec, Segment, Side

QKV = megatron.fused_qkv(32, 16, 4, 24)  # 16 groups of [q q k v]
LAYOUTS = {
    "qkv": QKV,
    "gate_up": megatron.fused_gate_up(40, 24),
    "down": megatron.single_matrix("down", 24, 40, 1),
    "embedding": megatron.vocabulary("embedding", 29, 32, 24),
}
Places = dict[tuple[int, Side], list[Segment]]


def packed(stated: ParameterSpec, sides: dict[int, tuple[Side, ...]]) -> tuple[Places, Tensor]:
    """Random multipliers of some sides of some parts, one after the other, and 1."""
    places: Places = {}
    position = 0
    for part, of_part in sides.items():
        rows, cols = stated.parts[part].shape
        for side in of_part:
            length = {"row": rows, "col": cols, "scalar": 1}[side]
            places[part, side] = [Segment(position, part, 0, length)]
            position += length
    values = torch.randn(position, generator=torch.Generator().manual_seed(1))
    return places, torch.cat([values, torch.ones(1)])


SIDES: list[tuple[Side, ...]] = [("row", "col", "scalar"), ("row",), ("col",), ("scalar",), ()]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("elements", [1 << 20, 100])
def test_every_element_is_scaled_by_its_row_its_column_and_its_scalar(
    name: str, tensor: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scaling._ELEMENTS, "cpu", elements)
    stated = LAYOUTS[name]
    numel = torch.Size(stated.local_shape(Grid(tensor=tensor))).numel()
    cuts = [(0, numel), (5, numel - 9), (24 * 3 + 1, 20), (24 * 7, 24 * 20 + 3)]
    parts = range(len(stated.parts))
    for given, (start, length) in itertools.product(itertools.product(SIDES, repeat=len(parts)), cuts):
        places, values = packed(stated, dict(zip(parts, given, strict=True)))
        for tp_rank in range(tensor):
            found = rectangles(stated, tensor_shard(tp_rank, tensor), start, length)
            wanted, actual = torch.ones(2, length)
            for r in found:
                held = {side: places[r.part, side][0] for side in given[r.part]}
                of_part = {side: values[each.start : each.start + each.length] for side, each in held.items()}
                factor = torch.ones(r.height, r.width)
                if "row" in of_part:
                    factor = of_part["row"][r.row : r.row + r.height, None] * factor
                if "scalar" in of_part:
                    factor = factor * of_part["scalar"]
                if "col" in of_part:
                    factor = factor * of_part["col"][r.col : r.col + r.width]
                wanted[r.offset : r.offset + r.numel] = factor.view(-1)
            packed_scaling = PackedScaling(bands(found, places, len(values) - 1, "cpu"), torch.device("cpu"))
            factors = packed_scaling.factors(values)
            scalars = factors.scalar.split([band.height for band in packed_scaling.bands])
            for band, scalar, (rho, kappa) in zip(packed_scaling.bands, scalars, factors.bands, strict=True):
                assert band.height == 1 or band.height * band.width <= elements
                if band.scalars is not None:  # what sums are added to, and of which rows
                    entries, members = band.scalars
                    assert len(entries.unique()) == len(entries) and (values[entries] != 1).all()
                    rest = 1 - members.sum(0)
                    torch.testing.assert_close(scalar, values[entries] @ members + rest, rtol=0, atol=0)
                here = band.of(actual)
                for span in band.spans:
                    if kappa is not None and span.col is not None:
                        here[span.start : span.stop] *= kappa[span.col]
                if rho is not None:
                    here *= rho[:, None]
            torch.testing.assert_close(actual, wanted, rtol=3e-7, atol=0)  # two products


def test_an_interleaved_parameter_is_one_band() -> None:
    places, values = packed(QKV, {0: ("row", "col"), 1: ("row", "col"), 2: ("row", "col")})
    whole = rectangles(QKV, tensor_shard(0, 1), 0, 16 * 16 * 24)
    assert len(whole) == 48
    (band,) = bands(whole, places, len(values) - 1, "cpu")
    assert (band.height, band.width, len(band.spans)) == (256, 24, 48)
    # A cut within a row leaves its end, the whole rows, and the next row's beginning.
    found = rectangles(QKV, tensor_shard(0, 1), 5, 24 * 100)
    assert [b.height for b in bands(found, places, len(values) - 1, "cpu")] == [1, 99, 1]


def test_what_nothing_scales_is_no_band() -> None:
    places, values = packed(QKV, {})
    assert bands(rectangles(QKV, tensor_shard(0, 1), 0, 24 * 256), places, len(values) - 1, "cpu") == []
