"""Reduction of gradients and gathering of parameters in place of DeepSpeed's, at ZeRO 1 in bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.optim.workers import StepCase, _batch
from tests.processes import run_distributed
from tests.small import VOCAB


class Largest(TorchDispatchMode):
    """The largest number of elements that each operator returns, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returned = result if isinstance(result, (list, tuple)) else [result]
        if not any(each.alias_info and not each.alias_info.is_write for each in func._schema.returns):
            name = func.overloadpacket.__name__
            sizes = [each.numel() for each in returned if isinstance(each, Tensor)]
            self.elements[name] = max([self.elements.get(name, 0), *sizes])
        return result


def step(case: StepCase) -> dict[str, Any]:
    """What one step does with gradients and parameters."""
    from megamult.distributed import start
    from megamult.train.deepspeed_engine import build

    config = case.config()
    engine = build(config, VOCAB, start.initialize(case.tensor))
    zero, ranks = engine.deepspeed.optimizer, engine.mesh.size_of("data")
    reduce = engine.deepspeed.allreduce_gradients
    engine.deepspeed.allreduce_gradients = lambda: None
    objective, _ = engine.deepspeed(*_batch(0, config))
    engine.deepspeed.backward(objective)
    means = [flat.clone() for flat in zero.fp32_groups_gradients_flat]
    for mean in means:
        torch.distributed.all_reduce(mean, group=engine.mesh.groups["data"])
        mean /= ranks
    with Largest() as largest:
        reduce()
    try:
        reduce()
        again = ""
    except RuntimeError as error:
        again = str(error)
    rank = engine.mesh.rank_on("data")
    result: dict[str, Any] = {
        "class": type(zero).__name__,
        "again": again,
        "operators": largest.elements,
        "part": max(part.numel() for part in zero.fp32_groups_gradient_flat_partition),
        "error": max(
            float((part - mean.chunk(ranks)[rank]).norm() / mean.norm())
            for part, mean in zip(zero.fp32_groups_gradient_flat_partition, means, strict=True)
        ),
    }
    cleared = [0]
    clear = torch.Tensor.zero_

    def count(tensor: Tensor) -> Tensor:
        cleared[0] += tensor.numel() * (tensor.dtype == torch.float32)
        return clear(tensor)

    torch.Tensor.zero_ = count  # type: ignore[method-assign, assignment]
    engine.deepspeed.step()
    torch.Tensor.zero_ = clear  # type: ignore[method-assign]
    flats = zero.fp32_groups_gradients_flat
    result["cleared"] = cleared[0] / sum(flat.numel() for flat in flats)
    result["left"] = max(float(flat.abs().max()) for flat in flats)
    result["weights"] = [flat.float() for flat in zero.bf16_groups_flat]
    result["masters"] = [master.detach().bfloat16().float() for master in zero.fp32_groups_flat_partition]
    engine.deepspeed.destroy()
    return result


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_distributed(2, step, StepCase(world=2, zero=1, dtype="bf16", optimizer="muon"))


def test_each_rank_averages_its_own_part_without_a_copy_of_all_gradients(two: list[dict[str, Any]]) -> None:
    for outcome in two:
        assert outcome["class"] == "BF16_Optimizer"
        assert outcome["error"] < 2**-23, "a sum of two numbers and a half of it, in fp32"
        assert max(outcome["operators"].values()) <= outcome["part"], outcome["operators"]


def test_a_second_reduction_in_one_step_is_refused(two: list[dict[str, Any]]) -> None:
    """The parts of other ranks are undefined after the first, so a second one would add them to the mean."""
    for outcome in two:
        assert "reduced twice in one step: call engine.backward once" in outcome["again"]


def test_all_ranks_have_the_masters_of_all_after_a_step(two: list[dict[str, Any]]) -> None:
    for group, weights in enumerate(two[0]["weights"]):
        assert torch.equal(weights, two[1]["weights"][group])
        assert torch.equal(weights, torch.cat([outcome["masters"][group] for outcome in two]))


def test_gradients_are_cleared_once(two: list[dict[str, Any]]) -> None:
    for outcome in two:
        # Beside them, the buffer of the multipliers' fp32 values is cleared.
        assert outcome["left"] == 0.0 and 1.0 <= outcome["cleared"] < 1.1


def test_one_data_parallel_rank_reduces_nothing() -> None:
    (outcome,) = run_distributed(1, step, StepCase(zero=1, dtype="bf16", optimizer="muon"))
    assert outcome["class"] == "BF16_Optimizer" and outcome["operators"] == {}


def test_a_gradient_that_is_infinite_on_one_rank_leaves_all_ranks_as_they_were() -> None:
    """Its own part is finite on the other rank, which would otherwise wait for the first in the all-gather."""
    for skipped, unchanged in run_distributed(2, poisoned, StepCase(world=2, zero=1, dtype="bf16", optimizer="muon")):
        assert skipped == 1 and unchanged


def poisoned(case: StepCase) -> tuple[int, bool]:
    """Steps that were skipped, and whether one with a gradient that is infinite on the last rank changed no weight."""
    from megamult.distributed import start
    from megamult.train.deepspeed_engine import build
    from tests.optim.workers import _step

    config = case.config()
    engine = build(config, VOCAB, start.initialize(case.tensor))
    before = [piece.source.clone() for piece in engine.partition.slices]
    _step(engine, config, 0, "gradient")
    after = [piece.source for piece in engine.partition.slices]
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    skipped = engine.skipped_steps
    engine.deepspeed.destroy()
    return skipped, same
