"""The layout's map between local shards and logical tensors agrees with rows enumerated one by one."""

from __future__ import annotations

from collections import Counter

import pytest

from megamult.multipliers import specs
from megamult.parameters import megatron
from megamult.parameters.axes import Grid, tensor_shard
from megamult.parameters.roles import resolve
from megamult.parameters.spec import ParameterSpec
from tests.multipliers.cases import gate_up_rows, qkv_rows

Held = list[tuple[str, int] | None]


def held(spec: ParameterSpec, rank: int, tensor: int) -> Held:
    """(part, row) at each position along dim 0 of a rank's shard, as the layout's runs say; None: no part's."""
    rows: Held = [None] * spec.local_shape(Grid(tensor=tensor))[0]
    for run in spec.local_segments(tensor_shard(rank, tensor)):
        for i in range(run.length):
            assert rows[run.start + i] is None, "two runs overlap"
            rows[run.start + i] = (spec.parts[run.part].name, run.part_start + i)
    return rows


def covered(spec: ParameterSpec, tensor: int) -> Counter[tuple[str, int]]:
    """How often each logical row is held, over the ranks."""
    return Counter(row for rank in range(tensor) for row in held(spec, rank, tensor) if row is not None)


def counted_rows(spec: ParameterSpec, rank: int, tensor: int) -> int:
    """How many rows of a rank's shard count in a sum over ranks."""
    return sum(rows.length for rows in spec.row_intervals(tensor_shard(rank, tensor)) if rows.counted)


def every_row_once(spec: ParameterSpec) -> Counter[tuple[str, int]]:
    return Counter((part.name, i) for part in spec.parts for i in range(part.shape[0]))


@pytest.mark.parametrize(("heads", "groups", "head_dim"), [(12, 2, 8), (12, 12, 8), (12, 1, 6), (8, 4, 2)])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_fused_qkv_shards_are_slices_of_the_global_fused_rows(
    heads: int, groups: int, head_dim: int, tensor: int
) -> None:
    spec = megatron.fused_qkv(heads, groups, head_dim, cols=96)
    whole = qkv_rows(heads, groups, head_dim)
    piece = len(whole) // tensor
    assert spec.shape == (len(whole), 96)
    for rank in range(tensor):
        assert held(spec, rank, tensor) == whole[rank * piece : (rank + 1) * piece]
    assert covered(spec, tensor) == every_row_once(spec)


def test_tensor_parallel_4_cuts_through_a_query_group_of_12_heads_in_2_groups() -> None:
    spec = megatron.fused_qkv(12, 2, 8, cols=96)
    parts = [[spec.parts[run.part].name for run in spec.local_segments(tensor_shard(rank, 4))] for rank in range(4)]
    assert parts == [["q"], ["q", "k", "v"], ["q"], ["q", "k", "v"]]


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_gate_up_shards_are_megatrons_gate_p_up_p(tensor: int) -> None:
    spec = megatron.fused_gate_up(60, cols=96)
    for rank in range(tensor):
        assert held(spec, rank, tensor) == gate_up_rows(60, rank, tensor)
    assert covered(spec, tensor) == every_row_once(spec)


@pytest.mark.parametrize("vocab_size", [50, 64, 10])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_vocabulary_padding_belongs_to_no_part(vocab_size: int, tensor: int) -> None:
    spec = megatron.vocabulary("embedding", vocab_size, 64, cols=20)
    whole: Held = [("", i) if i < vocab_size else None for i in range(64)]
    assert [row for rank in range(tensor) for row in held(spec, rank, tensor)] == whole
    assert spec.numel_logical == vocab_size * 20
    assert (spec.kind, megatron.vocabulary("head", vocab_size, 64, 20).kind) == ("embedding", "head")


