"""Documents in one sequence: what a model computes of them is what it computes of each document for itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megamult.config import Config
from megamult.data.config import DataConfig
from megamult.models.common.documents import attention_mask, first_tokens, positions_in_documents
from megamult.train.model import build_model
from tests.models.documents_workers import BATCH, END, SEQ, VARIANTS, Masked, Steps, documents, float64, texts, trained
from tests.processes import run_distributed
from tests.small import SMALL


def test_the_end_of_document_token_is_the_last_of_its_document() -> None:
    tokens = torch.tensor([[5, 9, 1, 5, 1, 1, 7], [1, 1, 3, 3, 3, 3, 1], [2] * 7])
    expected = [[0, 1, 2, 0, 1, 0, 0], [0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]]
    positions = positions_in_documents(tokens, 1)
    assert positions.tolist() == expected
    assert first_tokens(positions).tolist() == [[0, 0, 0, 3, 3, 5, 6], [0, 1, 2, 2, 2, 2, 2], [0] * 7]


def test_a_query_attends_to_the_keys_of_its_document_up_to_its_own() -> None:
    mask = attention_mask(first_tokens(positions_in_documents(texts(), END)), torch.float64)
    assert mask.shape == (BATCH, 1, SEQ, SEQ)
    expected = torch.full((BATCH, SEQ, SEQ), -torch.inf, dtype=torch.float64)
    for row, start, stop in documents():
        for query in range(start, stop):
            expected[row, query, start : query + 1] = 0.0
    assert torch.equal(mask[:, 0], expected)


ATTENTION = {"mixers beside attention": 1, "layers of every kind": 2, "no attention": 0}
"""Number of layers whose attention logits are measured."""


@pytest.fixture(scope="module")
def passes() -> dict[str, dict[str, Any]]:
    return run_distributed(1, float64)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_are_those_of_each_document_by_itself(
    variant: str, passes: dict[str, dict[str, Any]]
) -> None:
    found = passes[variant]
    (logits, gradients), (apart, gradients_apart) = found["masked"], found["apart"]
    # Roundings of 2^-53 in sums of some hundred terms, through two layers.
    torch.testing.assert_close(logits, apart, rtol=1e-12, atol=1e-13)
    assert gradients.keys() == gradients_apart.keys()
    for name, expected in gradients_apart.items():
        # Gradients of multipliers are summed in fp32, whatever the dtype.
        relative = 1e-6 if name.endswith("_multiplier") else 1e-12
        error = torch.linalg.vector_norm(gradients[name] - expected)
        assert error <= relative * torch.linalg.vector_norm(expected), name
    # Without the mask it is something else.
    plain = found["plain"][0]
    assert (plain - apart)[1].abs().max() < 1e-12, "one document alone"
    assert (plain - apart)[0].abs().max() > 1e-3
    heads = SMALL.num_attention_heads
    pairs = sum((stop - start) * (stop - start + 1) // 2 for _, start, stop in documents())
    layers = ATTENTION.get(variant, SMALL.num_layers)
    assert found["pairs"] == [heads * pairs] * layers
    assert found["masks"] == min(layers, 1), "seq^2 numbers, once for all layers, and only if one reads them"


CASES = [
    Masked(zero=2, accumulation=3),
    Masked(recompute=True, implementation="folded", zero=1),
    Masked(knobs="qk_clip"),
]
TWO = [
    Masked(world=2, tensor=2, sequence=True, zero=1),
    Masked(world=2, zero=3, accumulation=3),
    Masked(world=2, tensor=2, recompute=True, implementation="folded", zero=3),
    Masked(world=2, tensor=2, knobs="qk_clip"),
    Masked(world=2, tensor=2, sequence=True, zero=2, model="falcon_h1"),
]


@pytest.fixture(scope="module")
def runs() -> dict[Any, Steps]:
    by_one = [Masked(), Masked(model="falcon_h1"), Masked(mask=False), *CASES]
    found = dict(zip(by_one, run_distributed(1, trained, by_one)[0], strict=True))
    return found | dict(zip(TWO, run_distributed(2, trained, TWO)[0], strict=True))


@pytest.mark.parametrize("case", CASES[:2] + TWO, ids=str)
def test_training_does_not_depend_on_the_sharding(case: Masked, runs: dict[Any, Steps]) -> None:
    reference = runs[CASES[2]] if case.knobs else runs[Masked(model=case.model)]
    found = runs[case]
    # As in test_invariance.py: sums in another order differ by some 1e-7, and few steps amplify that little.
    assert found.losses == pytest.approx(reference.losses, rel=1e-5)
    assert found.norms == pytest.approx(reference.norms, rel=1e-5)
    assert found.valid == pytest.approx(reference.valid, rel=1e-5)


def test_the_mask_is_there_in_training_and_evaluation(runs: dict[Any, Steps]) -> None:
    masked, plain = runs[Masked()], runs[Masked(mask=False)]
    assert abs(masked.losses[0] - plain.losses[0]) > 1e-5
    assert abs(masked.norms[0] - plain.norms[0]) > 1e-4 * plain.norms[0]
    assert abs(masked.valid - plain.valid) > 1e-5


def test_without_the_end_of_document_token_there_is_no_mask() -> None:
    config = dataclasses.replace(Config(), data=DataConfig(document_mask=True))
    with pytest.raises(ValueError, match=r"data\.document_mask is true and eod is None: give the id"):
        build_model(config, 10, None)
