"""The bytes that a forward pass keeps for backward are counted as autograd keeps them, tensor by tensor."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megamult.models.architectures import architecture_of
from megamult.models.common.activation_memory import Pass
from megamult.models.common.config import DecoderConfig
from tests.models.activation_workers import kept
from tests.processes import run_distributed
from tests.small import MODELS, SMALL, VOCAB

SEQUENCES = 3

LLAMA = dataclasses.replace(SMALL, num_layers=3)
FALCON_H1 = dataclasses.replace(MODELS["hybrid"], num_layers=5, layers="M-H*M")
CASES: dict[str, tuple[DecoderConfig, dict[str, Any]]] = {
    "fp32": (LLAMA, {}),
    "bf16": (LLAMA, {"dtype": torch.bfloat16}),
    "multipliers in the layers": (LLAMA, {"dtype": torch.bfloat16, "placement": "all"}),
    "recomputed": (LLAMA, {"dtype": torch.bfloat16, "recompute": True}),
    "norms": (dataclasses.replace(LLAMA, qk_norm=True, norms="scalar", final_norm="frozen", z_loss=0.0), {}),
    "biases": (dataclasses.replace(LLAMA, attention_bias="all", mlp_bias=True, tie_embeddings=True), {}),
    "no positions": (dataclasses.replace(LLAMA, no_rope_layers=[1]), {}),
    "long documents": (LLAMA, {"document_end": 0}),
    "mixers": (FALCON_H1, {}),
    "mixers in bf16": (FALCON_H1, {"dtype": torch.bfloat16}),
    "mixers before gate": (dataclasses.replace(FALCON_H1, ssm_norm="before_gate"), {"dtype": torch.bfloat16}),
}
PARALLEL: dict[str, tuple[DecoderConfig, dict[str, Any]]] = {
    name: (sizes, {**arguments, "tensor_parallel": 2, "sequence_parallel": sequence})
    for sequence, suffix in ((False, ""), (True, ", sequence parallel"))
    for name, sizes, arguments in (
        (f"two ranks{suffix}", LLAMA, {"dtype": torch.bfloat16, "placement": "all"}),
        (f"mixers on two ranks{suffix}", FALCON_H1, {}),
    )
}


def counted(sizes: DecoderConfig, arguments: dict[str, Any]) -> int:
    run = Pass(
        SEQUENCES,
        sizes.seq_length,
        arguments.get("dtype", torch.float32),
        arguments.get("tensor_parallel", 1),
        arguments.get("sequence_parallel", False),
        documents="document_end" in arguments,
    )
    sides = frozenset({"row", "col"} if "placement" in arguments else ())
    saved = architecture_of(sizes).activation_memory(sizes, VOCAB, run, sides)  # type: ignore[arg-type]
    return saved.activations(arguments.get("recompute", False)) + saved.logits


@pytest.fixture(scope="module")
def one() -> dict[str, int]:
    return dict(zip(CASES, run_distributed(1, kept, list(CASES.values()), SEQUENCES)[0], strict=True))


@pytest.fixture(scope="module")
def two() -> dict[str, int]:
    return dict(zip(PARALLEL, run_distributed(2, kept, list(PARALLEL.values()), SEQUENCES)[0], strict=True))


@pytest.mark.parametrize("case", CASES)
def test_what_one_process_keeps_is_counted(one: dict[str, int], case: str) -> None:
    # Not counted: vectors with an element for each head or document, and masks that all sequences share.
    assert counted(*CASES[case]) == pytest.approx(one[case], rel=0.005)


@pytest.mark.parametrize("case", PARALLEL)
def test_what_a_tensor_parallel_rank_keeps_is_counted(two: dict[str, int], case: str) -> None:
    assert counted(*PARALLEL[case]) == pytest.approx(two[case], rel=0.005)
