"""Flat intervals of shards as rectangles of logical matrices, against shards cut from matrices of distinct numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megamult.parameters import megatron
from megamult.parameters.axes import tensor_shard
from megamult.parameters.rectangles import rectangles
from megamult.parameters.spec import ParameterSpec
from tests.sharding import megatron_shard


def _numbers(*shape: int, first: int = 0) -> Tensor:
    return torch.arange(first, first + torch.Size(shape).numel()).view(shape)


def _qkv() -> tuple[ParameterSpec, list[Tensor], Tensor]:
    """6 heads in 2 groups of head size 4: TP 4 cuts through a group. Fused row by row, as Megatron does it."""
    q, k, v = _numbers(24, 5), _numbers(8, 5, first=1000), _numbers(8, 5, first=2000)
    rows = [(q[g * 12 : g * 12 + 12], k[g * 4 : g * 4 + 4], v[g * 4 : g * 4 + 4]) for g in (0, 1)]
    fused = torch.cat([matrix for group in rows for matrix in group])
    return megatron.fused_qkv(6, 2, 4, 5), [q, k, v], fused


def _gate_up() -> tuple[ParameterSpec, list[Tensor], Tensor]:
    gate, up = _numbers(12, 3), _numbers(12, 3, first=1000)
    return megatron.fused_gate_up(12, 3), [gate, up], torch.cat([gate, up])


def _single(tp_dim: int | None) -> tuple[ParameterSpec, list[Tensor], Tensor]:
    w = _numbers(8, 12)
    return megatron.single_matrix("down", 8, 12, tp_dim), [w], w


def _vocabulary() -> tuple[ParameterSpec, list[Tensor], Tensor]:
    w = _numbers(13, 3)
    return megatron.vocabulary("embedding", 13, 16, 3), [w], torch.cat([w, torch.full((3, 3), -1)])


def _norm() -> tuple[ParameterSpec, list[Tensor], Tensor]:
    w = _numbers(10)
    return megatron.norm(10, False), [w], w


CASES = {
    "qkv": _qkv,
    "gate_up": _gate_up,
    "rows": lambda: _single(0),
    "cols": lambda: _single(1),
    "replicated": lambda: _single(None),
    "vocabulary": _vocabulary,
    "norm": _norm,
}


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_every_interval_is_the_rectangles_that_it_is_said_to_be(name: str, tp_size: int) -> None:
    stated, parts, full = CASES[name]()
    for tp_rank in range(tp_size):
        flat = megatron_shard(stated, full, tp_rank, tp_size).reshape(-1)
        for start in range(0, flat.numel(), 3):
            for length in (1, 2, 5, 11, flat.numel()):
                interval = flat[start : start + length]
                covered = torch.zeros(interval.numel(), dtype=torch.bool)
                position = 0
                for r in rectangles(stated, tensor_shard(tp_rank, tp_size), start, interval.numel()):
                    assert r.offset >= position
                    position = r.offset + r.numel
                    part = parts[r.part] if parts[r.part].ndim == 2 else parts[r.part][:, None]
                    block = part[r.row : r.row + r.height, r.col : r.col + r.width]
                    assert torch.equal(block.reshape(-1), interval[r.offset : position])
                    covered[r.offset : position] = True
                assert torch.equal(covered, interval >= 0), "all but padding is in a rectangle"


def test_an_interval_of_one_run_is_at_most_three_rectangles() -> None:
    stated = megatron.single_matrix("down", 100, 7, None)
    assert [(r.height, r.width) for r in rectangles(stated, tensor_shard(0, 1), 3, 7 * 50)] == [(1, 4), (49, 7), (1, 3)]
    assert [(r.height, r.width) for r in rectangles(stated, tensor_shard(0, 1), 8, 4)] == [(1, 4)]
