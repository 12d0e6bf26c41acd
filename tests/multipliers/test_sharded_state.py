"""Megatron's distributed checkpoints see each logical multiplier whole, whatever the tensor-parallel size."""

from __future__ import annotations

import pytest
import torch

from tests.multipliers import cases
from tests.multipliers.cases import LayerCase
from tests.multipliers.conftest import ByRank
from tests.multipliers.workers import SAVED

every_case = pytest.mark.parametrize("case", SAVED, ids=str)


@every_case
def test_the_pieces_of_all_ranks_tile_each_logical_multiplier_once_with_its_values(
    by_rank: ByRank, case: LayerCase
) -> None:
    data = cases.draw(case)
    wanted = {}
    for side in ("row", "col", "scalar"):
        for part, vector in getattr(data, side).items():
            wanted[".".join(filter(None, ("m", part, f"{side}_multiplier")))] = vector
    found = {name: torch.zeros_like(vector) for name, vector in wanted.items()}
    count = {name: torch.zeros_like(vector) for name, vector in wanted.items()}
    for outcome in by_rank("sharded", case):
        for key, global_shape, global_offset, values, replica_id in outcome["pieces"]:
            assert global_shape == tuple(wanted[key].shape)
            if not any(replica_id):  # Megatron writes the copy whose replica id is all zeros
                piece = slice(global_offset[0], global_offset[0] + len(values))
                found[key][piece] = values
                count[key][piece] += 1
    for name, vector in wanted.items():
        assert torch.equal(count[name], torch.ones_like(vector)), f"{name} is not covered once"
        assert torch.equal(found[name], vector), name


@every_case
def test_every_rank_reads_its_replicated_multipliers_whole(by_rank: ByRank, case: LayerCase) -> None:
    sharded = {"row": "col", "embedding": "row"}.get(case.layer, "row")
    for rank, outcome in enumerate(by_rank("sharded", case)):
        for key, _, _, _, replica_id in outcome["pieces"]:
            is_replica = not key.endswith(f"{sharded}_multiplier")
            assert replica_id == (0, rank if is_replica else 0, 0), key


@every_case
def test_merging_what_was_cut_gives_the_parameter_back(by_rank: ByRank, case: LayerCase) -> None:
    names = [f"m.{side}_multiplier" for side in ("col", "row", "scalar") if case.scaled(side)]
    for outcome in by_rank("sharded", case):
        assert outcome["names"] == names
        assert outcome["merge_differs"] == []
