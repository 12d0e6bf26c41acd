"""Falcon-H1 at the sizes that are published: parameters, multipliers and operations, without memory for any."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megamult.models.falcon_h1.config import FalconH1Config
from megamult.models.falcon_h1.flops import flops_per_token
from megamult.models.falcon_h1.hf_names import weights
from megamult.parameters.roles import resolve
from tests.models.falcon_h1_workers import counts, initial, readers, without_attention
from tests.processes import run_distributed
from tests.small import MODELS, VOCAB

COMMON: dict[str, Any] = {"seq_length": 16384, "rotary_base": 1e11, "vocab_size": 32784, "ssm_chunk": 256}
HALF_B = FalconH1Config(
    **{**COMMON, "ssm_chunk": 128},
    num_layers=36,
    hidden_size=1024,
    num_attention_heads=8,
    head_dim=64,
    num_query_groups=2,
    ffn_hidden_size=2048,
    ssm_heads=24,
    ssm_head_dim=64,
    ssm_state_size=128,
)
"""Falcon-H1-0.5B."""
TINY = FalconH1Config(
    num_layers=24,
    hidden_size=512,
    num_attention_heads=8,
    head_dim=64,
    num_query_groups=2,
    ffn_hidden_size=768,
    vocab_size=32768,
    tie_embeddings=True,
    ssm_heads=24,
    ssm_head_dim=32,
    ssm_state_size=64,
)
"""Falcon-H1-Tiny-90M, whose embedding is tied."""
PUBLISHED = {"0.5B": (HALF_B, 521_411_104), "Tiny-90M": (TINY, 91_131_072)}
"""Sizes of published models, and the numbers of their parameters."""


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, int]]:
    sizes = {name: each for name, (each, _) in PUBLISHED.items()}
    return run_distributed(1, counts, sizes)[0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_has_as_many_parameters_as_the_published_one(name: str, found: dict[str, dict[str, int]]) -> None:
    sizes, expected = PUBLISHED[name]
    assert found[name]["weights"] == expected
    assert sizes.vocab_size is not None
    *listed, head = weights(sizes, sizes.vocab_size)
    exported = listed if sizes.tie_embeddings else [*listed, head]
    assert sum(math.prod(weight.shape) for weight in exported) == expected, "also by the list of names"


def test_placements_add_as_many_multipliers_as_rows_and_columns(found: dict[str, dict[str, int]]) -> None:
    # Rows and columns of the tables in shared/FALCON_H1.md, over 36 layers, and 32784 + 1024 of the embedding.
    assert found["0.5B"]["all"] == 956_272
    assert found["0.5B"]["symmetry_free"] == 440_176
    assert found["0.5B"]["scalar"] == 36 * (4 + 3 + 6) + 1


def test_a_norm_is_read_by_attention_and_mixer_together_where_a_layer_has_both() -> None:
    found, holders = run_distributed(1, readers, MODELS["hybrid"], VOCAB)[0]  # M-H*
    present = {norm: modules for _, norm, modules in found if norm.removesuffix(".weight") in holders}
    layer = "decoder.layers"
    mixer, attention = "self_attention.mixer.in_proj", "self_attention.attention.linear_qkv"
    assert present == {
        f"{layer}.0.input_layernorm.weight": (f"{layer}.0.{mixer}",),
        f"{layer}.1.pre_mlp_layernorm.weight": (f"{layer}.1.mlp.linear_fc1",),
        f"{layer}.2.input_layernorm.weight": (f"{layer}.2.{attention}", f"{layer}.2.{mixer}"),
        f"{layer}.2.pre_mlp_layernorm.weight": (f"{layer}.2.mlp.linear_fc1",),
        f"{layer}.3.input_layernorm.weight": (f"{layer}.3.{attention}",),
    }
    assert {module for modules in present.values() for module in modules} <= holders


STARTED = [
    FalconH1Config(**keys, attention_bias="all", ssm_heads=64, ssm_head_dim=4, ssm_state_size=32)
    for keys in ({"num_layers": 2}, {"num_layers": 4, "layers": "M-H*"}, {"num_layers": 2, "layers": "M*"})
]
"""Models with 6, 1 + 1 + 3 + 1 and 1 + 1 projections into the residual stream."""


@pytest.fixture(scope="module")
def started() -> list[dict[str, Tensor]]:
    return run_distributed(1, initial, STARTED, VOCAB)[0]


@pytest.mark.parametrize(("index", "projections"), [(0, 6), (1, 6), (2, 2)])
def test_projections_into_the_stream_add_a_variance_of_init_std_squared_in_all(
    index: int, projections: int, started: list[dict[str, Tensor]]
) -> None:
    into = {
        name: values
        for name, values in started[index].items()
        if name.endswith(("out_proj.weight", "linear_proj.weight", "linear_fc2.weight"))
    }
    assert len(into) == projections
    # 65536 elements or more each: the sum of their squares differs by 0.6 % from its mean, as a standard deviation.
    for name, values in into.items():
        assert float(values.square().mean()) * projections == pytest.approx(0.02**2, rel=0.03), name
    assert float(started[index]["embedding.word_embeddings.weight"][:VOCAB].std()) == pytest.approx(0.02, rel=0.03)


def test_mixers_start_as_those_of_mamba_2(started: list[dict[str, Tensor]]) -> None:
    mixer = "decoder.layers.0.self_attention.mixer"
    values = {name.removeprefix(f"{mixer}."): each for name, each in started[0].items() if name.startswith(mixer)}
    uniform = {  # each with the bounds that it must come near to, with 64 numbers or more
        "A": (values["A_log"].exp(), 1.0, 16.0),
        "log of the step size": (torch.nn.functional.softplus(values["dt_bias"]).log(), math.log(1e-3), math.log(0.1)),
        "convolution": (values["conv_weight"], -0.5, 0.5),
        "its bias": (values["conv_bias"], -0.5, 0.5),
    }
    for name, (found, low, high) in uniform.items():
        width = high - low
        assert low <= float(found.min()) < low + width / 8 and high - width / 8 < float(found.max()) <= high, name
        assert float(found.mean()) == pytest.approx((low + high) / 2, abs=width / 8), name
    assert (values["D"] == 1).all()
    assert len(values["conv_bias"].unique()) == len(values["conv_bias"]) == 256 + 2 * 32
    biases = [each for name, each in started[0].items() if name.endswith(("linear_qkv.bias", "linear_proj.bias"))]
    assert len(biases) == 4 and not any(each.any() for each in biases), "those of attention start at 0"


def test_a_model_without_attention_needs_no_heads_that_fit_its_width() -> None:
    """8 heads, the default, do not divide 36."""
    sizes = FalconH1Config(num_layers=2, layers="M-", hidden_size=36, ffn_hidden_size=16, seq_length=8)
    loss, heads = run_distributed(1, without_attention, sizes, 16)[0]
    assert loss == pytest.approx(math.log(100), rel=0.1) and heads == 1


@pytest.mark.parametrize("kinds", ["HHHH", "M-H*", "MMMM", "*-*-"])
def test_operations_are_counted_from_the_weights_and_the_two_mixings_of_tokens(kinds: str) -> None:
    attention = {"head_dim": 6, "num_attention_heads": 12, "num_query_groups": 2}
    mixer = {"ssm_heads": 8, "ssm_head_dim": 6, "ssm_state_size": 10, "ssm_groups": 2, "ssm_kernel": 3}
    sizes = FalconH1Config(
        num_layers=4,
        layers=kinds,
        hidden_size=48,
        seq_length=24,
        **(attention if set(kinds) & set("H*") else {}),
        **(mixer if set(kinds) & set("HM") else {}),
    )
    products = sum(
        math.prod(weight.shape)
        for weight in weights(sizes, VOCAB)
        if len(weight.shape) > 1 and weight.role != "embedding"
    )
    attention, mixers = sum(kinds.count(each) for each in "H*"), sum(kinds.count(each) for each in "HM")
    # q k^T and p v of 12 heads of 6 over half of 24 tokens; decay, addition and reading of a state of 8 x 6 x 10.
    forward = attention * 2 * 2 * (12 * 6) * 12 + mixers * 3 * 2 * (8 * 6 * 10)
    assert flops_per_token(sizes, VOCAB) == 6 * products + 3 * forward
    assert set(resolve("all", sizes.roles)) <= {weight.role for weight in weights(sizes, VOCAB)}
