"""Rules of :func:`megamult.fold` for Hugging Face's Falcon-H1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.nn import Parameter

from megamult.integrations.llama import LLAMA_RULES
from megamult.integrations.rules import FromModule, IfPresent, Rule
from megamult.models.common.mamba2 import parameters
from megamult.models.common.mamba2.sizes import MixerSizes
from megamult.parameters.spec import ParameterSpec, Role


def _sizes(mixer: Any) -> MixerSizes:
    """Return the sizes of transformers' FalconH1Mixer."""
    return MixerSizes(mixer.num_heads, mixer.head_dim, mixer.ssm_state_size, mixer.n_groups, mixer.conv_kernel_size)


def _in_projection(parameter: Parameter, mixer: Any) -> ParameterSpec:
    return _whole(parameters.in_projection(_sizes(mixer), mixer.hidden_size))


def _convolution(parameter: Parameter, mixer: Any) -> ParameterSpec:
    return _whole(parameters.convolution(_sizes(mixer)))


def _out_projection(parameter: Parameter, mixer: Any) -> Role:
    return "ssm_out_normed" if mixer.mamba_rms_norm else "ssm_out"


def _whole(spec: ParameterSpec) -> ParameterSpec:
    """Return the spec of a parameter that transformers' model has whole on every rank."""
    return replace(spec, shardings=(), reduce_over=())


FALCON_H1_RULES: dict[str, Rule] = {
    **LLAMA_RULES,
    r"\bmamba\.in_proj\.weight$": FromModule(_in_projection),
    r"\bmamba\.conv1d\.weight$": FromModule(_convolution),
    r"\bmamba\.out_proj\.weight$": FromModule(_out_projection),
    r"\bmamba\.A_log$": "ssm_a",
    r"\bmamba\.D$": "ssm_d",
    r"\bmamba\.dt_bias$": "ssm_dt_bias",
    r"\bmamba\.norm\.weight$": IfPresent("ssm_norm"),
    r"\b(conv1d|\w+_proj)\.bias$": IfPresent("bias"),
}
"""Rules for Hugging Face's FalconH1ForCausalLM. The five matrices of a mixer's input projection (z, x, B, C and dt)
have multipliers of their own, and Muon orthogonalizes each by itself. The convolution's weights and the vectors have
neither multipliers nor weight decay. An inner norm and biases have roles of their own if the model has them. The
model's own forward multipliers stay: they are constants beside the learned ones."""
