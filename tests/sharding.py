"""Shards cut from whole tensors as Megatron cuts them, without the code under test."""

from __future__ import annotations

import torch
from torch import Tensor

from megamult.parameters.spec import ParameterSpec


def megatron_shard(stated: ParameterSpec, full: Tensor, rank: int, size: int) -> Tensor:
    """Return what tensor-parallel rank `rank` of `size` holds: dimension 0 in equal blocks, of each of which every rank
    has a piece; any other dimension evenly. Of `stated` only the dimension and the number of blocks are used."""
    dim = stated.dim_over("tensor")
    if dim is None:
        return full
    (sharding,) = stated.shardings
    return torch.cat([block.chunk(size, dim)[rank] for block in full.chunk(len(sharding.blocks), dim)], dim)
