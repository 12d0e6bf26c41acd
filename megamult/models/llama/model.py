"""Megatron-Core's GPTModel with our embedding and head: padded vocabulary, z-loss, initialization free of layout."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megamult.config import Config
from megamult.distributed import device
from megamult.layers import MultiplierVocabParallelEmbedding
from megamult.models.common.initialization import initialize
from megamult.models.common.loss import VocabParallelCrossEntropy
from megamult.models.common.norm import RMSNorm
from megamult.models.llama.layer import gpt_layer_spec
from megamult.parameters import megatron
from megamult.parameters.axes import tensor_shard
from megamult.parameters.roles import Placement, resolve
from megamult.parameters.spec import Role
from megamult.parameters.stated import set_spec

VOCABULARY_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this whatever the tensor-parallel size, so the model never depends on
it."""


def padded_vocab_size(vocab_size: int) -> int:
    """The smallest multiple of :data:`VOCABULARY_MULTIPLE` that holds `vocab_size`."""
    return math.ceil(vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


class GPT(GPTModel):
    """A decoder-only language model; forward takes tokens and labels and returns losses.

    Args:
        config: of the run.
        vocab_size: exact number of tokens.
        seed: of the weights; the same model for every layout. None: weights are NaN until a checkpoint is loaded.
        note: told what is being done, a parameter at a time.
    """

    def __init__(
        self, config: Config, vocab_size: int, seed: int | None, note: Callable[[str], None] = lambda doing: None
    ) -> None:
        model, multipliers = config.model, config.multipliers
        transformer = transformer_config(config)
        placement: Placement = resolve(multipliers.placement) if multipliers.implementation == "layer" else {}
        spec = gpt_layer_spec(
            transformer,
            {role: sorted(sides) for role, sides in placement.items()},
            grad_sync="step",
            recompute=config.train.recompute == "full",
        )
        padded = padded_vocab_size(vocab_size)
        super().__init__(
            transformer,
            TransformerBlockSubmodules(layer_specs=[spec] * model.num_layers, layer_norm=RMSNorm),
            vocab_size=padded,
            max_sequence_length=model.seq_length,
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=model.rotary_base,
        )
        # GPTModel names the classes of embedding and head itself, so they are replaced after it has built them, of
        # memory that nobody has written to.
        self.embedding.word_embeddings = MultiplierVocabParallelEmbedding(
            padded,
            model.hidden_size,
            init_method=_nothing,
            config=transformer,
            vocab_size=vocab_size,
            placement=placement,
            grad_sync="step",
            reduce_scatter_embeddings=transformer.sequence_parallel,
            tp_group=self.pg_collection.tp,
        )
        if not model.tie_embeddings:
            self.output_layer = Head(vocab_size, padded, transformer, self.pg_collection.tp)
        self.setup_embeddings_and_output_layer()
        # zero.Init casts what is made under it to the parameters' dtype; rotary angles need fp32.
        dim = transformer.kv_channels
        exponents = torch.arange(0, dim, 2, device=device.local_device()).to(torch.float64) / dim
        self.rotary_pos_emb.inv_freq = (1.0 / model.rotary_base**exponents).to(torch.float32)
        self.exact_vocab_size = vocab_size
        self.z_loss = model.z_loss
        tensor = self.pg_collection.tp
        initialize(self, standard_deviations(config), seed, tensor_shard(tensor.rank(), tensor.size()), note)

    def forward(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of a micro-batch.

        Args:
            tokens, labels: [batch, seq] ids.

        Returns:
            The objective (with z-loss) and the cross entropy (without, no gradient): scalars, means over the
            micro-batch's tokens, nats.
        """
        return super().forward(tokens, None, None, labels=labels)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """labels: [batch, seq]; logits: [seq, batch, padded vocabulary/tp]. Returns what forward returns."""
        entropy, log_sum_exp = VocabParallelCrossEntropy.apply(
            logits, labels.transpose(0, 1), self.exact_vocab_size, self.pg_collection.tp
        )
        objective = entropy.mean()
        if self.z_loss:
            objective = objective + self.z_loss * log_sum_exp.square().mean()
        return objective, entropy.detach().mean()


class Head(ColumnParallelLinear):
    """The LM head: no multipliers (the final norm's weights are its column multipliers), padded rows zero."""

    def __init__(
        self,
        vocab_size: int,
        padded: int,
        config: TransformerConfig,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(
            config.hidden_size,
            padded,
            config=config,
            init_method=_nothing,
            bias=False,
            gather_output=False,
            tp_group=tp_group,
        )
        set_spec(self.weight, megatron.vocabulary("head", vocab_size, padded, config.hidden_size))


def _nothing(weight: Tensor) -> Tensor:
    """The init method of layers whose weights are set once the model is complete."""
    return weight


def standard_deviations(config: Config) -> dict[Role, float]:
    """Standard deviations of initial weights by role; projections into the residual stream shrink with depth."""
    std = config.model.init_std
    into_stream = std / math.sqrt(2 * config.model.num_layers)
    roles: tuple[Role, ...] = ("q", "k", "v", "gate", "up", "embedding", "head")
    return dict.fromkeys(roles, std) | {"attention_out": into_stream, "down": into_stream}


def transformer_config(config: Config) -> TransformerConfig:
    """Megatron's configuration of this run's transformer. Its layers allocate their weights where they will be used,
    and leave them as they are."""
    model = config.model
    dtype = config.train.torch_dtype
    fused = device.has_cuda()  # Megatron's fusions compile, which on a CPU takes longer than it saves
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        ffn_hidden_size=model.ffn_hidden_size,
        tensor_model_parallel_size=config.parallel.tensor,
        sequence_parallel=config.parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=False,
        perform_initialization=False,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )
