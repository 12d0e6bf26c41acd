"""Shards of every process tile every logical tensor exactly once; what a process holds is what a plain cut gives it.

The references here cut whole arrays by hand, from sizes alone: they use neither specs nor rectangles.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megamult.parameters import megatron
from megamult.parameters.axes import Coordinates, Grid
from megamult.parameters.rectangles import boxes, counted_intervals, rectangles
from megamult.parameters.roles import Role, register
from megamult.parameters.shards import Block, Sharding
from megamult.parameters.spec import ParameterSpec, Part, Segment

Array = NDArray[np.int64]

for name in ("z", "x", "B", "C", "dt", "conv", "head_vector"):
    register(Role(f"test_{name}"))


def role(name: str) -> str:
    return f"test_{name}"


def check_against(
    spec: ParameterSpec, parts: list[Array], local: Callable[[Coordinates], Array], grid: Grid, intervals: int = 3
) -> None:
    """Compare a spec with a plain cut.

    Args:
        spec: under test.
        parts: each logical tensor, whole; elements of all of them are different and not negative. -1 is padding.
        local: what a process holds, cut by hand.
        grid: of the processes.
        intervals: into how many flat intervals each shard is cut, as ZeRO would.
    """
    seen = [np.zeros(part.shape, dtype=np.int64) for part in parts]
    counted = [np.zeros(part.shape, dtype=np.int64) for part in parts]
    for shard in grid.shards():
        held = local(shard)
        assert spec.local_shape(grid) == held.shape
        flat = held.reshape(-1)
        bounds = sorted({0, flat.size, *(flat.size * k // intervals + k for k in range(1, intervals))})
        for start, stop in itertools.pairwise(bounds):
            if stop > flat.size:
                continue
            covered = np.full(stop - start, -1)
            counts = np.zeros(stop - start, dtype=bool)
            for begin, length in counted_intervals(spec, shard, start, stop - start):
                counts[begin : begin + length] = True
            for r in rectangles(spec, shard, start, stop - start):
                for box in boxes(spec.parts[r.part].shape, r):
                    at = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
                    begin = r.offset + box.start
                    end = begin + math.prod(box.sizes)
                    covered[begin:end] = parts[r.part][at].reshape(-1)
                    seen[r.part][at] += 1
                    counted[r.part][at] += r.counted
                    assert (counts[begin:end] == r.counted).all(), "one answer to whose copy counts"
            assert (covered == flat[start:stop]).all()
    assert all((each >= 1).all() for each in seen), "every element is held"
    assert all((each == 1).all() for each in counted), "of its copies exactly one counts"


def numbers(*shapes: tuple[int, ...]) -> list[Array]:
    """Arrays of these shapes, whose elements are all different."""
    made, first = [], 0
    for shape in shapes:
        made.append(np.arange(first, first + math.prod(shape)).reshape(shape))
        first += math.prod(shape)
    return made


Z = X = 1536
STATE, HEADS, WIDTH = 128, 24, 8


def in_proj_of(groups: int) -> ParameterSpec:
    """Mamba-2's `in_proj`, [z, x, B, C, dt]: each block is cut by itself, B and C at most once per group."""
    sizes = (Z, X, groups * STATE, groups * STATE, HEADS)
    limits = (None, None, groups, groups, None)
    names, starts = ("z", "x", "B", "C", "dt"), np.cumsum((0, *sizes))
    return ParameterSpec(
        tuple(Part(name, role(name), (size, WIDTH)) for name, size in zip(names, sizes, strict=True)),
        (sum(sizes), WIDTH),
        tuple(Segment(int(starts[i]), i, 0, size) for i, size in enumerate(sizes)),
        (Sharding("tensor", 0, tuple(Block(size, limit) for size, limit in zip(sizes, limits, strict=True))),),
        orthogonalize=True,
    )


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("groups", [1, 2])
def test_mamba_in_proj_cuts_z_x_and_dt_and_copies_groups_where_there_are_fewer_than_ranks(
    groups: int, tensor: int
) -> None:
    sizes = [Z, X, groups * STATE, groups * STATE, HEADS]
    parts = numbers(*((size, WIDTH) for size in sizes))

    def local(shard: Coordinates) -> Array:
        z, x, b, c, dt = parts
        group = shard.tensor * groups // tensor  # of the first head that the rank has
        count = max(1, groups // tensor)
        rows = slice(group * STATE, (group + count) * STATE)
        evenly = [np.split(each, tensor)[shard.tensor] for each in (z, x, dt)]
        return np.concatenate([evenly[0], evenly[1], b[rows], c[rows], evenly[2]])

    check_against(in_proj_of(groups), parts, local, Grid(tensor=tensor))


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_mamba_conv1d_has_three_dimensions_and_the_same_blocks(tensor: int) -> None:
    sizes = (X, STATE, STATE)
    spec = ParameterSpec(
        tuple(Part(name, role("conv"), (size, 1, 4)) for name, size in zip("xBC", sizes, strict=True)),
        (sum(sizes), 1, 4),
        (Segment(0, 0, 0, X), Segment(X, 1, 0, STATE), Segment(X + STATE, 2, 0, STATE)),
        (Sharding("tensor", 0, (Block(X), Block(STATE, 1), Block(STATE, 1))),),
    )
    parts = numbers(*((size, 1, 4) for size in sizes))
    assert spec.shape == (1792, 1, 4)

    def local(shard: Coordinates) -> Array:
        return np.concatenate([np.split(parts[0], tensor)[shard.tensor], parts[1], parts[2]])

    check_against(spec, parts, local, Grid(tensor=tensor))


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_vectors_of_heads_are_cut_evenly(tensor: int) -> None:
    parts = numbers((HEADS,))
    spec = megatron.vector(role("head_vector"), HEADS, 0, fp32=True)
    check_against(spec, parts, lambda shard: np.split(parts[0], tensor)[shard.tensor], Grid(tensor=tensor))


def experts_of(count: int, ffn: int, hidden: int) -> ParameterSpec:
    """A stack [experts, 2 ffn, hidden] of gated first layers: experts over the expert axis, each of gate and up over
    the tensor axis."""
    parts, segments = [], []
    for e in range(count):
        parts += [Part(f"{e}.gate", "gate", (ffn, hidden)), Part(f"{e}.up", "up", (ffn, hidden))]
        segments += [Segment(2 * e * ffn, 2 * e, 0, ffn), Segment((2 * e + 1) * ffn, 2 * e + 1, 0, ffn)]
    return ParameterSpec(
        tuple(parts),
        (count, 2 * ffn, hidden),
        tuple(segments),
        (Sharding("expert", 0, (Block(count),)), Sharding("tensor", 1, (Block(ffn), Block(ffn)))),
        orthogonalize=True,
    )


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
@pytest.mark.parametrize("expert", [1, 2, 4])
def test_stacked_experts_are_sharded_over_experts_and_within_gate_and_up(tensor: int, expert: int) -> None:
    count, ffn, hidden = 8, 16, 3
    parts = numbers(*[(ffn, hidden)] * (2 * count))

    def local(shard: Coordinates) -> Array:
        mine = range(shard.expert * count // expert, (shard.expert + 1) * count // expert)
        stack = []
        for e in mine:
            gate, up = (np.split(parts[2 * e + i], tensor)[shard.tensor] for i in (0, 1))
            stack.append(np.concatenate([gate, up]))
        return np.stack(stack)

    check_against(experts_of(count, ffn, hidden), parts, local, Grid(tensor=tensor, expert=expert))


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_qkv_is_cut_evenly_through_groups_where_ranks_outnumber_them(tensor: int) -> None:
    heads, groups, dim, cols = 16, 2, 4, 3
    q, k, v = parts = numbers((heads * dim, cols), (groups * dim, cols), (groups * dim, cols))
    queries = heads // groups * dim
    fused = np.concatenate(
        [
            each
            for g in range(groups)
            for each in (q[g * queries : (g + 1) * queries], k[g * dim : (g + 1) * dim], v[g * dim : (g + 1) * dim])
        ]
    )
    spec = megatron.fused_qkv(heads, groups, dim, cols)
    check_against(spec, parts, lambda shard: np.split(fused, tensor)[shard.tensor], Grid(tensor=tensor))


@dataclass
class Drawn:
    """A random spec, with its parts as arrays and the whole stored array (-1: padding)."""

    spec: ParameterSpec
    parts: list[Array]
    stored: Array


@st.composite
def drawn_specs(draw: st.DrawFn) -> Drawn:
    """Blocks of unequal sizes, some copied, along the first dimension; the columns or a stack over a second axis."""
    dims = draw(st.integers(1, 3))
    stack = draw(st.sampled_from([4, 8])) if dims == 3 else 1
    cols = draw(st.integers(1, 3)) * 8 if dims > 1 else 1
    blocks = tuple(
        Block(8 * draw(st.integers(1, 3)), draw(st.sampled_from([None, None, 1, 2, 4])))
        for _ in range(draw(st.integers(1, 4)))
    )
    rows = sum(block.size for block in blocks)
    # Cut each stack's rows into segments; some are padding, the others are dealt to parts in any order.
    bounds = sorted({0, rows, *draw(st.lists(st.integers(0, rows), max_size=5))})
    pieces = [(s * rows + a, b - a) for s in range(stack) for a, b in itertools.pairwise(bounds)]
    owners = [draw(st.integers(-1, 2)) for _ in pieces]
    if all(owner < 0 for owner in owners):
        owners[0] = 0
    present = sorted({owner for owner in owners if owner >= 0})
    filled = dict.fromkeys(present, 0)
    segments = []
    for (start, length), owner in zip(pieces, owners, strict=True):
        if owner >= 0:
            segments.append(Segment(start, present.index(owner), filled[owner], length))
            filled[owner] += length
    tail = () if dims == 1 else (cols,)
    parts = numbers(*((filled[owner], *tail) for owner in present))
    stored = np.full((stack * rows, *tail), -1)
    for segment in segments:
        source = parts[segment.part][segment.part_start : segment.part_start + segment.length]
        stored[segment.start : segment.start + segment.length] = source
    shape = (stack, rows, cols) if dims == 3 else (rows, *tail)
    first = 1 if dims == 3 else 0
    shardings = [Sharding("tensor", first, blocks)] if draw(st.booleans()) else []
    second = draw(st.sampled_from([None, "stack", "columns"]))
    if second == "stack" and dims == 3:
        shardings.append(Sharding("expert", 0, (Block(stack),)))
    if second == "columns" and dims > 1:
        shardings.append(Sharding("expert", dims - 1, (Block(cols),)))
    spec = ParameterSpec(
        tuple(Part(str(i), "up", part.shape) for i, part in enumerate(parts)), shape, tuple(segments), tuple(shardings)
    )
    return Drawn(spec, parts, stored.reshape(shape))


def plain_cut(array: Array, sharding: Sharding, rank: int, size: int) -> Array:
    """Split each block into its different pieces and take the one of this rank."""
    edges = np.cumsum([block.size for block in sharding.blocks])[:-1]
    taken = []
    for block, piece in zip(sharding.blocks, np.split(array, edges, axis=sharding.dim), strict=True):
        different = size if block.pieces is None else min(size, block.pieces)
        taken.append(np.split(piece, different, axis=sharding.dim)[rank * different // size])
    return np.concatenate(taken, axis=sharding.dim)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(drawn_specs(), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]), st.integers(1, 5))
def test_shards_of_a_random_spec_tile_its_parts_and_each_element_counts_once(
    drawn: Drawn, tensor: int, expert: int, intervals: int
) -> None:
    def local(shard: Coordinates) -> Array:
        found = drawn.stored
        for sharding in drawn.spec.shardings:
            found = plain_cut(found, sharding, *shard.on(sharding.axis))
        return found

    check_against(drawn.spec, drawn.parts, local, Grid(tensor=tensor, expert=expert), intervals)


@given(st.tuples(*[st.integers(1, 3)] * 5))
def test_ranks_and_coordinates_are_each_others_inverse_with_tensor_parallel_ranks_next_to_each_other(
    sizes: tuple[int, int, int, int, int],
) -> None:
    grid = Grid(*sizes)
    found = [grid.coordinates(rank) for rank in range(grid.size)]
    assert [each.rank for each in found] == list(range(grid.size))
    axes = ("tensor", "context", "expert", "data", "pipeline")  # Megatron's order, tp-cp-ep-dp-pp
    by_hand = [
        dict(zip(axes, reversed(place), strict=True)) for place in np.ndindex(*(getattr(grid, a) for a in axes[::-1]))
    ]
    assert [{axis: each.on(axis)[0] for axis in axes} for each in found] == by_hand  # type: ignore[arg-type]


GOOD = ParameterSpec(
    (Part("a", "up", (4, 6)), Part("b", "up", (4, 6))),
    (8, 6),
    (Segment(0, 0, 0, 4), Segment(4, 1, 0, 4)),
    (Sharding("tensor", 0, (Block(4), Block(4))),),
    orthogonalize=True,
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"segments": (Segment(0, 0, 0, 4), Segment(3, 1, 0, 4))},
            r"rows \[3:7\], but the segments before it end at row 4 of 8 .*not overlap",
        ),
        (
            {"segments": (Segment(0, 0, 0, 4), Segment(4, 1, 0, 3))},
            r"holds row 3 of the part 'b' nowhere: the segments of this part must hold each of its 4 rows once",
        ),
        ({"segments": (Segment(0, 0, 0, 4), Segment(4, 0, 0, 4))}, r"row 0 of the part 'a' twice"),
        ({"segments": (Segment(0, 0, -1, 5),)}, r"a segment of rows \[-1:4\] of the part 'a', which has only rows"),
        ({"segments": (Segment(0, 0, 0, 4),)}, r"has the part 'b' and no segment of it: add segments"),
        (
            {"segments": (Segment(0, 0, 0, 4), Segment(4, 2, 0, 4))},
            r"a segment of part 2, but has 2 parts: give a part's number from 0 to 1",
        ),
        ({"parts": (Part("a", "up", (4, 6)), Part("a", "up", (4, 6)))}, r"names \['a', 'a'\]: give each part a"),
        (
            {"parts": (Part("a", "up", (4, 6)), Part("b", "up", (4, 5)))},
            r"shape \(4, 5\): the parts of a matrix must have the parameter's last dimension",
        ),
        (
            {"shardings": (Sharding("tensor", 0, (Block(4), Block(3))),)},
            r"blocks of total size 7 along dimension 0, whose size is 8",
        ),
        (
            {"shardings": (Sharding("tensor", 2, (Block(8),)),)},
            r"along dimension 2, and has 2 dimensions: give one from 0 to 1",
        ),
        ({"shardings": (Sharding("rows", 0, (Block(8),)),)}, r"names the axis 'rows': use one of tensor, context"),
        (
            {"shardings": (Sharding("data", 0, (Block(8),)),)},
            r"names the axis data, over which ZeRO .* no spec may name it: use tensor",
        ),
        ({"shardings": (Sharding("tensor", 0, (Block(8, 3),)),)}, r"block of size 8 with pieces=3: pieces, .*divide"),
        ({"shardings": (Sharding("tensor", 1, (Block(3), Block(3))),)}, r"2 blocks along its columns"),
        (
            {"shardings": (Sharding("tensor", 0, (Block(8),)), Sharding("expert", 0, (Block(8),)))},
            r"name each axis once, and each dimension once",
        ),
        ({"reduce_over": ("tensor",)}, r"reduce_over names the same axis: gradients of different .* no block with"),
        (
            {"shardings": (Sharding("tensor", 0, (Block(4), Block(4))),), "reduce_over": ("tensor",)},
            r"reduce_over names the same axis: .* name the axis in shardings or in reduce_over, not in both",
        ),
        (
            {"shardings": (Sharding("tensor", 1, (Block(6, 2),)),), "reduce_over": ("tensor",)},
            r"copies are summed only along dimension 0, and this one shards 1",
        ),
        (
            {"shape": (9, 6), "shardings": ()},
            r"hold only 8 of its 9 rows: padding cannot be orthogonalized; add a part",
        ),
        ({"side": "row"}, r"has compact=True or a side, which .*, and a multiplier is a vector"),
        ({"parts": (), "segments": ()}, r"has no part: name the logical tensors"),
    ],
)
def test_a_spec_that_describes_no_parameter_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(GOOD, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("blocks", "tensor", "said"),
    [
        ((Block(8),), 3, r"dimension 0 .*role up has a block of size 8, and the tensor axis has 3 processes: choose"),
        (
            (Block(8, 4),),
            6,
            r"a block of size 8, which can be cut into at most 4 pieces, and the tensor axis has 6",
        ),
    ],
)
def test_a_size_that_an_axis_does_not_divide_is_refused_when_the_grid_is_known(
    blocks: tuple[Block, ...], tensor: int, said: str
) -> None:
    spec = dataclasses.replace(GOOD, shardings=(Sharding("tensor", 0, blocks),))
    for ask in (spec.local_shape, lambda grid: spec.local_segments(Coordinates(grid))):
        with pytest.raises(ValueError, match=said):
            ask(Grid(tensor=tensor))
