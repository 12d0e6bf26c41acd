"""Memory that a Llama model's forward pass keeps for backward."""

from __future__ import annotations

from megamult.models.common.activation_memory import Pass, Saved, around, attention, linear_input, mlp, norm
from megamult.models.llama.config import ModelConfig
from megamult.parameters.spec import Side


def activation_memory(sizes: ModelConfig, vocab_size: int, run: Pass, embedding: frozenset[Side]) -> Saved:
    """Return the bytes that a forward pass keeps (see :attr:`megamult.models.common.architecture.Architecture`)."""
    both = 2 * (norm(run, run.stream, sizes.hidden_size, sizes.norms) + linear_input(run, sizes.hidden_size))
    layers = [both + attention(run, sizes, i) + mlp(run, sizes) for i in range(sizes.num_layers)]
    return around(run, sizes, vocab_size, layers, embedding)
