"""config.json says what the model is, in both directions; what the model is not is refused by the field's name.

The reference for the meaning of fields, and of absent ones, is transformers' own configuration class of each family.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import transformers
from transformers import LlamaConfig

from megamult.models.llama.config import ModelConfig
from megamult.models.llama.families import FAMILIES
from megamult.models.llama.hf_config import from_hugging_face, to_hugging_face

# No value is a default, neither ours nor transformers'.
MODEL = ModelConfig(
    num_layers=3,
    hidden_size=48,
    num_attention_heads=6,
    num_query_groups=2,
    ffn_hidden_size=100,
    seq_length=96,
    vocab_size=321,
    rotary_base=500000.0,
    norm_eps=3e-5,
    init_std=0.03,
    tie_embeddings=True,
)


def described(**changes: Any) -> dict[str, Any]:
    ids = {"bos_token_id": 5, "eos_token_id": [6, 7]}
    return to_hugging_face(MODEL, 321, tied=True, dtype="bfloat16", token_ids=ids) | changes


def test_transformers_understands_every_field() -> None:
    theirs = LlamaConfig(**described())
    assert (theirs.num_hidden_layers, theirs.hidden_size, theirs.intermediate_size) == (3, 48, 100)
    assert (theirs.num_attention_heads, theirs.num_key_value_heads, theirs.head_dim) == (6, 2, 8)
    assert (theirs.vocab_size, theirs.max_position_embeddings, theirs.tie_word_embeddings) == (321, 96, True)
    assert (theirs.rms_norm_eps, theirs.initializer_range, theirs.hidden_act) == (3e-5, 0.03, "silu")
    assert theirs.rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}
    assert (theirs.bos_token_id, theirs.eos_token_id, str(theirs.dtype)) == (5, [6, 7], "torch.bfloat16")
    assert theirs.architectures == ["LlamaForCausalLM"]


def test_a_tokenizer_without_special_tokens_has_none_in_the_config() -> None:
    theirs = LlamaConfig(**to_hugging_face(MODEL, 321, tied=False, dtype="float32", token_ids={}))
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.tie_word_embeddings) == (None, None, False)


def test_import_inverts_export_through_transformers_own_file() -> None:
    assert from_hugging_face(described()) == MODEL
    assert from_hugging_face(LlamaConfig(**described()).to_dict()) == MODEL


def test_every_spelling_of_the_rotary_base_is_read() -> None:
    without = {key: value for key, value in described().items() if not key.startswith("rope")}
    for spelling in (
        {"rope_theta": 700.0},
        {"rope_theta": 700, "rope_scaling": None},
        {"rope_theta": 700.0, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 700.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 700.0}, "rope_theta": None},
        {"rope_parameters": {"rope_theta": 700.0, "rope_type": "default", "partial_rotary_factor": 1.0}},
    ):
        assert from_hugging_face(without | spelling).rotary_base == 700.0
        # The reference: what transformers makes of it.
        assert LlamaConfig(**(without | spelling)).rope_parameters["rope_theta"] == 700.0
    assert from_hugging_face(without).rotary_base == LlamaConfig(**without).rope_parameters["rope_theta"]


def config_class(family: str) -> Any:
    return getattr(transformers, FAMILIES[family].hugging_face_class.replace("ForCausalLM", "Config"))


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_fields_have_transformers_defaults(family: str) -> None:
    # Mistral's default is a window, which our model does not have.
    bare = {"model_type": family, "architectures": [FAMILIES[family].hugging_face_class], "sliding_window": None}
    # transformers writes no tie_word_embeddings that is its default.
    theirs = {"tie_word_embeddings": config_class(family)().tie_word_embeddings} | config_class(family)(
        **bare
    ).to_dict()
    assert from_hugging_face(bare) == from_hugging_face(theirs)
    ours = from_hugging_face(bare | {"num_attention_heads": 16, "hidden_size": 64, "num_key_value_heads": None})
    assert ours.num_query_groups == 16


def test_mistrals_default_window_is_seen() -> None:
    with pytest.raises(ValueError, match="sliding_window is 4096: attention here sees the whole sequence"):
        from_hugging_face({"model_type": "mistral"})


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Options, and the first family that can express them.
EXPRESSED: list[tuple[dict[str, Any], str]] = [
    ({}, "llama"),
    ({"head_dim": 16, "attention_bias": "all", "mlp_bias": True, "rotary_scaling": LLAMA3}, "llama"),
    ({"num_attention_heads": 10, "head_dim": 4}, "mistral"),  # LlamaConfig refuses a head that is no whole number
    ({"attention_bias": "qkv"}, "qwen2"),
    ({"qk_norm": True}, "qwen3"),
    ({"qk_norm": True, "attention_bias": "all", "head_dim": 6}, "qwen3"),
    ({"no_rope_layers": [1]}, "smollm3"),
    ({"no_rope_layers": [0, 2], "attention_bias": "all", "mlp_bias": True, "head_dim": 4}, "smollm3"),
]


@pytest.mark.parametrize(("options", "family"), EXPRESSED)
def test_the_first_family_that_can_express_a_model_does(options: dict[str, Any], family: str) -> None:
    model = replace(MODEL, **options)
    content = to_hugging_face(model, 321, tied=True, dtype="bfloat16", token_ids={})
    assert content["model_type"] == family
    assert from_hugging_face(content) == model
    theirs = config_class(family)(**content)
    assert from_hugging_face(theirs.to_dict() | {"tie_word_embeddings": theirs.tie_word_embeddings}) == model
    if model.rotary_scaling is not None:
        assert theirs.rope_parameters == {**LLAMA3, "rope_theta": 500000.0}


def test_what_no_family_can_express_is_refused_by_name() -> None:
    model = replace(MODEL, qk_norm=True, mlp_bias=True)
    message = "llama has no model.qk_norm True; .*qwen3 has no model.mlp_bias True; .*trained but not exported"
    with pytest.raises(ValueError, match=message):
        to_hugging_face(model, 321, tied=True, dtype="bfloat16", token_ids={})


def test_both_spellings_of_a_scaling_are_read_and_must_agree() -> None:
    bare = {key: value for key, value in described().items() if not key.startswith("rope")}
    old = {"rope_theta": 700.0, "rope_scaling": LLAMA3}
    new = {"rope_parameters": {"rope_theta": 700.0, **LLAMA3}}
    without = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    for spelling in (old, new, old | new, {"rope_theta": 700.0, "rope_scaling": {**without, "type": "llama3"}}):
        ours = from_hugging_face(bare | spelling)
        # As transformers: without a length of its own, the scaling is relative to max_position_embeddings.
        length = 64 if "original_max_position_embeddings" in str(spelling) else 96
        assert (ours.rotary_base, ours.rotary_scaling) == (
            700.0,
            {**LLAMA3, "original_max_position_embeddings": length},
        )
        theirs = LlamaConfig(**(bare | {key: dict(v) if isinstance(v, dict) else v for key, v in spelling.items()}))
        assert theirs.rope_parameters["original_max_position_embeddings"] == length
    other = {"rope_scaling": {**LLAMA3, "factor": 32.0}}
    with pytest.raises(ValueError, match=r"different values, rope_parameters .*8\.0.* and rope_scaling .*32\.0.*keep"):
        from_hugging_face(bare | new | other)
    with pytest.raises(
        ValueError, match=r"different values, rope_theta 1.0 and rope_parameters.rope_theta 700.0: keep"
    ):
        from_hugging_face(bare | new | {"rope_theta": 1.0})


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ValueError) as refused:
        from_hugging_face(described(hidden_act="gelu", vocab_size=0, rms_norm_eps=-1, sliding_window=8, mlp_bias="yes"))
    for name in ("hidden_act", "vocab_size", "rms_norm_eps", "sliding_window", "mlp_bias"):
        assert f"{name} is " in str(refused.value)


@pytest.mark.parametrize(
    ("family", "changes", "refused"),
    [
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8}, False),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, False),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, True),
        ("qwen3", {"use_sliding_window": True, "sliding_window": None}, False),
        ("mistral", {"sliding_window": 8}, True),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 8, "no_rope_layers": [1, 1, 1]}, False),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 8, "no_rope_layers": [1, 1, 0]}, True),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 8, "no_rope_layer_interval": 4}, False),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 8, "no_rope_layer_interval": 3}, True),
    ],
)
def test_a_window_is_refused_exactly_if_a_layer_has_it(family: str, changes: dict[str, Any], refused: bool) -> None:
    content = {"model_type": family, "num_hidden_layers": 3, **changes}
    theirs = config_class(family)(**content)
    kinds = getattr(theirs, "layer_types", None)
    slides = theirs.sliding_window is not None if kinds is None else "sliding_attention" in kinds
    assert slides == refused
    try:
        from_hugging_face(content)
    except ValueError as error:
        assert refused and "sliding_window is 8" in str(error)
    else:
        assert not refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is ['LlamaForSequenceClassification']"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'silu'"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes': it must be true or false"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1, not 0"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is ['full_attention', 'sl"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters.low_freq_factor is None: give"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling.rope_type is 'dynamic': use one of linear",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling {'type': 'linear', 'factor': 2.0}: keep"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters is"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters is {'full_attention'"),
        ({"rope_parameters": [1]}, "rope_parameters is [1], not a mapping"),
        ({"rope_theta": 1e4}, "config.json: the base of the rotary embedding has different values"),
        ({"rope_theta": "big"}, "rope_theta is 'big': it must be a positive number"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps is inf"),
        ({"hidden_size": 50, "head_dim": None}, "head_dim is 8 with num_attention_heads 6 and hidden_size 50"),
        ({"hidden_size": 54, "head_dim": 9}, "head_dim is 9"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4: it must divide num_attention_heads (6)"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0: it must be a positive whole number"),
        ({"vocab_size": "321"}, "vocab_size is '321'"),
        ({"hidden_size": 48.0}, "hidden_size is 48.0"),
    ],
)
def test_what_the_model_cannot_express_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        from_hugging_face(described(**changes))


def test_fields_that_change_nothing_are_let_pass() -> None:
    more = {"pretraining_tp": 2, "use_cache": False, "transformers_version": "4.30.0", "pad_token_id": 0, "my_own": 1}
    assert from_hugging_face(described(**more, hidden_act="swish", sliding_window=None)) == MODEL
