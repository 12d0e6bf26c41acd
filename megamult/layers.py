"""The public layers: drop-in subclasses of Megatron's with learnable multipliers."""

from megamult.multipliers.layers import (
    MultiplierColumnParallelLinear,
    MultiplierRowParallelLinear,
    MultiplierVocabParallelEmbedding,
)

__all__ = [
    "MultiplierColumnParallelLinear",
    "MultiplierRowParallelLinear",
    "MultiplierVocabParallelEmbedding",
]
