"""Configuration of a Falcon-H1 model, the section `model` of a run with `model.architecture: falcon_h1`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal, get_args

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
_KEYS = {
    "attention": (
        "num_attention_heads",
        "head_dim",
        "num_query_groups",
        "rotary_base",
        "rotary_scaling",
        "no_rope_layers",
        "attention_bias",
        "qk_norm",
    ),
    "MLP": ("ffn_hidden_size", "mlp_bias"),
    "mixer": (
        "ssm_heads",
        "ssm_head_dim",
        "ssm_state_size",
        "ssm_groups",
        "ssm_kernel",
        "ssm_chunk",
        "ssm_norm",
        "ssm_conv_bias",
        "ssm_kernels",
    ),
}
"""Keys that are only of one block, by block."""
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
    ssm_kernels: Literal["auto", "torch", "fused"] = "auto"
    """Kernels of the mixer's convolution and recurrence. `fused`: those of the packages causal-conv1d and mamba-ssm, on
    a CUDA GPU. `torch`: plain torch. `auto`: fused where they can be used, else torch; the start of a run says
    which."""

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
            self.ssm_kernels,
        )

    @property
    def layer_kinds(self) -> str:
        """Letter of each layer's kind."""
        return "H" * self.num_layers if self.layers is None else self.layers

    @property
    def attention_layers(self) -> list[int]:
        """Indices of the layers that have attention."""
        return [i for i, kind in enumerate(self.layer_kinds) if kind in "H*"]

    @property
    def mlp_layers(self) -> list[int]:
        """Indices of the layers that have an MLP."""
        return [i for i, kind in enumerate(self.layer_kinds) if kind in "H-"]

    @property
    def mixer_layers(self) -> list[int]:
        """Indices of the layers that have a mixer."""
        return [i for i, kind in enumerate(self.layer_kinds) if kind in "HM"]

    @property
    def projections_into_stream(self) -> int:
        """Number of projections into the residual stream: three of a layer with attention, mixer and MLP, one of any
        other."""
        return len(self.attention_layers) + len(self.mlp_layers) + len(self.mixer_layers)

    @property
    def roles(self) -> tuple[Role, ...]:
        """Roles that the model's tensors can have: those of its kinds of layers only."""
        absent = {
            *(IN_MIXER if not self.mixer_layers else ()),
            *(_IN_ATTENTION if not self.attention_layers else ()),
            *(_IN_MLP if not self.mlp_layers else ()),
            "ssm_out" if self.ssm_norm != "none" else "ssm_out_normed",
            *(("ssm_norm",) if self.ssm_norm == "none" else ()),
        }
        return tuple(role for role in (*TRANSFORMER, *IN_MIXER) if role not in absent)

    @property
    def unused_roles(self) -> dict[Role, str]:
        """Roles that no tensor has with these options, and the options that are the reason."""
        found = super().unused_roles
        if self.ssm_conv_bias and self.mixer_layers:
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
        self._check_blocks()
        require(
            self.ssm_norm in get_args(InnerNorm),
            f"model.ssm_norm is {self.ssm_norm!r}: use one of {', '.join(get_args(InnerNorm))}",
        )
        without = [i for i in self.layers_without_rope if i not in self.attention_layers]
        require(
            not without,
            f"model.no_rope_layers has {', '.join(map(str, without))}, and these layers have no attention: leave them "
            "out",
        )

    def _check_blocks(self) -> None:
        """Check that no key has a value for a block that the model lacks, and raise one ValueError with all of them."""
        defaults = {each.name: each.default for each in fields(self)}
        layers = {"attention": self.attention_layers, "MLP": self.mlp_layers, "mixer": self.mixer_layers}
        found = []
        for block, keys in _KEYS.items():
            given = [f"model.{key}" for key in keys if getattr(self, key) != defaults[key]]
            if given and not layers[block]:
                found.append(f"there is no {block}, and then {', '.join(given)} has no effect")
        require(not found, f"model.layers is {self.layers!r}: {'; '.join(found)}: leave it out")

    def check_sharding(self, tensor: int, sequence: bool) -> None:
        """Check that a model of these sizes can be sharded over `tensor` tensor-parallel ranks.

        Raises:
            ValueError: a size cannot be sharded over `tensor` ranks.
        """
        super().check_sharding(tensor, sequence)
        if self.mixer_layers:
            self.mixer.check_sharding(tensor)
