"""Frequencies of rotary positions, scaled and not, against those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megamult.models.common.rotary import frequencies, mistakes

LINEAR = {"rope_type": "linear", "factor": 3.0}
# With base 10,000 and heads of 64, the wavelengths are from 6 to 47,000: some below 500 / 4, between, and above 500.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 500,
}


@pytest.mark.parametrize("scaling", [LINEAR, LLAMA3], ids=["linear", "llama3"])
def test_scaled_frequencies_are_those_of_transformers(scaling: dict[str, Any]) -> None:
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters={"rope_theta": 10000.0, **scaling})
    theirs, attention_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config)
    ours = torch.tensor(frequencies(64, 10000.0, scaling), dtype=torch.float64)
    assert attention_factor == 1.0 and len(ours) == 32
    # Their fp32 power and quotients: a few times 2^-24. In the transition of llama3 the terms are as large as the sum.
    torch.testing.assert_close(ours, theirs.double(), rtol=2e-6, atol=0)
    plain = torch.tensor(frequencies(64, 10000.0), dtype=torch.float64)
    factors = plain / ours
    if scaling is LLAMA3:
        assert (factors == 1).sum() > 5 and (factors > 7.999).sum() > 5 and ((factors > 1.1) & (factors < 7)).any()
    else:
        assert torch.allclose(factors, torch.full_like(factors, 3.0), rtol=1e-15)


def test_no_scaling_is_no_mistake_and_a_needed_number_is_named() -> None:
    assert mistakes("x", None) == mistakes("x", LINEAR) == mistakes("x", LLAMA3) == []
    assert mistakes("x", [1]) == ["x is [1]: give a mapping, such as {rope_type: linear, factor: 2.0}, or null"]
    assert mistakes("x", {"rope_type": "linear"}) == ["x.factor is None: give a positive number"]
    (order,) = mistakes("x", {**LLAMA3, "low_freq_factor": 4.0})
    assert order.startswith("x.low_freq_factor is 4.0: it must be below high_freq_factor (4.0)")