@pytest.mark.parametrize("chosen", [["q"], ["k"], ["v", "k"], ["q", "k", "v"]])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_compact_row_multipliers_hold_the_chosen_rows_in_order_and_each_once(chosen: list[str], tensor: int) -> None:
    weight = megatron.fused_qkv(12, 2, 8, cols=96)
    selected = [i for i, part in enumerate(weight.parts) if part.name in chosen]
    spec = specs.row_multiplier(weight, selected, partial=True)
    shards = [held(spec, rank, tensor) for rank in range(tensor)]
    wanted = [[r for r in held(weight, rank, tensor) if r is not None and r[0] in chosen] for rank in range(tensor)]
    longest = max(len(rows) for rows in wanted)
    # Uneven ranks (tensor parallel 4 cuts groups) are as long as the fullest, with nothing after the last run.
    assert shards == [rows + [None] * (longest - len(rows)) for rows in wanted]
    assert covered(spec, tensor) == every_row_once(spec)
    assert "tensor" not in spec.reduce_over  # a sharded row sees all of its gradient


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_row_multipliers_of_a_padded_vocabulary_leave_padding_out(tensor: int) -> None:
    spec = specs.row_multiplier(megatron.vocabulary("embedding", 10, 64, cols=20), [0], partial=False)
    assert covered(spec, tensor) == every_row_once(spec)
    assert spec.local_shape(Grid(tensor=tensor)) == (10,)  # all ten live on rank 0; the other ranks are as long


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_gate_up_row_multipliers_are_sharded_with_their_rows(tensor: int) -> None:
    spec = specs.row_multiplier(megatron.fused_gate_up(60, cols=96), [1], partial=False)
    piece = 60 // tensor
    for rank in range(tensor):
        assert held(spec, rank, tensor) == [("up", rank * piece + i) for i in range(piece)]


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_column_multipliers_are_sharded_where_the_columns_are(tensor: int) -> None:
    row_parallel = specs.col_multiplier(megatron.single_matrix("down", 28, 72, dim=1), [0], partial=True)
    piece = 72 // tensor
    for rank in range(tensor):
        assert held(row_parallel, rank, tensor) == [("", rank * piece + i) for i in range(piece)]
        weight, here = megatron.single_matrix("down", 28, 72, dim=1), tensor_shard(rank, tensor)
        assert weight.local_cols(here) == (rank * piece, piece)
    assert "tensor" not in row_parallel.reduce_over
    replicated = specs.col_multiplier(megatron.fused_qkv(12, 2, 8, cols=96), [0, 2], partial=True)
    for rank in range(tensor):
        assert held(replicated, rank, tensor) == [(part, i) for part in "qv" for i in range(96)]
    assert "tensor" in replicated.reduce_over
    assert replicated.dim_over("tensor") is None


def test_replicas_count_on_the_first_rank_and_shards_on_every_rank() -> None:
    sharded, replicated = megatron.fused_qkv(12, 2, 8, 96), megatron.norm(96, partial=True)
    assert [counted_rows(sharded, rank, 4) for rank in range(4)] == [sharded.shape[0] // 4] * 4
    assert [counted_rows(replicated, rank, 4) for rank in range(4)] == [96, 0, 0, 0]


def test_the_logical_name_puts_the_part_between_module_and_leaf() -> None:
    spec = megatron.fused_qkv(12, 2, 8, 96)
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert [spec.logical_name(name, part) for part in spec.parts] == [
        f"decoder.layers.0.self_attention.linear_qkv.{part}.weight" for part in "qkv"
    ]
    assert spec.logical_name("weight", spec.parts[0]) == "q.weight"
    single = megatron.single_matrix("down", 4, 4, dim=1)
    assert single.logical_name("a.linear_fc2.weight", single.parts[0]) == "a.linear_fc2.weight"
    row = specs.row_multiplier(spec, [2], partial=False)
    assert row.logical_name("a.row_multiplier", row.parts[0]) == "a.v.row_multiplier"


def test_placement_all_scales_both_sides_of_every_role_but_the_head() -> None:
    everything = ("q", "k", "v", "attention_out", "gate", "up", "down", "embedding")
    assert resolve("all") == {role: {"row", "col"} for role in everything}
    assert resolve("scalar") == {role: {"scalar"} for role in everything}


def test_placement_symmetry_free_is_the_papers_table() -> None:
    both = {"row", "col"}
    assert resolve("symmetry_free") == {
        "q": {"row"},
        "attention_out": both,
        "gate": {"row"},
        "down": both,
        "embedding": both,
    }


def test_a_placement_maps_roles_to_one_side_or_several_and_drops_empty_ones() -> None:
    assert resolve({"q": "row", "v": ["row", "col"], "k": []}) == {"q": {"row"}, "v": {"row", "col"}}
    assert resolve({}) == {}
    resolve("all").clear()
    assert resolve("all"), "a caller's change must not reach the named placements"


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ("everything", "placement is 'everything': use one of all, symmetry_free, scalar, or a mapping"),
        ({"norm": "row"}, "names the role 'norm': use one of q, k, .*head$"),
        ({"q": "rows"}, "gives q the side 'rows': use row, col or scalar"),
        ({"q": ["row", "left"]}, "gives q the side 'left'"),
    ],
)
def test_a_wrong_placement_names_the_value_and_the_choices(placement: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(placement)  # type: ignore[arg-type]
