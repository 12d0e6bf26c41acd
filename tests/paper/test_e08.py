"""E8 of examples/paper on logs whose exponents are known, and on real runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from examples.paper import e08_width as e08
from examples.paper import report
from examples.paper.arms import mup_keys, sizes_at
from examples.paper.experiment import Claim, NotRun, Results
from examples.paper.grid import Arm, Grid, make_run, pretrain
from examples.paper.matrices import BLOCK_ROLES
from examples.running.attempts import record_attempt
from tests.paper.settings import losses_of, tiny
from tests.train.command import start

NORM, LOGIT, HEAD, QK = 0.0, 0.0, -0.7, -1.5
"""Exponents of `learned` that meet every claim."""


def claims(text: str) -> list[Claim]:
    """Claims whose text contains this."""
    return [claim for claim in e08.CLAIMS if text in claim.text]


def log(read: Results, kind: str, norm: float, logit: float, head: float, qk: float) -> None:
    """Write the runs of a kind whose figures are powers of the width, and a factor of 100 away from these outside the
    last quarter of the constant stage, whose only step is 4."""
    for seed in read.seeds:
        # At the base width, muP's runs are those without multipliers.
        for width in e08.WIDTHS[1:] if kind == "mup" else e08.WIDTHS:
            wide = width / 64
            # The smallest width is not among those over which the RMS of W must be constant.
            rms = (0.08 if width == 64 else 0.05) * wide**norm
            figures = {f"weight_rms/{role}": rms for role in (*BLOCK_ROLES, "embedding")}
            figures |= {"weight_rms/head": 0.06 * wide**-0.5, "logits_rms": 2 * seed * wide**logit}
            # The layers' root mean square grows by the exponent of the logits, though one of them does not grow.
            first = 1.0 if logit <= 0 else 0.5
            figures["attention_logit_rms/layer_00"] = first
            figures["attention_logit_rms/layer_01"] = math.sqrt(2 * wide ** (2 * logit) - first**2)
            figures["weight_rms/final_norm"] = 0.9 * wide**head
            logs = {"q": math.log(1.3) + 0.25 * qk * math.log(wide), "k": 0.75 * qk * math.log(wide)}
            figures |= {f"scalar_log_mean/{role}": value for role, value in logs.items()}
            others = {name: 100 * value for name, value in figures.items()}
            arm = e08.arm(read.setting, kind, width)
            losses_of(read.grid, read.setting, arm, seed, [6.0] * 6, 5.0, {1: others, 3: others, 4: figures, 6: others})


@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)], ids=["one seed", "three"])
def test_known_exponents_are_found(tmp_path: Path, seeds: tuple[int, ...]) -> None:
    read = Results(tiny(), Grid(tmp_path), seeds)
    log(read, "learned", NORM, LOGIT, HEAD, QK)
    (norms,) = claims("learned: the RMS of the blocks")
    logits, attention = claims("learned: the width")
    head, less, qk, less_qk = claims("learned: the scale")
    for claim, exponent in (
        (norms, NORM),
        (logits, LOGIT),
        (attention, LOGIT),
        (head, HEAD),
        (less, HEAD),
        (qk, QK),
        (less_qk, QK),
    ):
        measured = claim.measure(read)
        assert measured.verdict == "reproduced", claim.text
        assert measured.estimate is not None and measured.estimate.mean == pytest.approx(exponent, abs=1e-9)
    # The head is reported, and is no part of the claim.
    assert "head -0.500" in norms.measure(read).note
    assert head.measure(read).note.startswith("64: 0.9, 128: 0.554")
    with pytest.raises(NotRun, match="hidden 64, none, seed 1: not started"):
        claims("none: the width")[0].measure(read)


@pytest.mark.parametrize(
    ("exponents", "text"),
    [
        ((0.08, LOGIT, HEAD, QK), "learned: the RMS of the blocks"),
        ((-0.08, LOGIT, HEAD, QK), "learned: the RMS of the blocks"),
        ((NORM, 0.24, HEAD, QK), "learned: the width"),
        ((NORM, LOGIT, -0.3, QK), "the head falls with"),
        ((NORM, LOGIT, -1.05, QK), "the head falls less"),
        ((NORM, LOGIT, HEAD, -0.7), "Q and K falls with"),
        ((NORM, LOGIT, HEAD, -2.1), "Q and K falls less"),
    ],
)
def test_an_exponent_beyond_its_bound_is_seen(tmp_path: Path, exponents: tuple[float, ...], text: str) -> None:
    read = Results(tiny(), Grid(tmp_path), (1,))
    log(read, "learned", *exponents)
    for claim in claims("learned: "):
        assert claim.measure(read).verdict == ("not reproduced" if text in claim.text else "reproduced"), claim.text


def test_without_multipliers_logits_must_grow(tmp_path: Path) -> None:
    for exponent, verdict in ((0.4, "reproduced"), (0.2, "not reproduced")):
        read = Results(tiny(), Grid(tmp_path / verdict), (1,))
        log(read, "none", NORM, exponent, HEAD, QK)
        for claim in claims("none: the width"):
            measured = claim.measure(read)
            assert measured.verdict == verdict
            assert measured.estimate is not None and measured.estimate.mean == pytest.approx(exponent)


def test_the_error_of_one_seed_is_that_of_the_fit(tmp_path: Path) -> None:
    read = Results(tiny(), Grid(tmp_path), (1,))
    for width, value in zip(e08.WIDTHS, (1.0, 2.0, 1.0, 2.2), strict=True):
        arm = e08.arm(read.setting, "learned", width)
        losses_of(read.grid, read.setting, arm, 1, [6.0] * 6, 5.0, {4: {"logits_rms": value}})
    measured = claims("learned: the width")[0].measure(read)
    assert measured.verdict == "not resolved" and measured.estimate is not None and measured.estimate.error > 0.1


def test_a_plot_is_drawn_of_complete_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `reproduce` brings it")
    read = Results(tiny(), Grid(tmp_path), (1,))
    file = tmp_path / "e8.png"
    assert not report.drawn(e08.plot, read, file)
    for kind in e08.ARMS:
        log(read, kind, NORM, LOGIT, HEAD, QK)
    assert report.drawn(e08.plot, read, file) and file.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def real(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, dict[str, Arm]]:
    """Runs of 6 steps at hidden 128: learned, muP's constants, and muP by learning rates, the last two without
    clipping."""
    setting, grid = tiny(str(corpus)), Grid(tmp_path_factory.mktemp("grid"))
    constants = e08.arm(setting, "mup", 128)
    common = {key: constants.overrides[key] for key in ("model.norms", "model.final_norm", "monitor.every")}
    unclipped = {"optimizer.clip_grad_norm": 0.0}
    arms = {
        "learned": e08.arm(setting, "learned", 128),
        "constants": Arm("constants", {**constants.overrides, **unclipped}),
        "rates": Arm("rates", mup_keys(setting, "adamw", e08.BASE, sizes_at(128) | common) | unclipped),
    }
    for arm in arms.values():
        run = make_run(setting, arm, 1)
        grid.claim(run)
        outcome = start(pretrain(run, grid.folder)[2:])
        assert outcome.code == 0, outcome.text
        record_attempt(grid.directory(run), 1.0, 0)
    return Results(setting, grid, (1,)), arms


def test_a_real_run_logs_what_is_read(real: tuple[Results, dict[str, Arm]]) -> None:
    read, _ = real
    for role in (*BLOCK_ROLES, "embedding", "head"):
        # Initial weights of 0.02, those of two roles divided by sqrt(2 x 2 layers), and four steps of 4e-3.
        assert 0.009 < e08.figure(f"weight_rms/{role}", read, "learned", 128, 1) < 0.03
    arm = e08.arm(read.setting, "learned", 128)
    for name, initial, figure in (
        # 128 features of RMS 1 times weights of 0.02; q.k / sqrt(32) of 32 such features each.
        ("logits_rms", 0.02 * math.sqrt(128), e08.logits),
        ("attention_logit_rms/layer_00", 0.02**2 * 128, e08.attention_logits),
    ):
        assert read.series(arm, 1, name)[1] == pytest.approx(initial, rel=0.25)
        assert initial < figure(read, "learned", 128, 1) < 30 * initial
    # Scalars begin at 1 and move by at most 4e-3 in each of four steps.
    assert 0 < abs(math.log(e08.head_scale(read, "learned", 128, 1))) < 0.02
    assert 0 < abs(math.log(e08.query_key_scale(read, "learned", 128, 1))) < 0.04


def test_constants_of_the_forward_pass_train_as_mup_does(real: tuple[Results, dict[str, Arm]]) -> None:
    read, arms = real
    constants, rates = (read.curves(arms[name], 1) for name in ("constants", "rates"))
    for scalar in ("q", "down", "head"):
        series = read.series(arms["constants"], 1, f"scalar_log_mean/{scalar}")
        assert list(series.values()) == pytest.approx([-math.log(2)] * 6, rel=1e-6)
    # The same effective weights; Adam's epsilon is twice as large beside gradients of half the size.
    assert constants.train == pytest.approx(rates.train, abs=2e-4)
    assert constants.result == pytest.approx(rates.result, abs=2e-4)
    assert constants.train[6] < constants.train[1] - 0.05
