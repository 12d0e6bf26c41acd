"""Keys that the configurations of all decoders share: attention, MLP, norms and vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, get_args

from megamult.models.common import rotary
from megamult.models.common.norm_weight import NormWeight
from megamult.models.common.vocabulary import VOCABULARY_MULTIPLE
from megamult.parameters.by_role import ByRole, by_role_mistakes
from megamult.parameters.roles import TRANSFORMER
from megamult.parameters.spec import Role
from megamult.settings import fixed
from megamult.validation import not_negative, positive, require

AttentionBias = Literal["none", "qkv", "all"]
"""Projections of attention that have a bias: none; those of Q, K and V; or these and the output projection too."""


@dataclass
class DecoderConfig:
    """Sizes and constants of a decoder. Each architecture has a subclass, the section `model` of its runs."""

    fused: ClassVar[tuple[tuple[str, ...], ...]] = (("q", "k", "v"), ("gate", "up"))
    """Roles of the matrices that are stored in one parameter."""

    architecture: str
    """Architecture of the model; the other keys of this section depend on it."""
    num_layers: int = fixed(4, "function")
    """Number of layers."""
    hidden_size: int = fixed(256, "function")
    """Width of the residual stream."""
    num_attention_heads: int = fixed(8, "function")
    """Number of query heads."""
    head_dim: int | None = fixed(None, "function", attribute="head_size")
    """Size of an attention head. null means hidden_size / num_attention_heads."""
    num_query_groups: int | None = fixed(None, "function", attribute="query_groups")
    """Number of key-value heads (grouped-query attention). null means one for each query head."""
    ffn_hidden_size: int = fixed(704, "function")
    """Width of the gated MLP."""
    seq_length: int = fixed(256, "samples")
    """Number of tokens in a sequence."""
    vocab_size: int | None = None
    """Exact vocabulary size. null means the size of the tokenizer's vocabulary. The model pads the size to a
    multiple of 128."""
    rotary_base: float = fixed(10000.0, "function")
    """Base period of the rotary embedding."""
    rotary_scaling: rotary.Scaling | None = fixed(None, "function")
    """Scaling of the rotary embedding, as in Hugging Face's rope_scaling: a mapping with rope_type linear or llama3 and
    the numbers of this type, such as {rope_type: linear, factor: 2.0}. null means no scaling."""
    no_rope_layers: list[int] | None = fixed(None, "function", attribute="layers_without_rope")
    """Indices, from 0, of the layers whose attention has no rotary positions. null means none."""
    attention_bias: AttentionBias = fixed("none", "function")
    """Projections of attention that have a bias. `qkv`: those of Q, K and V. `all`: the output projection too. Biases
    start at 0, and have neither multipliers nor weight decay."""
    mlp_bias: bool = fixed(False, "function")
    """Whether the matrices of the MLP have biases."""
    qk_norm: bool = fixed(False, "function")
    """Whether an RMSNorm with a weight of head_dim elements normalizes each head's query and key, before rotary
    positions."""
    norm_eps: float = fixed(1e-5, "function")
    """Epsilon of RMSNorm."""
    norms: NormWeight = fixed("vector", "function")
    """Weights of the norms before attention, mixer and MLP in the layers. `vector`: one weight for each feature.
    `scalar`: one for all features. `frozen`: the constant 1."""
    final_norm: NormWeight = fixed("vector", "function")
    """Weight of the norm before the LM head: `vector`, `scalar` or `frozen`, as for norms."""
    init_std: float = 0.02
    """Standard deviation of initial weights. For the projections into the residual stream (the output projections of
    attention, MLP and mixer) it is divided by the square root of their number, which is 2 * num_layers in a Llama."""
    init_std_factors: ByRole = field(default_factory=dict)
    """Factors of the standard deviations of initial weights by role, such as {down: 16}."""
    tie_embeddings: bool = fixed(False, "function")
    """Whether the LM head uses the weight of the embedding, without the embedding's multipliers."""
    z_loss: float = 1e-4
    """Coefficient of the z-loss, the squared log-sum-exp of the logits, in the objective. 0 means no z-loss."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """Roles that the model's tensors can have."""
        return TRANSFORMER

    @property
    def unused_roles(self) -> dict[Role, str]:
        """Roles that no tensor has with these options, and the options that are the reason."""
        found = {
            "norm": ("model.norms is frozen", self.norms == "frozen"),
            "final_norm": ("model.final_norm is frozen", self.final_norm == "frozen"),
            "q_norm": ("model.qk_norm is false", not self.qk_norm),
            "k_norm": ("model.qk_norm is false", not self.qk_norm),
            "bias": (
                "model.attention_bias is none and model.mlp_bias false",
                self.attention_bias == "none" and not self.mlp_bias,
            ),
        }
        return {role: why for role, (why, unused) in found.items() if unused}

    @property
    def query_groups(self) -> int:
        """Number of key-value heads."""
        return self.num_attention_heads if self.num_query_groups is None else self.num_query_groups

    @property
    def head_size(self) -> int:
        """Size of an attention head."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def layers_without_rope(self) -> list[int]:
        """Indices of the layers without rotary positions, in ascending order."""
        return sorted(self.no_rope_layers or [])

    @property
    def attention_layers(self) -> list[int]:
        """Indices of the layers that have attention."""
        return list(range(self.num_layers))

    @property
    def mlp_layers(self) -> list[int]:
        """Indices of the layers that have an MLP."""
        return list(range(self.num_layers))

    @property
    def projections_into_stream(self) -> int:
        """Number of projections into the residual stream, in all layers together."""
        return 2 * self.num_layers

    @property
    def broken_symmetries(self) -> frozenset[str]:
        """Symmetries of multipliers that this model does not have (:mod:`megamult.monitor.symmetries`).

        A bias is added after the row multipliers and is not scaled by them, and QK-norm makes every row of Q depend on
        the multipliers of the others. So the product of the two factors is not all that matters.
        """
        biased = self.attention_bias != "none"
        return frozenset(
            name
            for name, broken in (("q_k", biased or self.qk_norm), ("v_out", biased), ("up_down", self.mlp_bias))
            if broken
        )

    def __post_init__(self) -> None:
        own = fields(self)[0].default
        require(self.architecture == own, f"model.architecture is {self.architecture!r}: these are the keys of {own}")
        positive(
            "model",
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            head_dim=1 if self.head_dim is None else self.head_dim,
            num_query_groups=self.query_groups,
            ffn_hidden_size=self.ffn_hidden_size,
            seq_length=self.seq_length,
            vocab_size=1 if self.vocab_size is None else self.vocab_size,
            rotary_base=self.rotary_base,
            norm_eps=self.norm_eps,
            init_std=self.init_std,
        )
        not_negative("model", z_loss=self.z_loss)
        for key, kinds in (("norms", NormWeight), ("final_norm", NormWeight), ("attention_bias", AttentionBias)):
            require(
                getattr(self, key) in get_args(kinds),
                f"model.{key} is {getattr(self, key)!r}: use one of {', '.join(get_args(kinds))}",
            )
        self._check_positions()
        heads, groups = self.num_attention_heads, self.query_groups
        require(
            not self.attention_layers
            or self.head_dim is not None
            or (self.hidden_size % heads == 0 and self.hidden_size // heads % 2 == 0),
            f"model.hidden_size is {self.hidden_size} with model.num_attention_heads {heads}: for the rotary "
            "embedding a head's size must be a whole even number; set hidden_size to a multiple of "
            "2 * num_attention_heads, or set head_dim",
        )
        require(
            heads % groups == 0,
            f"model.num_query_groups is {groups}: it must divide model.num_attention_heads ({heads})",
        )

    def role_mistakes(self) -> list[str]:
        """Return all mistakes in the keys that name roles of the model, each as fact, value and remedy."""
        return by_role_mistakes(
            "model.init_std_factors",
            self.init_std_factors,
            self.roles,
            lambda role: bool(role.sides or role.optional),
            "model.init_std sets the initial weights of these roles only:",
            positive=True,
        )

    def _check_positions(self) -> None:
        """Check the keys of the rotary embedding, and raise one ValueError with all mistakes."""
        found = rotary.mistakes("model.rotary_scaling", self.rotary_scaling)
        if self.head_dim is not None and self.head_dim % 2:
            found.append(f"model.head_dim is {self.head_dim}: the rotary embedding needs an even number")
        layers = self.no_rope_layers or []
        wrong = [layer for layer in layers if layer not in range(self.num_layers)]
        if wrong:
            found.append(
                f"model.no_rope_layers has {', '.join(map(str, wrong))}: give indices from 0 to {self.num_layers - 1}"
            )
        if len(set(layers)) < len(layers):
            found.append(f"model.no_rope_layers is {layers}: name each layer once")
        attention = self.attention_layers
        if self.rotary_scaling is not None and attention and set(attention) <= set(layers):
            found.append("model.rotary_scaling has no effect, because no layer has rotary positions: leave it out")
        require(not found, "; ".join(found))

    def check_sharding(self, tensor: int, sequence: bool) -> None:
        """Check that a model of these sizes can be sharded over `tensor` tensor-parallel ranks.

        Args:
            tensor: tensor-parallel size.
            sequence: whether sequence parallelism is on.

        Raises:
            ValueError: a size cannot be sharded over `tensor` ranks.
        """
        require(
            not sequence or self.seq_length % tensor == 0,
            f"model.seq_length is {self.seq_length}: with parallel.sequence it must be a multiple of "
            f"parallel.tensor ({tensor})",
        )
        for key, size, layers in (
            ("num_attention_heads", self.num_attention_heads, self.attention_layers),
            ("ffn_hidden_size", self.ffn_hidden_size, self.mlp_layers),
        ):
            require(
                not layers or size % tensor == 0,
                f"model.{key} is {size}: it must be a multiple of parallel.tensor ({tensor})",
            )
        groups = self.query_groups
        require(
            not self.attention_layers or groups % tensor == 0 or tensor % groups == 0,
            f"model.num_query_groups is {groups} and parallel.tensor {tensor}: one must divide the other",
        )
        require(
            VOCABULARY_MULTIPLE % tensor == 0,
            f"parallel.tensor is {tensor}: it must divide {VOCABULARY_MULTIPLE}, the multiple that the vocabulary is "
            "padded to",
        )
