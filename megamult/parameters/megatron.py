"""Specs of the parameters of Megatron-Core's layers.

Sizes are global. The shard that a spec gives a rank equals the shard of Megatron's layer, element for element.
"""

from __future__ import annotations

from megamult.parameters.roles import role as role_named
from megamult.parameters.shards import Block, Sharding
from megamult.parameters.spec import ParameterSpec, Part, Role, Segment


def tensor_parallel(dim: int, *sizes: int) -> tuple[Sharding, ...]:
    """Return the sharding of dimension `dim` over the tensor axis.

    The dimension consists of consecutive blocks of the sizes `sizes`. A process holds an equal piece of every block.
    """
    return (Sharding("tensor", dim, tuple(Block(size) for size in sizes)),)


def single_matrix(role: Role, rows: int, cols: int, dim: int | None, partial: bool = False) -> ParameterSpec:
    """Describe a parameter that is one logical matrix W[rows, cols].

    Args:
        role: role of the matrix; it decides whether the matrix is orthogonalized and decayed.
        rows, cols: output size and input size.
        dim: dimension that tensor parallelism shards, or None if the matrix is replicated.
        partial: whether the gradient of a replicated matrix must still be summed over tensor-parallel ranks, for
            example because sequence parallelism gives each of these ranks only a part of the tokens.
    """
    known = role_named(role)
    return ParameterSpec(
        (Part("", role, (rows, cols)),),
        (rows, cols),
        (Segment(0, 0, 0, rows),),
        () if dim is None else tensor_parallel(dim, (rows, cols)[dim]),
        orthogonalize=known.orthogonalized,
        decay=known.decay,
        reduce_over=("tensor",) if partial else (),
    )


def fused_qkv(num_heads: int, num_groups: int, head_dim: int, cols: int) -> ParameterSpec:
    """Describe the weight of `linear_qkv`. Each query group stores `[q ... q k v]`: its query heads, one key head and
    one value head, of `head_dim` rows each."""
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
    rows = num_heads * head_dim + 2 * kv_rows
    parts = (
        Part("q", "q", (num_heads * head_dim, cols)),
        Part("k", "k", (kv_rows, cols)),
        Part("v", "v", (kv_rows, cols)),
    )
    return ParameterSpec(parts, (rows, cols), tuple(segments), tensor_parallel(0, rows), orthogonalize=True)


def fused_gate_up(ffn_hidden_size: int, cols: int) -> ParameterSpec:
    """Describe the weight of a gated `linear_fc1`, `[gate; up]`. Tensor-parallel rank p holds `[gate_p; up_p]`."""
    f = ffn_hidden_size
    parts = (Part("gate", "gate", (f, cols)), Part("up", "up", (f, cols)))
    segments = (Segment(0, 0, 0, f), Segment(f, 1, 0, f))
    return ParameterSpec(parts, (2 * f, cols), segments, tensor_parallel(0, f, f), orthogonalize=True)


def vocabulary(role: Role, vocab_size: int, padded_vocab_size: int, cols: int) -> ParameterSpec:
    """Describe an embedding or a head. Rows from `vocab_size` on are padding and belong to no logical tensor."""
    return ParameterSpec(
        (Part("", role, (vocab_size, cols)),),
        (padded_vocab_size, cols),
        (Segment(0, 0, 0, vocab_size),),
        tensor_parallel(0, padded_vocab_size),
    )


def norm(size: int, partial: bool, role: Role = "norm") -> ParameterSpec:
    """Describe a norm's weight [size], which is replicated. `partial` is the same as for :func:`single_matrix`."""
    return vector(role, size, None, partial)


def vector(role: Role, size: int, dim: int | None, partial: bool = False, fp32: bool = False) -> ParameterSpec:
    """Describe a vector [size] that is one logical tensor.

    `role`, `dim` (0 or None) and `partial` are the same as for :func:`single_matrix`. `fp32` says whether forward
    passes read the fp32 value of the vector if the model's dtype is narrower.
    """
    return ParameterSpec(
        (Part("", role, (size,)),),
        (size,),
        (Segment(0, 0, 0, size),),
        () if dim is None else tensor_parallel(0, size),
        decay=role_named(role).decay,
        fp32=fp32,
        reduce_over=("tensor",) if partial else (),
    )


def bias_of(weight: ParameterSpec, partial: bool = False) -> ParameterSpec:
    """Describe the bias of a matrix. It is fused and sharded like the rows of the matrix, and has neither weight decay
    nor multipliers.

    Args:
        weight: spec of the matrix.
        partial: whether the optimizer step must still sum the bias's gradient over tensor-parallel ranks, as for a
            row-parallel layer under sequence parallelism.
    """
    return ParameterSpec(
        tuple(Part(part.name, "bias", part.shape[:1]) for part in weight.parts),
        weight.shape[:1],
        weight.segments,
        tuple(each for each in weight.shardings if each.dim == 0),
        decay=False,
        reduce_over=("tensor",) if partial else (),
    )
