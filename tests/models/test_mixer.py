"""The mixer computes its formulas at every tensor-parallel size, whether ranks hold copies of B and C or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.mixer_workers import SIZES, inputs, mixers, reference, whole
from tests.processes import run_distributed

RUNS = [(1, False), (2, False), (2, True), (4, False)]


@pytest.fixture(scope="module")
def ranks() -> dict[tuple[int, bool], list[Any]]:
    """Outcomes on each rank, by tensor-parallel size and sequence parallelism."""
    return {(tensor, sequence): run_distributed(tensor, mixers, tensor, sequence) for tensor, sequence in RUNS}


@pytest.mark.parametrize(("tensor", "sequence"), RUNS)
@pytest.mark.parametrize("masked", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("name", SIZES)
def test_outputs_and_gradients_are_those_of_the_formulas(
    ranks: dict[tuple[int, bool], list[Any]], name: str, masked: bool, tensor: int, sequence: bool
) -> None:
    outcomes = [outcome[name][masked] for outcome in ranks[tensor, sequence]]
    hidden, documents, weights = inputs()
    values = {key: value.requires_grad_() for key, value in whole(name).items()}
    hidden.requires_grad_()
    expected = reference(name, values, hidden, documents if masked else None)
    (expected * weights).sum().backward()
    for rank, outcome in enumerate(outcomes):
        close = {"rtol": 1e-11, "atol": 1e-11}  # float64, sums of some tens of terms
        torch.testing.assert_close(outcome["output"], expected.chunk(tensor)[rank] if sequence else expected, **close)
        input_gradient = hidden.grad.chunk(tensor)[rank] if sequence else hidden.grad
        torch.testing.assert_close(outcome["input"], input_gradient, **close)
    for key, value in values.items():
        total = torch.zeros_like(value)
        for outcome in outcomes:
            for first, at, piece in outcome["gradients"][key]:
                (begin, end), rest = at[0], at[1:]
                total[(slice(first + begin, first + end), *(slice(*each) for each in rest))] += piece
        # Of copies, each rank has a part of the gradient; of everything else one rank has all of it.
        torch.testing.assert_close(total, value.grad, **close)


@pytest.mark.parametrize("name", ["one group", "two groups, norm before gate", "one group, norm after gate"])
def test_the_mixer_is_that_of_transformers(ranks: dict[tuple[int, bool], list[Any]], name: str) -> None:
    from transformers import FalconH1Config
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer

    sizes, (hidden, _, _) = SIZES[name], inputs()
    config = FalconH1Config(
        hidden_size=hidden.shape[-1],
        mamba_d_ssm=sizes.inner,
        mamba_n_heads=sizes.heads,
        mamba_d_head=sizes.head_dim,
        mamba_n_groups=sizes.groups,
        mamba_d_state=sizes.state,
        mamba_d_conv=sizes.kernel,
        mamba_chunk_size=sizes.chunk,
        mamba_rms_norm=sizes.norm != "none",
        mamba_norm_before_gate=sizes.norm == "before_gate",
        num_hidden_layers=1,
        rms_norm_eps=1e-5,
    )
    theirs = FalconH1Mixer(config, 0)
    names = {"conv_weight": "conv1d.weight", "conv_bias": "conv1d.bias", "norm_weight": "norm.weight"}
    state = {names.get(key, key): value for key, value in whole(name).items()}
    theirs.load_state_dict(state)
    theirs.register_buffer("mup_vector", torch.ones(1, 1, sum(sizes.rows)))
    with torch.no_grad():
        expected = theirs.eval()(hidden.float().transpose(0, 1)).transpose(0, 1).double()
    found = ranks[1, False][0][name][False]["output"]
    # fp32 there: rounded to 2^-24 in some tens of operations.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
