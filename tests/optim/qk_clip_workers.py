"""What the process of test_qk_clip.py does: a step that changes nothing but clipped heads, in the small model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megamult.config import Config
from megamult.multipliers.config import MultipliersConfig
from tests.invariance import Case
from tests.small import SMALL, VOCAB

THRESHOLD = 0.15
"""Between the largest logits of the heads of the small model, as it is drawn."""
MICRO, COUNT = 4, 2


def micro_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro-batches of one step, or of an evaluation."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(COUNT):
        text = torch.randint(0, VOCAB, (MICRO, SMALL.seq_length + 1), generator=generator)
        yield text[:, :-1], text[:, 1:]


def config_of(groups: int, multipliers: dict[str, Any], optimizer: str, recompute: bool) -> Config:
    """One layer, because a clipped head changes the logits of the layers after its own."""
    config = Case(optimizer=optimizer).config()
    config.model = replace(SMALL, num_layers=1, num_query_groups=groups)
    config.multipliers = MultipliersConfig(**{"qk_clip": THRESHOLD, **multipliers})
    config.train.global_batch_size, config.train.micro_batch_size = MICRO * COUNT, MICRO
    config.train.recompute = "full" if recompute else "none"
    return config


def run(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case: logits of each head on the same batch before the step and after it, W_eff of Q and K before and
    after, from what a checkpoint holds, and the step's figures."""
    from megamult.distributed import start
    from megamult.models.common.head_logits import largest_attention_logits as largest
    from megamult.train.deepspeed_engine import build
    from megamult.zero.gather import trained

    found = []
    for case in cases:
        engine = build(config_of(**case), VOCAB, start.initialize(1))

        def measured(engine: Any = engine) -> Tensor:
            # By other hooks than the run's, in passes that the run's hooks ignore.
            seen: list[Tensor] = []
            core = engine.model.decoder.layers[0].self_attention.core_attention
            handle = core.register_forward_pre_hook(lambda module, args: seen.append(largest(*args[:2])))
            with torch.no_grad():
                for tokens, labels in micro_batches(seed=1):
                    engine.model(tokens, labels)
            handle.remove()
            return torch.stack(seen).amax(0)

        def effective(engine: Any = engine) -> dict[str, Tensor]:
            items = {
                item.name: item.tensor.double() for item in trained(engine.model, engine.partition, engine.optimizer)
            }
            weights = {}
            for role in "qkv":
                module = f"decoder.layers.0.self_attention.linear_qkv.{role}"
                row, col = (items.get(f"{module}.{side}_multiplier", torch.ones(1).double()) for side in ("row", "col"))
                weights[role] = row.unsqueeze(1) * items[f"{module}.weight"] * col
            return weights

        result: dict[str, Any] = {"before": measured(), "weights before": effective()}
        engine.set_lr_factor(0.0)  # only QK-clip then changes anything
        # Its logits must not count.
        engine.evaluate((*micro_batch, torch.ones(MICRO)) for micro_batch in micro_batches(seed=2))
        engine.train_batch(micro_batches(seed=1), COUNT)
        result |= {"figures": engine.further_figures, "after": measured(), "weights after": effective()}
        engine.deepspeed.destroy()
        found.append(result)
    return found
