"""List of a Falcon-H1 model's weights: logical name, name in Hugging Face's class, role and shape of each."""

from __future__ import annotations

from collections.abc import Iterator

from megamult.models.common import hf_names
from megamult.models.common.hugging_face import Weight
from megamult.models.common.mamba2.roles import IN_PROJECTION
from megamult.models.falcon_h1.config import FalconH1Config
from megamult.parameters.spec import Role


def weights(sizes: FalconH1Config, vocab_size: int) -> Iterator[Weight]:
    """Yield all weights; the last is the head, even if it is tied to the embedding.

    Hugging Face's names are those of FalconH1ForCausalLM, whose layers are all of kind H. Other kinds have names of the
    same form, and no class of transformers.

    Args:
        sizes: sizes of the model.
        vocab_size: exact number of tokens, without padding.
    """
    yield hf_names.embedding(sizes, vocab_size)
    for i, kind in enumerate(sizes.layer_kinds):
        ours, theirs = f"decoder.layers.{i}", f"model.layers.{i}"
        if kind != "-":
            yield hf_names.norm(sizes, f"{ours}.input_layernorm", f"{theirs}.input_layernorm")
        if kind in "HM":
            yield from _mixer(sizes, f"{ours}.self_attention.mixer.", f"{theirs}.mamba.")
        if kind in "H*":
            yield from hf_names.attention(sizes, f"{ours}.self_attention.attention", f"{theirs}.self_attn")
        if kind in "H-":
            yield hf_names.norm(sizes, f"{ours}.pre_mlp_layernorm", f"{theirs}.pre_ff_layernorm")
            yield from hf_names.mlp(sizes, f"{ours}.mlp", f"{theirs}.feed_forward")
    yield from hf_names.ending(sizes, vocab_size, "model.final_layernorm")


def _mixer(sizes: FalconH1Config, ours: str, theirs: str) -> Iterator[Weight]:
    mixer, hidden = sizes.mixer, sizes.hidden_size
    names = ("z", "x", "b", "c", "dt")
    for name, role, rows in zip(names, IN_PROJECTION, mixer.rows, strict=True):
        yield Weight(f"{ours}in_proj.{name}.weight", f"{theirs}in_proj.weight", role, (rows, hidden))
    for name, rows in zip(names[1:4], mixer.rows[1:4], strict=True):
        yield Weight(f"{ours}{name}.conv_weight", f"{theirs}conv1d.weight", "ssm_conv", (rows, 1, mixer.kernel))
    if mixer.conv_bias:
        for name, rows in zip(names[1:4], mixer.rows[1:4], strict=True):
            yield Weight(f"{ours}{name}.conv_bias", f"{theirs}conv1d.bias", "bias", (rows,))
    vectors: list[tuple[str, Role]] = [("dt_bias", "ssm_dt_bias"), ("A_log", "ssm_a"), ("D", "ssm_d")]
    for name, role in vectors:
        yield Weight(f"{ours}{name}", f"{theirs}{name}", role, (mixer.heads,), fp32=True)
    if mixer.norm != "none":
        yield Weight(f"{ours}norm_weight", f"{theirs}norm.weight", "ssm_norm", (mixer.inner,))
    out: Role = "ssm_out" if mixer.norm == "none" else "ssm_out_normed"
    yield Weight(f"{ours}out_proj.weight", f"{theirs}out_proj.weight", out, (hidden, mixer.inner))
