"""Memory that a forward pass keeps for backward, in bytes: blocks of a decoder, counted tensor by tensor.

The method is that of V. Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv
2205.05198), with the tensors of this package's models in place of the paper's. The paper counts a layer with dropout,
GeLU and unfused attention in 16 bits as `s b h (34 + 5 a s / h)` bytes. Here there is no dropout, so no mask is kept;
attention never stores scores (:class:`megamult.models.common.attention.SdpaAttention`), so there is no term in s^2; the
MLP is gated; and norms are RMSNorm. Operators that are plain on a CPU and fused on CUDA keep different tensors, and
:attr:`Pass.fused` chooses. `tests/models/test_activation_memory.py` compares every count on a CPU with the storages
that autograd keeps.

Names of sizes: h is `hidden_size`, f `ffn_hidden_size`, d the size of a head; a rank has 1/tp of heads and f.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megamult.models.common.config import DecoderConfig
from megamult.models.common.loss import CHUNK_ELEMENTS
from megamult.models.common.norm_weight import NormWeight
from megamult.models.common.vocabulary import padded_vocab_size
from megamult.parameters.spec import Side

_FP32, _INT64, _BOOL = 4, 8, 1


@dataclass(frozen=True)
class Pass:
    """Forward pass of one micro-batch on one rank, as far as its memory depends on it."""

    sequences: int
    seq_length: int
    dtype: torch.dtype
    """Dtype of parameters and activations."""
    tensor: int = 1
    """Tensor-parallel size."""
    sequence: bool = False
    """Whether norms and residuals are sharded over the tensor-parallel ranks."""
    fused: bool = False
    """Whether the device is CUDA, which has one kernel for an RMSNorm."""
    documents: bool = False
    """Whether documents do not see each other."""

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.sequences * self.seq_length

    @property
    def stream(self) -> int:
        """Tokens of which this rank holds the residual stream."""
        return self.tokens // self.tensor if self.sequence else self.tokens

    @property
    def size(self) -> int:
        """Bytes of an activation."""
        return self.dtype.itemsize


@dataclass(frozen=True)
class Saved:
    """Bytes that one micro-batch's forward pass keeps on a rank."""

    layers: tuple[int, ...]
    """Bytes that each layer keeps."""
    layer_input: int
    """Bytes of a layer's input, which is all that a layer keeps with recomputation."""
    outside: int
    """Bytes kept between the layers and the logits, and before the layers."""
    logits: int
    """Bytes of the logits, and of what their loss keeps per token."""
    logits_backward: int
    """Bytes that backward adds while it computes the gradient of the logits."""

    def activations(self, recompute: bool) -> int:
        """Return the bytes that all layers and what is outside them keep, without the logits."""
        return (len(self.layers) * self.layer_input if recompute else sum(self.layers)) + self.outside

    def working(self, recompute: bool) -> int:
        """Return the bytes beside :meth:`activations` where backward needs most: for the logits and their gradient, or
        with recomputation for one layer whose forward pass has been run again."""
        at_logits = self.logits + self.logits_backward
        return max(at_logits, max(self.layers, default=0)) if recompute else at_logits


def norm(run: Pass, tokens: int, width: int, weight: NormWeight = "vector") -> int:
    """Return the bytes of an RMSNorm over `width` features: its input, one over the RMS in fp32, and what the product
    with the weight needs. On a CPU the input and the normalized values are kept in fp32."""
    kept = width * (run.size if run.fused else _FP32) + _FP32
    if weight == "scalar":
        kept += width * run.size
    elif weight == "vector" and not run.fused:
        kept += width * _FP32
    return tokens * kept


def linear_input(run: Pass, width: int) -> int:
    """Return the bytes of the input of column-parallel linear layers. With sequence parallelism they keep their part of
    it and gather it again in backward."""
    return run.stream * width * run.size


def attention(run: Pass, sizes: DecoderConfig, layer: int) -> int:
    """Return the bytes of attention in one layer, without the input of its first projection.

    These are Q and K after rotary positions; V, on CUDA as a view of the projections' output, of which all is kept
    then, and on a CPU as a copy; the output, and the second projection's input; and the log-sum-exp of each query.
    Rotary positions themselves keep nothing in a layer.
    """
    head, ranks = sizes.head_size, run.tensor
    queries, groups = sizes.num_attention_heads // ranks, max(1, sizes.query_groups // ranks)
    q, kv = queries * head, groups * head
    projected = q + 2 * kv
    if sizes.query_groups < ranks:
        # Megatron then gathers the projections of all ranks, from which each rank takes its heads.
        projected = head * (sizes.num_attention_heads + 2 * sizes.query_groups)
    rotated = layer not in sizes.layers_without_rope
    normed_view = sizes.qk_norm and (run.fused or run.dtype == torch.float32)  # the norm of K keeps a view as its input
    width = q  # the output
    width += projected if run.fused or not rotated or normed_view else 0
    width += 0 if run.fused else kv
    if rotated:
        # Rotation leaves heads apart, and attention's output is like its queries: the second projection reads a copy.
        width += q + kv + q
    elif groups > 1:
        width += q  # queries of all groups side by side are a copy
    if run.fused and (run.dtype == torch.float32 or run.documents) and q != kv:
        width += 2 * q  # keys and values repeated for each query head
    kept = run.tokens * (width * run.size + queries * _FP32)
    if sizes.qk_norm:
        kept += norm(run, run.tokens * (queries + groups), head) - (run.tokens * kv * run.size if normed_view else 0)
    return kept


def mlp(run: Pass, sizes: DecoderConfig) -> int:
    """Return the bytes of the gated MLP in one layer, without its input: gate and up, and the input of `down`."""
    return run.tokens * run.size * sizes.ffn_hidden_size // run.tensor * 3


def around(
    run: Pass, sizes: DecoderConfig, vocab_size: int, layers: Sequence[int], embedding: frozenset[Side]
) -> Saved:
    """Return what a decoder keeps, given what its layers keep.

    Args:
        run: the forward pass.
        sizes: sizes of the model.
        vocab_size: exact number of tokens, without padding.
        layers: bytes of each layer.
        embedding: sides on which the embedding has multipliers in the layers.
    """
    stream = run.stream * sizes.hidden_size * run.size
    # Ids as they were given; with tensor parallelism, ids within the rank's rows, and which are elsewhere.
    outside = run.tokens * (_INT64 + (_BOOL if run.tensor > 1 else 0))
    outside += len(embedding & {"col", "scalar"}) * stream
    outside += norm(run, run.stream, sizes.hidden_size, sizes.final_norm) + linear_input(run, sizes.hidden_size)
    if set(sizes.attention_layers) - set(sizes.layers_without_rope):  # cosines and sines of rotary positions
        outside += run.seq_length * sizes.head_size * run.size * (run.sequences if run.documents else 1)
    if run.documents:
        outside += run.sequences * run.seq_length**2 * run.size  # what is added to the logits of attention
    columns = padded_vocab_size(vocab_size) // run.tensor
    logits = run.tokens * columns * run.size
    # Maximum, sum of exponentials and logit of the label, and the label's column and whether it is elsewhere; for
    # z-loss the log-sum-exp.
    loss = run.tokens * (3 * _FP32 + _INT64 + _BOOL + (_FP32 if sizes.z_loss else 0))
    chunk = min(run.tokens * columns, max(columns, CHUNK_ELEMENTS["cuda" if run.fused else "cpu"]))
    return Saved(tuple(layers), stream, outside, logits + loss, logits + 2 * _FP32 * chunk)
