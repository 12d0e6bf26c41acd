"""Public layers: drop-in subclasses of Megatron's layers, with learnable multipliers."""

from megamult.multipliers.embedding import MultiplierVocabParallelEmbedding
from megamult.multipliers.linear import MultiplierColumnParallelLinear, MultiplierRowParallelLinear

__all__ = [
    "MultiplierColumnParallelLinear",
    "MultiplierRowParallelLinear",
    "MultiplierVocabParallelEmbedding",
]
