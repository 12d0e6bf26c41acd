"""Decoder on Megatron-Core's GPTModel, with padded vocabulary, z-loss, and initial weights independent of sharding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megamult.distributed import device
from megamult.layers import MultiplierColumnParallelLinear, MultiplierVocabParallelEmbedding
from megamult.models.common import documents, parameters, rotary, rotary_embedding
from megamult.models.common.architecture import PlacementSetting
from megamult.models.common.attention import SdpaAttention
from megamult.models.common.config import DecoderConfig
from megamult.models.common.initialization import initialize
from megamult.models.common.loss import VocabParallelCrossEntropy, weighted
from megamult.models.common.norm import RMSNorm
from megamult.models.common.transformer_layer import transformer_layer_spec
from megamult.models.common.vocabulary import padded_vocab_size
from megamult.parameters.axes import tensor_shard
from megamult.parameters.initial import Initial
from megamult.parameters.roles import Placement, resolve
from megamult.parameters.spec import Role


class Decoder(GPTModel):
    """A decoder-only language model. Its forward takes tokens and labels, and returns losses.

    An architecture subclasses it, with other layers (:meth:`layer_specs`) and other initial weights
    (:meth:`initial_weights`) where it has them.

    Args:
        sizes: sizes of the model.
        vocab_size: exact number of tokens, without padding.
        seed: seed of the weights. The same seed gives the same model for every sharding. If None, weights are NaN until
            a checkpoint is loaded.
        placement: sides that have multipliers in the layers: `all`, `symmetry_free` or `scalar` (explained in
            :func:`megamult.parameters.roles.placements`), or a mapping from role to row, col or scalar. `{}` means no
            multipliers.
        shared_columns: whether Q, K and V have the same column multipliers, and gate and up too, and the five matrices
            of a mixer's input projection.
        dtype: dtype of parameters and activations.
        tensor_parallel: size of the tensor-parallel groups that :func:`megamult.distributed.start.initialize` made.
        sequence_parallel: whether activations of norms and residuals are sharded over the tensor-parallel ranks, by
            position in the sequence.
        recompute: whether each layer saves only its input, and backward runs the layer's forward pass again.
        initial: initial values of the multipliers in the layers; None means ones.
        document_end: id of the token that ends a document. If it is given, the documents in one sequence do not see
            each other, and rotary positions begin anew in each of them.
        note: function that is called with a text before each parameter is drawn.

    Raises:
        ValueError: `sizes` or the placement names a role that the model does not have, `sizes` cannot be sharded over
            `tensor_parallel` ranks, the tensor-parallel group has another size than `tensor_parallel`, or a head that
            is tied to the embedding would get multipliers.
    """

    def __init__(
        self,
        sizes: DecoderConfig,
        vocab_size: int,
        seed: int | None,
        *,
        placement: PlacementSetting = "all",
        shared_columns: bool = False,
        dtype: torch.dtype = torch.float32,
        tensor_parallel: int = 1,
        sequence_parallel: bool = False,
        recompute: bool = False,
        initial: Initial | None = None,
        document_end: int | None = None,
        note: Callable[[str], None] = lambda doing: None,
    ) -> None:
        sizes.check_sharding(tensor_parallel, sequence_parallel)
        if mistakes := sizes.role_mistakes():
            raise ValueError("; ".join(mistakes))
        resolved = resolve(placement, sizes.roles)
        if sizes.tie_embeddings and resolved.get("head"):
            raise ValueError(
                "tie_embeddings is True and the placement gives multipliers to the head, which has no weight of its "
                "own: leave the head out of the placement, or set tie_embeddings to False"
            )
        transformer = transformer_config(sizes, dtype, tensor_parallel, sequence_parallel)
        layers = self.layer_specs(sizes, transformer, resolved, shared_columns=shared_columns, recompute=recompute)
        final_norm = ModuleSpec(RMSNorm, params={"weight": sizes.final_norm, "role": "final_norm"})
        padded = padded_vocab_size(vocab_size)
        super().__init__(
            transformer,
            TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm),
            vocab_size=padded,
            max_sequence_length=sizes.seq_length,
            share_embeddings_and_output_weights=sizes.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=sizes.rotary_base,
        )
        group = self.pg_collection.tp
        if group.size() != tensor_parallel:
            raise ValueError(
                f"tensor_parallel is {tensor_parallel} and the tensor-parallel group has {group.size()} ranks: give "
                "the model the size that start.initialize was given"
            )
        # GPTModel fixes the classes of embedding and head, so both modules are replaced after GPTModel has built
        # them. Their memory was allocated but not written to, so this costs almost nothing.
        self.embedding.word_embeddings = MultiplierVocabParallelEmbedding(
            padded,
            sizes.hidden_size,
            init_method=_nothing,
            config=transformer,
            vocab_size=vocab_size,
            placement=resolved,
            grad_sync="step",
            reduce_scatter_embeddings=transformer.sequence_parallel,
            tp_group=group,
        )
        if not sizes.tie_embeddings:
            self.output_layer = head(vocab_size, transformer, group, resolved)
        self.setup_embeddings_and_output_layer()
        # `deepspeed.zero.Init` casts tensors that torch's factory functions make under it to the parameters' dtype.
        # Rotary angles need fp32, so they are computed again, and come from an array of numpy.
        angles = rotary.frequencies(transformer.kv_channels, sizes.rotary_base, sizes.rotary_scaling)
        self.rotary_pos_emb.inv_freq = torch.from_numpy(np.array(angles)).to(device.local_device(), torch.float32)
        self.document_end = document_end
        self.decoder.register_forward_pre_hook(rotary_embedding.once_for_all_layers, with_kwargs=True)
        self._attends = any(isinstance(module, SdpaAttention) for module in self.modules())
        self.exact_vocab_size = vocab_size
        self.z_loss = sizes.z_loss
        std, quantiles = self.initial_weights(sizes)
        initialize(
            self,
            std,
            seed,
            tensor_shard(group.rank(), group.size()),
            note,
            resolved,
            initial,
            quantiles,
        )

    @classmethod
    def layer_specs(
        cls,
        sizes: Any,
        transformer: TransformerConfig,
        placement: Placement,
        *,
        shared_columns: bool = False,
        recompute: bool = False,
    ) -> list[ModuleSpec]:
        """Return the specs of all layers. The arguments are those of :class:`Decoder`.

        Args:
            sizes: sizes of the model, an instance of its architecture's configuration.
            transformer: Megatron's configuration of the transformer.
            placement: sides that have multipliers, by role.
            shared_columns, recompute: the same as for the class.
        """
        layer = transformer_layer_spec(
            transformer,
            placement,
            shared_columns=shared_columns,
            grad_sync="step",
            recompute=recompute,
            norms=sizes.norms,
            attention_bias=sizes.attention_bias,
            mlp_bias=sizes.mlp_bias,
        )
        return [layer] * sizes.num_layers

    @classmethod
    def initial_weights(cls, sizes: Any) -> tuple[Mapping[Role, float], Mapping[str, Callable[[Tensor], Tensor]]]:
        """Return standard deviations by role, and the quantile functions of what is not drawn from a normal
        distribution (:func:`megamult.models.common.initialization.initialize`)."""
        return parameters.standard_deviations(sizes), {}

    def forward(self, tokens: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the losses of a micro-batch.

        Args:
            tokens, labels: [batch, seq] ids.
            weights: [batch] weights of the samples in the cross entropy; None: 1 / batch each.

        Returns:
            Two scalars in nats: the objective, which includes z-loss, a mean over the tokens of the micro-batch; and
            the cross entropy without z-loss, the sum over samples of weight x mean over the sample's tokens, which has
            no gradient. A sample of weight 0 does not count, whatever its cross entropy.
        """
        mask, positions = None, None
        if self.document_end is not None:
            positions = documents.positions_in_documents(tokens, self.document_end)
            first = documents.first_tokens(positions)
            dtype = self.embedding.word_embeddings.weight.dtype
            mask = documents.DocumentMask(first, documents.attention_mask(first, dtype) if self._attends else None)
        more = {documents.POSITIONS: positions}
        objective, entropy = super().forward(tokens, None, mask, labels=labels, extra_block_kwargs=more)
        return objective, entropy.mean() if weights is None else weighted(entropy, weights)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the objective, and the cross entropy of each token without gradient, [seq, batch].

        Args:
            labels: [batch, seq] ids.
            logits: [seq, batch, padded vocabulary/tp] logits.
        """
        entropy, log_sum_exp = VocabParallelCrossEntropy.apply(
            logits, labels.transpose(0, 1), self.exact_vocab_size, self.pg_collection.tp
        )
        objective = entropy.mean()
        if self.z_loss:
            objective = objective + self.z_loss * log_sum_exp.square().mean()
        return objective, entropy.detach()


def head(
    vocab_size: int, config: TransformerConfig, tp_group: torch.distributed.ProcessGroup, placement: Placement
) -> MultiplierColumnParallelLinear:
    """Return the LM head, a linear layer. Its weight over all tensor-parallel ranks is [padded vocabulary, hidden].

    Rows of padding are 0 and have no multipliers.
    """
    return MultiplierColumnParallelLinear(
        config.hidden_size,
        padded_vocab_size(vocab_size),
        config=config,
        init_method=_nothing,
        bias=False,
        gather_output=False,
        tp_group=tp_group,
        spec=parameters.head(config, vocab_size),
        placement=placement,
        grad_sync="step",
    )


def _nothing(weight: Tensor) -> Tensor:
    """Return a weight unchanged.

    Layers get this function as init method, because :class:`Decoder` sets all weights after it has built the layers.
    """
    return weight


def transformer_config(
    sizes: DecoderConfig, dtype: torch.dtype, tensor_parallel: int, sequence_parallel: bool
) -> TransformerConfig:
    """Return Megatron's configuration of the transformer.

    With it, layers allocate weights on the device that will use them, and do not initialize them.
    """
    # Megatron checks the heads also of a model without attention: one for each rank passes.
    heads, groups, head_size = (
        (sizes.num_attention_heads, sizes.query_groups, sizes.head_size)
        if sizes.attention_layers
        else (tensor_parallel, tensor_parallel, 2)
    )
    fused = device.has_cuda()  # Megatron compiles fused operations; on a CPU this takes longer than it saves
    return TransformerConfig(
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden_size,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head_size,
        qk_layernorm=sizes.qk_norm,
        no_rope_freq=[int(i in sizes.layers_without_rope) for i in range(sizes.num_layers)]
        if sizes.layers_without_rope
        else None,
        ffn_hidden_size=sizes.ffn_hidden_size,
        tensor_model_parallel_size=tensor_parallel,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=False,
        perform_initialization=False,
        normalization="RMSNorm",
        layernorm_epsilon=sizes.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=fused,
        use_te_activation_func=not fused,  # the layer's own module, see SwiGLU
        bias_dropout_fusion=fused,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )
