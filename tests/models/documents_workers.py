"""Models with a mask of documents, beside forward passes of each document for itself; and training on ranks."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megamult.models.common import documents as masks
from megamult.models.falcon_h1.config import FalconH1Config
from tests.invariance import Case
from tests.small import MODELS, SMALL, VOCAB, Samples

END = 7
BATCH, SEQ = 3, SMALL.seq_length
BOUNDARIES = [[4, 5, 11, 23], [], [0, 12]]
"""Positions of the end-of-document tokens of each sequence: documents of 5, 1, 6 and 12 tokens; one document that ends
elsewhere; documents of 1 and 12 tokens, and the beginning of another one."""

VARIANTS: dict[str, dict[str, Any]] = {
    "multipliers": {"placement": "all"},
    "recomputed": {"recompute": True},
    "no multipliers, a key head for each query head": {
        "placement": {},
        "sizes": dataclasses.replace(SMALL, num_query_groups=None),
    },
    "every option": {
        "placement": {},
        "sizes": dataclasses.replace(
            SMALL,
            head_dim=10,
            qk_norm=True,
            no_rope_layers=[1],
            attention_bias="all",
            rotary_scaling={"rope_type": "linear", "factor": 2.0},
        ),
    },
    # In chunks of 16 tokens: one document spans two chunks, and chunks hold several. The convolution reads 4 or 3.
    "mixers beside attention": {"placement": "all", "sizes": MODELS["falcon_h1"]},
    "layers of every kind": {"placement": {}, "sizes": MODELS["hybrid"], "recompute": True},
    "no attention": {
        "placement": {},
        "sizes": FalconH1Config(
            num_layers=3,
            layers="M-M",
            hidden_size=48,
            ffn_hidden_size=68,
            seq_length=24,
            init_std=0.15,
            ssm_heads=4,
            ssm_head_dim=12,
            ssm_chunk=16,
        ),
        "recompute": True,
    },
}
"""Models whose attention takes another path, or other positions, or that have mixers."""


def texts() -> Tensor:
    """[batch, seq] ids, with END at BOUNDARIES only."""
    tokens = torch.randint(END + 1, VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(2))
    for row, ends in zip(tokens, BOUNDARIES, strict=True):
        row[ends] = END
    return tokens


def documents() -> list[tuple[int, int, int]]:
    """(sequence, start, stop) of every document."""
    found = []
    for row, ends in enumerate(BOUNDARIES):
        bounds = [0, *(end + 1 for end in ends), SEQ]
        found += [(row, a, b) for a, b in itertools.pairwise(bounds) if b > a]
    return found


def _gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def float64() -> dict[str, dict[str, Any]]:
    """What :func:`_float64` finds, by variant."""
    from megamult.distributed import start

    start.initialize(1)
    return {variant: _float64(variant) for variant in VARIANTS}


def _float64(variant: str) -> dict[str, Any]:
    """Logits and gradients of one pass with the mask, of a pass of each document, and of one pass without the mask; and
    how many masks the first pass made."""
    from megamult.models.architectures import architecture_of
    from megamult.models.common.activations import Activations

    arguments: dict[str, Any] = {"sizes": SMALL, **VARIANTS[variant]}
    saw: list[Tensor] = []
    models = {}
    for name, end in (("masked", END), ("plain", None)):
        model: Any = architecture_of(arguments["sizes"]).model()(
            vocab_size=VOCAB, seed=7, document_end=end, **arguments
        )
        model.double()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():  # nothing is at a value where a mistake would not show
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        model.output_layer.register_forward_hook(lambda module, inputs, output: saw.append(output[0]))
        models[name] = model
    tokens, labels = texts(), texts().roll(-1, 1)

    def logits(model: Any, row: slice, at: slice) -> Tensor:
        model(tokens[row, at], labels[row, at])
        return saw.pop()[..., :VOCAB].transpose(0, 1)  # [batch, seq, vocabulary]

    every = slice(None)
    found: dict[str, Any] = {}
    with mock.patch.object(masks, "attention_mask", wraps=masks.attention_mask) as made:
        for name, model in models.items():
            whole = logits(model, every, every)
            loss = cross_entropy(whole.flatten(0, 1), labels.flatten())
            found[name] = whole.detach(), _gradients(model, loss)
        found["masks"] = made.call_count
    parts, apart = torch.empty_like(found["plain"][0]), 0.0
    for row, start_, stop in documents():
        row_, at = slice(row, row + 1), slice(start_, stop)
        part = logits(models["plain"], row_, at)
        parts[row, at] = part[0].detach()
        apart = apart + cross_entropy(part[0], labels[row, at], reduction="sum") / labels.numel()
    found["apart"] = parts, _gradients(models["plain"], torch.as_tensor(apart))
    # What the monitor measures of the masked model, for which float64 is not needed.
    single = models["masked"].float()
    measured = Activations(single, VOCAB)
    measured.arm()
    single(tokens, labels)
    found["pairs"] = [
        measured.sums["attention_logit_rms", layer][1]
        for layer in measured.layers
        if ("attention_logit_rms", layer) in measured.sums
    ]
    return found


class Documents(Samples):
    """Samples in which every seventh token, about, ends a document."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = super().__getitem__(index)
        return {key: torch.where(ids % 7 == 0, END, ids) for key, ids in item.items()}


@dataclass(frozen=True)
class Masked(Case):
    """A case with documents in its sequences."""

    mask: bool = True
    steps: int = 3


@dataclass
class Steps:
    """Losses and gradient norms of training, the evaluation at the end."""

    losses: list[float]
    norms: list[float]
    valid: float


def trained(cases: list[Masked]) -> list[Steps]:
    """Each case, trained on this launch's processes."""
    from megamult.distributed import start
    from megamult.train.deepspeed_engine import build
    from megamult.train.loop import Trainer

    found = []
    for case in cases:
        config = case.config()
        config.data.document_mask = case.mask
        engine = build(config, VOCAB, start.initialize(case.tensor), eod=END)
        trainer = Trainer(config, engine, Documents(VOCAB, SEQ, period=12), None, VOCAB)
        records = [trainer.train_step() for _ in range(case.steps)]
        trainer.close()
        item = [Documents(VOCAB, SEQ)[i] for i in range(50, 52)]
        batch = [torch.stack([row[key] for row in item]) for key in ("tokens", "labels")]
        valid = float(engine.evaluate(iter([(batch[0], batch[1], torch.full((2,), 0.5).double())])))
        found.append(Steps([r["loss"] for r in records], [r["grad_norm"] for r in records], valid))
        engine.deepspeed.destroy()
    return found
