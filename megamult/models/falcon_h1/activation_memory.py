"""Memory that a Falcon-H1 model's forward pass keeps for backward."""

from __future__ import annotations

from megamult.models.common.activation_memory import Pass, Saved, around, attention, linear_input, mlp, norm
from megamult.models.common.mamba2.activation_memory import mixer
from megamult.models.falcon_h1.config import FalconH1Config
from megamult.parameters.spec import Side


def activation_memory(sizes: FalconH1Config, vocab_size: int, run: Pass, embedding: frozenset[Side]) -> Saved:
    """Return the bytes that a forward pass keeps (see :attr:`megamult.models.common.architecture.Architecture`).

    On CUDA, mixers are taken to use the fused kernels unless `ssm_kernels` is `torch`.
    """
    fused = run.fused and sizes.ssm_kernels != "torch"
    block = norm(run, run.stream, sizes.hidden_size, sizes.norms) + linear_input(run, sizes.hidden_size)
    layers = []
    for i, kind in enumerate(sizes.layer_kinds):
        kept = block * (2 if kind == "H" else 1)  # attention and mixer have one input
        kept += mixer(run, sizes.mixer, fused) if kind in "HM" else 0
        kept += attention(run, sizes, i) if kind in "H*" else 0
        kept += mlp(run, sizes) if kind in "H-" else 0
        layers.append(kept)
    return around(run, sizes, vocab_size, layers, embedding)
