"""What the processes of test_folded.py do: the chain rule on known gradients, under every ZeRO class."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megamult.parameters.axes import Grid
from tests.optim.workers import StepCase, _batch
from tests.small import VOCAB


def _engine(case: StepCase, placement: Any, initial: Any = None) -> tuple[Any, Any]:
    """A fresh engine with folded multipliers, and its configuration."""
    from megamult.distributed import start
    from megamult.optim.build import make_optimizer
    from megamult.parameters.initial import Initial
    from megamult.train.deepspeed_engine import build

    config = case.config()
    config.multipliers = replace(config.multipliers, implementation="folded", placement=placement)

    def started(config: Any, model: torch.nn.Module, mesh: Any) -> Any:
        return make_optimizer(model, config.optimizer, config.multipliers, Initial(initial), mesh)

    # Values of `multipliers.initial` must be positive; these need not be.
    changes = {} if initial is None else {"optimizer_of": started}
    return build(config, VOCAB, start.initialize(case.tensor), **changes), config


_KINDS = ("matrix", "embedding")
# Every combination of sides, on fused parameters too.
PLACEMENT = {
    "q": ["row", "col"],
    "k": ["row", "scalar"],
    "v": "col",
    "attention_out": ["row", "col", "scalar"],
    "gate": "scalar",
    "up": ["col", "scalar"],
    "down": "row",
    "embedding": ["row", "col"],
}


def equations(cases: list[StepCase]) -> list[dict[str, Any]]:
    """Per case: full G, W, multipliers before; full dL/dW and the multipliers' gradient after. Whole on rank 0."""
    from megamult.zero.gather import gather

    results = []
    for case in cases:
        engine, config = _engine(case, PLACEMENT)
        folded, partition = engine.optimizer.folded, engine.partition
        with torch.no_grad():  # far from 1, of either sign, the same on every rank
            folded.values.copy_(torch.randn(folded.values.shape, generator=torch.Generator().manual_seed(5)))
        objective, _ = engine.deepspeed(*_batch(0, config))
        engine.deepspeed.backward(objective)
        gradients = partition.gradients()

        def whole(values: Any, engine: Any = engine) -> dict[str, Tensor]:
            found = gather(engine.model, engine.partition, values, lambda spec: spec.kind in ("matrix", "embedding"))
            return {name: full.double() for name, _, _, full in found}

        result: dict[str, Any] = {
            "G": whole(lambda i, gradients=gradients: gradients[i].float()),
            "W": whole(lambda i, engine=engine: engine.optimizer.weight(engine.partition.slices[i])),
            "multipliers": {v.name: folded.values[v.entries].double() for v in folded.vectors},
        }
        folded.chain_rule(gradients)
        result["dW"] = whole(lambda i, gradients=gradients: gradients[i].float())
        result["dm"] = {v.name: folded.gradient[v.entries].double() for v in folded.vectors}
        pieces = [piece for piece in partition.slices if engine.optimizer.folding.covers(piece.spec)]
        tensors: dict[int, set[str]] = {}
        for piece in pieces:
            tensors.setdefault(id(piece.tensor), set()).add(piece.name)
        result["several matrices in a partition"] = any(len(names) > 1 for names in tensors.values())
        result["straddling"] = any(
            0 < piece.length < torch.Size(piece.spec.local_shape(Grid(tensor=case.tensor))).numel() for piece in pieces
        )
        engine.deepspeed.destroy()
        results.append(result)
    return results


def starts(cases: list[StepCase]) -> list[dict[str, float]]:
    """Per case, of this rank: first losses by how the multipliers start; and of a plain model of doubled matrices."""
    from megamult.parameters.stated import named_specs
    from megamult.train.model import build_model

    results = []
    for case in cases:
        losses = {}
        for label, row, col in (("ones", 1.0, 1.0), ("cancelled", 2.0, 0.5), ("doubled", 2.0, 1.0)):
            engine, config = _engine(case, "all", lambda role, side, row=row, col=col: row if side == "row" else col)
            losses[label] = float(engine.deepspeed(*_batch(0, config))[1])
            engine.deepspeed.destroy()
        model = build_model(config, VOCAB, config.train.seed)
        with torch.no_grad():
            for _, parameter, spec in named_specs(model):
                if spec.kind in ("matrix", "embedding"):
                    parameter *= 2
        losses["plain, doubled"] = float(model(*_batch(0, config))[1])
        results.append(losses)
    return results


def all_of_it(cases: list[StepCase], starting: list[StepCase]) -> dict[str, Any]:
    """Everything in one launch."""
    return {"equations": equations(cases), "starts": starts(starting)}
