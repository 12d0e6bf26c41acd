"""The public layers: drop-in subclasses of Megatron's with learnable multipliers."""

from megamult.multipliers.embedding import MultiplierVocabParallelEmbedding
from megamult.multipliers.linear import MultiplierColumnParallelLinear, MultiplierRowParallelLinear

__all__ = [
    "MultiplierColumnParallelLinear",
    "MultiplierRowParallelLinear",
    "MultiplierVocabParallelEmbedding",
]
