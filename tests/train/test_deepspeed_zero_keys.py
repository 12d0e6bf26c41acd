"""Keys of `zero_optimization` that are handed on to DeepSpeed: the same training as without them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megamult.config import Config
from megamult.train.deepspeed_zero_keys import ZERO_KEYS
from tests.invariance import Case, run_cases
from tests.processes import run_distributed

RELATIVE = 1e-5
"""As in test_invariance.py: sums in another order differ by some 1e-7, and few steps amplify that little."""
BUCKETS = {"overlap_comm": True, "reduce_bucket_size": 5000}
KEYS: dict[int, dict[str, Any]] = {
    2: BUCKETS
    | {"reduce_scatter": False, "allgather_bucket_size": 5000, "use_multi_rank_bucket_allreduce": False}
    | {"parameter_alignment": True},
    3: BUCKETS
    | {"sub_group_size": 10_000, "prefetch_bucket_size": 100, "param_persistence_threshold": 10}
    | {"model_persistence_threshold": 1000, "max_live_parameters": 1000, "max_reuse_distance": 1000}
    | {"use_all_reduce_for_fetch_params": True, "allgather_sequential": True, "memory_efficient_linear": False}
    | {"enable_sanity_checks": True, "log_trace_cache_warnings": True},
}
"""All free keys by stage, with values that differ from the default and cut the small model into many pieces."""


@dataclass(frozen=True)
class Keyed(Case):
    """A case with all keys of its stage."""

    def config(self) -> Config:
        config = super().config()
        config.deepspeed = {"zero_optimization": KEYS[self.zero]}
        return config


def test_free_keys_of_zero_change_no_loss_and_no_parameter() -> None:
    free = {name for name, key in ZERO_KEYS.items() if key.use == "free" and not name.startswith("stage3_")}
    assert free == {*KEYS[2], *KEYS[3]}
    common = {"world": 2, "accumulation": 3, "steps": 3}
    cases = [Case(**common, zero=2), Keyed(**common, zero=2), Keyed(**common, zero=3)]  # type: ignore[arg-type]
    plain, *others = run_distributed(2, run_cases, cases)[0]
    for other in others:
        for key in ("loss", "grad_norm", "multiplier_grad_norm"):
            expected = [record[key] for record in plain.records]
            assert [record[key] for record in other.records] == pytest.approx(expected, rel=RELATIVE, abs=0.0), key
        for name, reference in plain.tensors.items():
            off, size = torch.linalg.vector_norm(other.tensors[name] - reference), torch.linalg.vector_norm(reference)
            assert off <= RELATIVE * size, name
            assert torch.linalg.vector_norm(reference - plain.initial[name]) > 10 * RELATIVE * size, "it is trained"
