"""Settings of single roles: the same training under every sharding, and equal to runs that say the same otherwise."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megamult.config import Config
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.config import AdamWConfig, OptimizerConfig
from megamult.parameters.roles import resolve
from megamult.train.config import TrainConfig
from tests.invariance import Case, Outcome, name_of, run_cases, train
from tests.processes import run_distributed
from tests.small import SMALL

RELATIVE = 1e-5
"""As in test_invariance.py: sums in another order differ by some 1e-7, and few steps amplify that little."""

CASES = [
    Case(knobs="all", implementation="folded"),
    Case(knobs="all", world=2, zero=0, accumulation=3),
    Case(knobs="all", world=2, zero=1, implementation="folded"),
    Case(knobs="all", world=2, zero=3, sub_group_size=10_000),
    Case(knobs="all", world=2, tensor=2, sequence=True, zero=1),
    Case(knobs="all", world=4, tensor=2, zero=2, implementation="folded"),
    Case(knobs="all", world=4, tensor=4, zero=1),
    Case(knobs="all", world=4, tensor=2, sequence=True, zero=3, implementation="folded", recompute=True),
    Case(knobs="all", optimizer="muon", implementation="folded", zero=1),
    Case(knobs="all", optimizer="muon", world=2, zero=2),
    Case(knobs="all", optimizer="muon", world=4, tensor=2, zero=3, accumulation=3),
    Case(knobs="all", optimizer="muon", world=4, tensor=4, zero=0, implementation="folded"),
    Case(knobs="fixed", implementation="folded"),
    Case(knobs="fixed", world=2, zero=0),
    Case(knobs="fixed", world=2, tensor=2, sequence=True, zero=1, implementation="folded"),
    Case(knobs="fixed", world=4, tensor=2, zero=2),
    Case(knobs="fixed", world=2, zero=3, implementation="folded", sub_group_size=10_000),
    Case(knobs="fixed", world=4, tensor=4, zero=3),
    Case(knobs="fixed", optimizer="muon", implementation="folded", zero=1),
    Case(knobs="fixed", optimizer="muon", world=4, tensor=2, zero=3),
    Case(knobs="fixed", optimizer="muon", world=2, zero=2, accumulation=3),
    Case(knobs="hyperball", optimizer="muon", world=2, tensor=2, zero=1),
    Case(knobs="hyperball", world=4, zero=2),
    Case(knobs="ramp", zero=2, accumulation=4, implementation="folded"),
    Case(knobs="ramp", world=2, zero=0, accumulation=2),
    Case(knobs="ramp", world=2, zero=1, implementation="folded"),
    Case(knobs="ramp", world=2, zero=3, accumulation=2, sub_group_size=10_000),
    Case(knobs="ramp", world=2, tensor=2, sequence=True, zero=1, accumulation=4),
    Case(knobs="ramp", world=4, zero=2),
    Case(knobs="ramp", world=4, tensor=2, zero=3, recompute=True),
    Case(knobs="ramp", optimizer="muon", zero=3, accumulation=4),
    Case(knobs="ramp", optimizer="muon", world=2, zero=1, accumulation=2),
    Case(knobs="ramp", optimizer="muon", world=2, zero=0, implementation="folded"),
    Case(knobs="ramp", optimizer="muon", world=4, tensor=2, sequence=True, zero=2, accumulation=2),
    Case(knobs="decoder", implementation="folded", optimizer="muon", zero=1),
    Case(knobs="decoder", world=2, zero=3, sub_group_size=10_000),
    Case(knobs="decoder", world=2, tensor=2, zero=0, accumulation=3),
    Case(knobs="decoder", world=2, tensor=2, sequence=True, zero=2, implementation="folded"),
    Case(knobs="decoder", world=4, tensor=2, sequence=True, zero=3, recompute=True),
    # Tensor parallel 4 cuts the query groups: two ranks have the same key head.
    Case(knobs="decoder", world=4, tensor=4, zero=1, optimizer="muon"),
    Case(knobs="qk_clip", world=2, zero=0, accumulation=3, recompute=True),
    Case(knobs="qk_clip", world=2, zero=1, implementation="folded"),
    Case(knobs="qk_clip", world=2, tensor=2, sequence=True, zero=1),
    Case(knobs="qk_clip", world=2, zero=3, sub_group_size=10_000),
    Case(knobs="qk_clip", world=4, tensor=2, zero=2, accumulation=3),
    # Tensor parallel 4 cuts the query groups: some ranks hold no row of K, others no row of Q.
    Case(knobs="qk_clip", world=4, tensor=4, zero=1, placement="mapping"),
    Case(knobs="qk_clip", world=4, tensor=4, zero=3, implementation="folded", placement="symmetry_free"),
    Case(knobs="qk_clip", optimizer="muon", world=2, zero=2),
    Case(knobs="qk_clip", optimizer="muon", world=4, tensor=2, sequence=True, zero=1, implementation="folded"),
]


@pytest.fixture(scope="module")
def outcomes() -> dict[Case, Outcome]:
    return train(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{name_of(case)}-{case.optimizer}")
def test_losses_and_norms_are_those_of_one_process(case: Case, outcomes: dict[Case, Outcome]) -> None:
    for key in ("loss", "grad_norm", "multiplier_grad_norm"):
        expected = [record[key] for record in outcomes[case.reference].records]
        assert [record[key] for record in outcomes[case].records] == pytest.approx(expected, rel=RELATIVE, abs=0.0), key


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{name_of(case)}-{case.optimizer}")
def test_every_full_parameter_is_that_of_one_process(case: Case, outcomes: dict[Case, Outcome]) -> None:
    expected, actual = outcomes[case.reference].tensors, outcomes[case].tensors
    assert sorted(actual) == sorted(expected)
    # Newton-Schulz enlarges differences of small singular values (test_muon_invariance.py derives by how much).
    relative = RELATIVE if case.optimizer == "adamw" else 10 * RELATIVE
    for name, reference in expected.items():
        assert torch.linalg.vector_norm(actual[name] - reference) <= relative * torch.linalg.vector_norm(reference), (
            name
        )


def test_constants_stay_and_all_else_moves(outcomes: dict[Case, Outcome]) -> None:
    constant = ("output_layer.weight", "linear_proj.weight", "linear_fc2.col_multiplier")
    for case, outcome in outcomes.items():
        if case.knobs != "all":
            continue
        assert not any("final_layernorm" in name for name in outcome.tensors), "it is frozen"
        for name, tensor in outcome.tensors.items():
            before = outcome.initial[name]
            if name.endswith(constant):
                # Folded, W is divided by the multipliers, and W_eff is never rounded back into it.
                assert torch.equal(tensor, before), (case, name)
            else:
                moved = torch.linalg.vector_norm(tensor - before)
                assert moved > 10 * RELATIVE * torch.linalg.vector_norm(tensor), (case, name)


def test_matrices_of_fixed_norm_keep_it_and_move(outcomes: dict[Case, Outcome]) -> None:
    cases = [case for case in outcomes if case.knobs in ("fixed", "hyperball")]
    assert len(cases) > 8
    for case in cases:
        outcome = outcomes[case]
        for name, tensor in outcome.tensors.items():
            before = outcome.initial[name]
            norms = float(tensor.double().norm()), float(before.double().norm())
            if outcome.kinds[name] == "matrix":
                # A sum of squares and a product in fp32, once per step: a few times 2^-24.
                assert norms[0] == pytest.approx(norms[1], rel=1e-6), (case, name)
                assert torch.linalg.vector_norm(tensor - before) > 1e-3 * norms[1], (case, name)
            elif name.endswith("embedding.weight"):
                assert norms[0] != pytest.approx(norms[1], rel=1e-6), "only the blocks' matrices"


def test_shared_columns_stay_those_of_one_vector(outcomes: dict[Case, Outcome]) -> None:
    for case, outcome in outcomes.items():
        if case.knobs != "fixed":
            continue
        for layer, fused in itertools.product(range(2), (("self_attention.linear_qkv", "qkv"), ("mlp.linear_fc1", ""))):
            parts = fused[1] or ("gate", "up")
            names = [f"decoder.layers.{layer}.{fused[0]}.{part}.col_multiplier" for part in parts]
            first, *others = (outcome.tensors[name] for name in names)
            assert (first - 1).abs().max() > 1e-3, "the columns are trained"
            for other in others:
                # Copies of a layer may get sums over ranks in another order each.
                torch.testing.assert_close(other, first, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.knobs == "qk_clip"], ids=lambda case: f"{name_of(case)}-{case.optimizer}"
)
def test_the_heads_that_are_clipped_are_those_of_one_process(case: Case, outcomes: dict[Case, Outcome]) -> None:
    expected, actual = outcomes[case.reference].records, outcomes[case].records
    heads = [record["qk_clip_heads"] for record in actual]
    assert heads == [record["qk_clip_heads"] for record in expected]
    assert all(heads) and min(heads) < 24, "some of the 24 heads are clipped, and some are not"
    relative = RELATIVE if case.optimizer == "adamw" else 10 * RELATIVE
    for key in ("qk_clip_factor", "qk_clip_logit"):
        assert [record[key] for record in actual] == pytest.approx(
            [record[key] for record in expected], rel=relative, abs=0.0
        ), key


@dataclass(frozen=True)
class Configured(Case):
    """A case on one process whose sections are replaced."""

    changes: tuple[tuple[str, Any], ...] = ()

    def config(self) -> Config:
        return replace(super().config(), **dict(self.changes))


def _run(**sections: Any) -> Configured:
    return Configured(zero=0, steps=3, changes=tuple(sections.items()))


def _optimizer(**more: Any) -> OptimizerConfig:
    return OptimizerConfig(lr=3e-3, adamw=AdamWConfig(eps=1e-4), clip_grad_norm=0.5, **more)


START = {"q": {"row": 4.0, "col": 0.5}, "down": {"row": 0.125, "col": 1.0}, "embedding": {"row": 2.0, "col": 2.0}}
HALVES = {"q": "scalar", "down": "scalar", "embedding": "scalar"}
RUNS = {
    "plain": _run(),
    "divided": _run(multipliers=MultipliersConfig(initial=START)),
    "divided, folded": _run(multipliers=MultipliersConfig("folded", initial=START)),
    "not divided": _run(multipliers=MultipliersConfig(initial=START, divide_weights=False)),
    "not divided, folded": _run(multipliers=MultipliersConfig("folded", initial=START, divide_weights=False)),
    "constants": _run(
        multipliers=MultipliersConfig(
            placement=HALVES,
            initial=dict.fromkeys(HALVES, 0.5),
            divide_weights=False,
            lr_factors=dict.fromkeys(HALVES, 0),
        ),
        optimizer=_optimizer(),
    ),
    "half the initial weights": _run(
        model=replace(SMALL, init_std_factors=dict.fromkeys(HALVES, 0.5)),
        multipliers=MultipliersConfig("none"),
        optimizer=_optimizer(),
    ),
    "frozen norms": _run(model=replace(SMALL, norms="frozen", final_norm="frozen"), optimizer=_optimizer()),
    "constant norms": _run(optimizer=_optimizer(lr_factors={"norm": 0, "final_norm": 0})),
    "late": _run(
        multipliers=MultipliersConfig(schedule="constant", lr=0.01, weight_decay=0.0),
        optimizer=_optimizer(warmup_steps=1000),
        train=TrainConfig(steps=1000, global_batch_size=12, micro_batch_size=12),
    ),
    "late, folded": _run(
        multipliers=MultipliersConfig("folded", schedule="constant", lr=0.01, weight_decay=0.0),
        optimizer=_optimizer(warmup_steps=1000),
        train=TrainConfig(steps=1000, global_batch_size=12, micro_batch_size=12),
    ),
}


@pytest.fixture(scope="module")
def runs() -> dict[str, Outcome]:
    return dict(zip(RUNS, run_distributed(1, run_cases, list(RUNS.values()))[0], strict=True))


def _losses(outcome: Outcome) -> list[float]:
    return [record["loss"] for record in outcome.records]


def _effective(outcome: Outcome, name: str) -> Tensor:
    """W_eff of a logical matrix at the start, in fp64 and by hand."""
    module = name.removesuffix(".weight")
    weight = outcome.initial[name].double()
    for leaf, dim in (("row_multiplier", 1), ("col_multiplier", 0)):
        if (multiplier := outcome.initial.get(f"{module}.{leaf}")) is not None:
            weight = weight * multiplier.double().unsqueeze(dim)
    return weight


@pytest.mark.parametrize("which", ["divided", "divided, folded"])
def test_weights_divided_by_initial_multipliers_give_the_same_function(which: str, runs: dict[str, Outcome]) -> None:
    plain, other = runs["plain"], runs[which]
    q = "decoder.layers.0.self_attention.linear_qkv.q"
    assert torch.all(other.initial[f"{q}.row_multiplier"] == 4.0) and torch.all(
        other.initial[f"{q}.col_multiplier"] == 0.5
    )
    torch.testing.assert_close(other.initial[f"{q}.weight"], plain.initial[f"{q}.weight"] / 2, rtol=2**-22, atol=0)
    for name in plain.initial:
        if name.endswith(".weight"):
            # Two roundings to fp32 apart.
            torch.testing.assert_close(_effective(other, name), _effective(plain, name), rtol=2**-22, atol=0)
    # Some ten thousand roundings of 2^-24, of either sign, in a loss of 5.
    assert _losses(other)[0] == pytest.approx(_losses(plain)[0], rel=1e-6)
    assert _losses(other)[2] != pytest.approx(_losses(plain)[2], rel=1e-6), "but it trains at other rates"


def test_without_the_division_they_change_the_function(runs: dict[str, Outcome]) -> None:
    plain, layer, folded = runs["plain"], runs["not divided"], runs["not divided, folded"]
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    assert torch.equal(layer.initial[name], plain.initial[name])
    assert torch.equal(folded.initial[name], plain.initial[name])
    assert torch.all(folded.initial["decoder.layers.1.mlp.linear_fc2.row_multiplier"] == 0.125)
    assert _losses(layer)[0] != pytest.approx(_losses(plain)[0], rel=1e-5)


@pytest.mark.parametrize("which", ["divided", "not divided"])
def test_folded_and_layer_start_alike_and_stay_alike(which: str, runs: dict[str, Outcome]) -> None:
    assert _losses(runs[f"{which}, folded"]) == pytest.approx(_losses(runs[which]), rel=RELATIVE)


def test_constants_compute_what_scaled_weights_compute(runs: dict[str, Outcome]) -> None:
    constants, scaled = runs["constants"], runs["half the initial weights"]
    # Products with 0.5 are exact.
    assert _losses(constants)[0] == pytest.approx(_losses(scaled)[0], rel=1e-7)
    assert [record["multiplier_grad_norm"] for record in constants.records] == [0.0] * 3
    scalars = [name for name in constants.tensors if name.endswith("scalar_multiplier")]
    assert len(scalars) == 5 and all(constants.tensors[name] == 0.5 for name in scalars)


def test_frozen_norms_are_learned_ones_at_learning_rate_0(runs: dict[str, Outcome]) -> None:
    frozen, constant = runs["frozen norms"], runs["constant norms"]
    assert not any("norm" in name for name in frozen.tensors)
    assert all(torch.all(tensor == 1) for name, tensor in constant.tensors.items() if "norm" in name)
    for key in ("loss", "grad_norm", "multiplier_grad_norm"):
        assert [r[key] for r in frozen.records] == pytest.approx([r[key] for r in constant.records], rel=1e-6), key


@pytest.mark.parametrize("which", ["late", "late, folded"])
def test_a_constant_learning_rate_of_multipliers_knows_no_warm_up(which: str, runs: dict[str, Outcome]) -> None:
    outcome = runs[which]
    row = "decoder.layers.0.mlp.linear_fc2.row_multiplier"
    # Three steps of AdamW at lr 0.01 move an entry by 0.03 at most; in the warm-up it would be below 0.0001.
    moved = (outcome.tensors[row] - outcome.initial[row]).abs()
    assert 0.005 < moved.max() <= 0.0301
    weight = "decoder.layers.0.mlp.linear_fc2.weight"
    assert (outcome.tensors[weight] - outcome.initial[weight]).abs().max() < 1e-4


def test_placements_by_name_leave_the_head_out() -> None:
    assert not any(resolve(name).get("head") for name in ("all", "symmetry_free", "scalar"))
    assert resolve({"head": ["row", "col"]}) == {"head": {"row", "col"}}
