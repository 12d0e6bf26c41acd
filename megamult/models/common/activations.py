"""Hooks that measure activations in the next forward pass of a model: RMS of block outputs and of logits, and RMS and
largest value of the attention logits of each layer.

A layer that lacks a block has no figures of it. A module in the place of a layer's attention that has several branches
names them in its attribute `branches`, {"attention": module, "mixer": module}.

The hooks are on the model only from :meth:`Activations.arm` to the end of the next forward pass. Other forward passes,
and the ones that recomputation runs in the backward pass, have no hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer import TransformerLayer
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megamult.models.common.attention import SdpaAttention
from megamult.models.common.head_logits import mask_of, products


class Activations:
    """Measurements of one forward pass of a model whose layers are Megatron's TransformerLayer.

    Args:
        model: the model.
        vocab_size: exact number of tokens. Logits of ids from `vocab_size` on are padding and not counted.

    Attributes:
        sums: (sum of squares as a float64 scalar, number of elements) of this rank, by (metric, index of the layer).
            The metric `logits_rms` belongs to no layer, and its index is None.
        largest: largest attention logit of this rank, an fp32 scalar, by index of the layer.
        layers: indices of the layers, the same on every rank.
    """

    outputs = ("attention_output_rms", "mixer_output_rms", "mlp_output_rms", "residual_rms")
    """Metrics of a layer's outputs: what attention, mixer and MLP add to the residual stream, and the stream after the
    layer."""
    metrics = (*outputs, "attention_logit_rms")
    """All metrics of a layer that are RMS values."""

    def __init__(self, model: torch.nn.Module, vocab_size: int) -> None:
        self._model, self._vocab_size = model, vocab_size
        self._layers = {
            module.layer_number - 1: module for module in model.modules() if isinstance(module, TransformerLayer)
        }
        self.layers = list(self._layers)
        self.sums: dict[tuple[str, int | None], tuple[Tensor, int]] = {}
        self.largest: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def arm(self) -> None:
        """Measure the next forward pass, and discard earlier measurements."""
        self.disarm()
        self.sums, self.largest = {}, {}
        for index, layer in self._layers.items():
            branches = getattr(layer.self_attention, "branches", {"attention": layer.self_attention})
            for block, module in {**branches, "mlp": layer.mlp}.items():
                if not isinstance(module, IdentityOp):  # in the place of a block that the layer lacks
                    self._handles.append(module.register_forward_hook(self._output(f"{block}_output_rms", index)))
            self._handles.append(layer.register_forward_hook(self._output("residual_rms", index)))
            core = getattr(branches.get("attention"), "core_attention", None)
            if isinstance(core, SdpaAttention):
                self._handles.append(core.register_forward_pre_hook(self._scores(index)))
        head = getattr(self._model, "output_layer", None)
        if head is not None:
            self._handles.append(head.register_forward_hook(self._logits))
        self._handles.append(self._model.register_forward_hook(lambda *_: self.disarm()))

    def disarm(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _output(self, metric: str, index: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            self.sums[metric, index] = (sum_of_squares(hidden.detach()), hidden.numel())

        return hook

    def _logits(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        logits = output[0].detach()
        group: Any = module.tp_group
        local = logits.shape[-1]
        real = min(max(self._vocab_size - group.rank() * local, 0), local)
        kept = logits[..., :real]
        self.sums["logits_rms", None] = (sum_of_squares(kept), kept.numel())

    def _scores(self, index: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            query, key = args[0].detach(), args[1].detach()
            scale: Any = module.softmax_scale
            squares, count, largest = attention_logits(query, key, scale, mask_of(args))
            self.sums["attention_logit_rms", index], self.largest[index] = (squares, count), largest

        return hook


@torch.no_grad()
def sum_of_squares(values: Tensor) -> Tensor:
    """Return the sum of the squares of values [..., features] as a float64 scalar, summed in fp32 over the features."""
    if values.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=values.device)
    return torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32).double().square().sum()


@torch.no_grad()
def attention_logits(
    query: Tensor, key: Tensor, softmax_scale: float | None = None, mask: Tensor | None = None
) -> tuple[Tensor, int, Tensor]:
    """Measure q.k * scale over all heads, all queries and the keys that each query may attend to.

    Args:
        query, key, softmax_scale, mask: the same as for
            :func:`megamult.models.common.head_logits.largest_attention_logits`.

    Returns:
        Sum of the squares as a float64 scalar, number of logits, and largest logit as an fp32 scalar.
    """
    seq, batch, heads, dim = query.shape
    squares = torch.zeros((), dtype=torch.float64, device=query.device)
    largest = torch.full((), -torch.inf, device=query.device)
    for scores, forbidden in products(query, key, mask):
        last = scores[..., -forbidden.shape[-1] :]  # a view
        last.masked_fill_(forbidden, 0.0)
        squares += sum_of_squares(scores)
        last.masked_fill_(forbidden, -torch.inf)
        largest = torch.maximum(largest, scores.amax().float())
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    pairs = batch * seq * (seq + 1) // 2 if mask is None else int((mask == 0).sum())
    return squares * scale**2, heads * pairs, largest * scale
