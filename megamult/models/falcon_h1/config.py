"""Configuration of a Falcon-H1 model, the section `model` of a run with `model.architecture: falcon_h1`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

from megamult.models.common.config import DecoderConfig
from megamult.models.common.mamba2.roles import IN_MIXER, IN_PROJECTION
from megamult.models.common.mamba2.sizes import InnerNorm, MixerSizes
from megamult.parameters.roles import TRANSFORMER
from megamult.parameters.spec import Role
from megamult.settings import fixed
from megamult.validation import positive, require

LAYERS = {
    "H": "attention and mixer side by side, then an MLP",
    "M": "a mixer",
    "*": "attention",
    "-": "an MLP",
}
"""Letters of `model.layers`; all but H are those of Megatron-Core's hybrid models."""
_IN_ATTENTION = ("q", "k", "v", "attention_out", "q_norm", "k_norm")
_IN_MLP = ("gate", "up", "down")


@dataclass
class FalconH1Config(DecoderConfig):
    """Sizes and constants of a Falcon-H1 model."""

    fused: ClassVar[tuple[tuple[str, ...], ...]] = (*DecoderConfig.fused, IN_PROJECTION)

    architecture: str = "falcon_h1"
    """Architecture of the model; the other keys of this section depend on it."""
    layers: str | None = fixed(None, "function", attribute="layer_kinds")
    """Kind of each layer, one letter each: H (attention and Mamba-2 mixer side by side on one norm's output, their
    outputs summed, then an MLP), M (a mixer), * (attention), - (an MLP). null means H for all num_layers."""
    ssm_heads: int = fixed(8, "function")
    """Number of heads of the mixer."""
    ssm_head_dim: int = fixed(32, "function")
    """Channels of a head of the mixer."""
    ssm_state_size: int = fixed(16, "function")
    """Size of the state of one channel."""
    ssm_groups: int = fixed(1, "function")
    """Number of groups of the mixer's heads; the heads of a group have B and C in common."""
    ssm_kernel: int = fixed(4, "function")
    """Tokens that the mixer's convolution reads: the present one and those before it."""
    ssm_chunk: int = 128
    """Tokens of a chunk in which the mixer computes. The result does not depend on it."""
    ssm_norm: InnerNorm = fixed("none", "function")
    """RMSNorm of the mixer's output over the channels of each group: `none`, `before_gate` or `after_gate`."""
    ssm_conv_bias: bool = fixed(True, "function")
    """Whether the mixer's convolution has a bias."""

    @property
    def mixer(self) -> MixerSizes:
        """Sizes of the mixer."""
        return MixerSizes(
            self.ssm_heads,
            self.ssm_head_dim,
            self.ssm_state_size,
            self.ssm_groups,
            self.ssm_kernel,
            self.ssm_chunk,
            self.ssm_norm,
            self.ssm_conv_bias,
        )

    @property
    def layer_kinds(self) -> str:
        """Letter of each layer's kind."""
        return "H" * self.num_layers if self.layers is None else self.layers

    @property
    def projections_into_stream(self) -> int:
        """Number of projections into the residual stream: three of a layer with attention, mixer and MLP, one of any
        other."""
        return sum(3 if kind == "H" else 1 for kind in self.layer_kinds)

    @property
    def roles(self) -> tuple[Role, ...]:
        """Roles that the model's tensors can have: those of its kinds of layers only."""
        kinds = set(self.layer_kinds)
        absent = {
            *(IN_MIXER if not kinds & set("HM") else ()),
            *(_IN_ATTENTION if not kinds & set("H*") else ()),
            *(_IN_MLP if not kinds & set("H-") else ()),
            "ssm_out" if self.ssm_norm != "none" else "ssm_out_normed",
            *(("ssm_norm",) if self.ssm_norm == "none" else ()),
        }
        return tuple(role for role in (*TRANSFORMER, *IN_MIXER) if role not in absent)

    @property
    def unused_roles(self) -> dict[Role, str]:
        """Roles that no tensor has with these options, and the options that are the reason."""
        found = super().unused_roles
        if self.ssm_conv_bias and set(self.layer_kinds) & set("HM"):
            found.pop("bias", None)
        elif "bias" in found:
            found["bias"] += ", and no mixer has a bias"
        return found

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(
            "model",
            ssm_heads=self.ssm_heads,
            ssm_head_dim=self.ssm_head_dim,
            ssm_state_size=self.ssm_state_size,
            ssm_groups=self.ssm_groups,
            ssm_kernel=self.ssm_kernel,
            ssm_chunk=self.ssm_chunk,
        )
        kinds, known = self.layer_kinds, "; ".join(f"{letter}: {what}" for letter, what in LAYERS.items())
        require(
            len(kinds) == self.num_layers and set(kinds) <= set(LAYERS),
            f"model.layers is {self.layers!r} with model.num_layers {self.num_layers}: give one letter for each layer "
            f"({known})",
        )
        require(
            self.ssm_norm in get_args(InnerNorm),
            f"model.ssm_norm is {self.ssm_norm!r}: use one of {', '.join(get_args(InnerNorm))}",
        )
        without = [i for i in self.layers_without_rope if kinds[i] not in "H*"]
        require(
            not without,
            f"model.no_rope_layers has {', '.join(map(str, without))}, and these layers have no attention: leave them "
            "out",
        )

    def check_sharding(self, tensor: int, sequence: bool) -> None:
        """Check that a model of these sizes can be sharded over `tensor` tensor-parallel ranks.

        Raises:
            ValueError: a size cannot be sharded over `tensor` ranks.
        """
        super().check_sharding(tensor, sequence)
        if set(self.layer_kinds) & set("HM"):
            self.mixer.check_sharding(tensor)
