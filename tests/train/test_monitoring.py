"""The monitor's figures: the same under every sharding, those of whole tensors, and what a run leaves of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.invariance import LR, Case, name_of
from tests.processes import run_distributed
from tests.train.command import data_arguments, start
from tests.train.monitor_workers import run_cases

# fp32 sums in another order, after three steps whose own rounding is amplified (tests/test_invariance.py). A sharding
# that counts an element twice or not at all is off by more than 1e-3.
RELATIVE, ABSOLUTE = 1e-4, 1e-6

ALONE = [
    Case(),
    Case(optimizer="muon"),
    Case(implementation="none"),
    Case(placement="mapping"),
    Case(placement="scalar"),
    Case(model="hybrid"),
]
SHARDED = [
    *(Case(world=4, tensor=2, zero=stage) for stage in (0, 1, 2, 3)),
    *(Case(world=4, tensor=2, zero=stage, implementation="folded", sequence=True) for stage in (0, 2, 3)),
    Case(world=4, tensor=2, zero=1, sequence=True, recompute=True),
    Case(world=4, tensor=4, zero=1, placement="mapping"),
    Case(world=4, tensor=2, zero=3, placement="scalar", implementation="folded"),
    Case(world=4, tensor=2, zero=2, optimizer="muon"),
    Case(world=4, tensor=2, zero=0, optimizer="muon", implementation="folded"),
    Case(world=4, tensor=2, zero=3, implementation="none"),
    Case(world=4, tensor=4, zero=1, sequence=True, recompute=True, model="hybrid"),
]
Figures = dict[str, float]


def reference(case: Case) -> Case:
    """The same training in one process."""
    alone = case.reference
    return Case(implementation="none") if case.implementation == "none" else alone


@pytest.fixture(scope="module")
def figures() -> dict[Case, tuple[Figures, Figures]]:
    """(figures, figures of whole tensors in float64) of each case."""
    alone = run_distributed(1, run_cases, ALONE)[0]
    ranks = run_distributed(4, run_cases, SHARDED, timeout=1200)
    for k, case in enumerate(SHARDED):
        first, *others = ({key: str(value) for key, value in rank[k][0].items()} for rank in ranks)
        assert all(other == first for other in others), f"every rank has the same figures: {name_of(case)}"
    return dict(zip(ALONE, alone, strict=True)) | dict(zip(SHARDED, ranks[0], strict=True))


@pytest.mark.parametrize("case", SHARDED, ids=lambda case: f"{name_of(case)}-{case.optimizer}")
def test_every_figure_is_that_of_one_process(case: Case, figures: dict[Case, tuple[Figures, Figures]]) -> None:
    expected, actual = figures[reference(case)][0], figures[case][0]
    assert actual.keys() == expected.keys()
    for key in expected:
        assert actual[key] == pytest.approx(expected[key], rel=RELATIVE, abs=ABSOLUTE, nan_ok=True), key


@pytest.mark.parametrize("case", [*ALONE, *SHARDED], ids=lambda case: f"{name_of(case)}-{case.optimizer}")
def test_figures_of_weights_are_those_of_whole_tensors(
    case: Case, figures: dict[Case, tuple[Figures, Figures]]
) -> None:
    actual, expected = figures[case]
    assert len(expected) > 50
    for key, value in expected.items():
        assert actual[key] == pytest.approx(value, rel=1e-5, abs=1e-8), key


def test_there_is_a_figure_for_each_metric_role_and_layer(figures: dict[Case, tuple[Figures, Figures]]) -> None:
    adamw, muon, none = (set(figures[case][0]) for case in ALONE[:3])
    roles = ("q", "k", "v", "attention_out", "gate", "up", "down")
    for layer in ("layer_00", "layer_01"):
        for role in roles:
            assert {
                f"{what}_{metric}/{role}/{layer}" for what in ("weight", "effective") for metric in METRICS
            } <= adamw
            assert f"orthogonality_error/{role}/{layer}" in muon - adamw
        assert {f"imbalance_mean/{pair}/{layer}" for pair in PAIRS} <= adamw
        assert {f"{metric}/{layer}" for metric in ACTIVATIONS} <= none
    assert {"logits_rms", "attention_logit_max", "predicted_rms/q", "equilibrium_rms/embedding"} <= none
    assert {"grad_norm/main", "clip_factor/main", "clip_factor/multipliers"} <= adamw
    assert not [key for key in none if key.startswith(("effective", "imbalance", "row_log"))]


METRICS = ("rms", "row_cv", "col_cv")
PAIRS = ("q_k", "v_out", "up_down", "attention_norm", "mlp_norm")
ACTIVATIONS = ("attention_output_rms", "mlp_output_rms", "residual_rms", "attention_logit_rms", "attention_logit_max")


def test_a_layer_of_a_hybrid_has_the_figures_of_its_blocks(figures: dict[Case, tuple[Figures, Figures]]) -> None:
    """Layers M-H*: a mixer, an MLP, all three, attention."""
    found = set(figures[Case(model="hybrid")][0])
    for block, layers in (("attention", "23"), ("mixer", "02"), ("mlp", "12"), ("residual", "0123")):
        metric = f"{block}_rms" if block == "residual" else f"{block}_output_rms"
        assert {key for key in found if key.startswith(f"{metric}/")} == {f"{metric}/layer_0{i}" for i in layers}
    for metric in ("attention_logit_rms", "attention_logit_max", "weight_rms/q", "imbalance_mean/q_k"):
        assert {key for key in found if key.startswith(f"{metric}/")} == {f"{metric}/layer_0{i}" for i in "23"}
    for role in ("ssm_z", "ssm_x", "ssm_b", "ssm_c", "ssm_dt", "ssm_out_normed", "ssm_conv"):
        assert {key for key in found if key.startswith(f"weight_rms/{role}/")} == {
            f"weight_rms/{role}/layer_0{i}" for i in "02"
        }
    assert {f"imbalance_mean/attention_norm/layer_0{i}" for i in "023"} <= found
    assert "imbalance_mean/attention_norm/layer_01" not in found


def test_figures_are_of_a_plausible_size(figures: dict[Case, tuple[Figures, Figures]]) -> None:
    found = figures[ALONE[0]][0]
    assert found["weight_rms/q"] == pytest.approx(0.02, rel=0.2) and found["weight_rms/norm"] == pytest.approx(
        1, abs=0.1
    )
    assert 0.1 * LR < found["update_rms/q"] < 2 * LR
    assert 0 < found["clip_factor/main"] <= 1 and found["clip_factor/multipliers"] == 1.0
    # 96 features of standard deviation 1 (after the norm) times weights of 0.02, give or take three steps.
    assert found["logits_rms"] == pytest.approx(0.02 * math.sqrt(96), rel=0.5)
    # The largest of some thousand numbers that are near normal is a few times their root mean square.
    assert 2 < found["attention_logit_max/layer_00"] / found["attention_logit_rms/layer_00"] < 8
    assert found["attention_logit_max"] < 10
    # Newton-Schulz with these coefficients leaves singular values between 0.7 and 1.2.
    assert 0.05 < figures[ALONE[1]][0]["orthogonality_error/q"] < 0.6
    assert figures[ALONE[1]][0]["orthogonality_error/q"] != found.get("orthogonality_error/q")


def test_a_run_leaves_a_line_of_figures_and_curves_and_warns_at_the_start(corpus: Path, tmp_path: Path) -> None:
    arguments = [
        *("--config", "examples/configs/tiny.yaml", *data_arguments(corpus)),
        *("--train.steps", "5", "--model.seq_length", "32", "--optimizer.warmup_steps", "0"),
        *("--train.run_dir", str(tmp_path / "run"), "--monitor.every", "2", "--multipliers.qk_clip", "0.05"),
    ]
    outcome = start(arguments)
    assert outcome.code == 0, outcome.text
    assert "warning: multipliers.weight_decay" in outcome.stdout
    assert "warning: optimizer.weight_decay" in outcome.stdout
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    monitored = [line for line in lines if "weight_rms/q" in line]
    assert [line["step"] for line in monitored] == [2, 4]
    assert not any("loss" in line for line in monitored)
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    curve = events.Scalars("weight_rms/q/layer_01")
    assert [(e.step, e.value) for e in curve] == [
        (line["step"], pytest.approx(line["weight_rms/q/layer_01"], rel=1e-6)) for line in monitored
    ]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 5
    for figure in ("qk_clip_heads", "qk_clip_factor", "qk_clip_logit"):
        assert [e.value for e in events.Scalars(f"train/{figure}")] == pytest.approx([line[figure] for line in steps])
    for line in steps:
        assert (line["qk_clip_heads"] > 0) == (line["qk_clip_logit"] > 0.05) == (line["qk_clip_factor"] < 1), line
    assert steps[0]["qk_clip_heads"] > 0, "weights as they are drawn have logits above the threshold"
