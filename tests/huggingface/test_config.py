"""config.json says what the model is, in both directions; what the model is not is refused by the field's name."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from transformers import LlamaConfig

from megamult.models.llama.config import ModelConfig
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


def test_absent_fields_have_transformers_defaults() -> None:
    bare = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    assert from_hugging_face(bare) == from_hugging_face(LlamaConfig(**bare).to_dict())
    ours = from_hugging_face(bare | {"num_attention_heads": 16, "hidden_size": 64})
    assert (ours.num_query_groups, ours.tie_embeddings) == (16, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', not 'llama'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is ['LlamaForSequenceClassification']"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'silu'"),
        ({"attention_bias": True}, "attention_bias is True, not False: no matrix here has a bias"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1, not 0"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is ['full_attention', 'sl"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters is {'rope_type': 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is {'type': 'linear', 'factor': 2.0}"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters is"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters is {'full_attention'"),
        ({"rope_parameters": [1]}, "rope_parameters is [1], not a mapping"),
        ({"rope_theta": 1e4}, "config.json gives different bases of the rotary embedding"),
        ({"rope_theta": "big"}, "rope_theta is 'big': it must be a positive number"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps is inf"),
        ({"head_dim": 16}, "head_dim is 16 with num_attention_heads 6 and hidden_size 48"),
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
