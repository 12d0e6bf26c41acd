"""Transfer of the learning rate over width: losses of which the best rate is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from examples.paper import e08_width as e08
from examples.paper import report, transfer
from examples.paper.arms import mup_keys, sizes_at
from examples.paper.experiment import Claim, Results
from examples.paper.falcon_h1 import HYBRID
from examples.paper.grid import Grid, make_run
from tests.paper.settings import losses_of, tiny

CURVATURE = 0.4


def parabola(kind: str, best: float, curvature: float = CURVATURE) -> dict[float, float]:
    """Losses by factor whose minimum is at a factor."""
    return {f: 4.0 + curvature * (math.log(f) - math.log(best)) ** 2 for f in transfer.FACTORS[kind]}


def train(read: Results, kind: str, width: int, found: dict[float, float]) -> None:
    """Write the runs of a kind at a width by AdamW. Seeds differ by more than learning rates do."""
    for factor, loss in found.items():
        for seed in read.seeds:
            arm = transfer.arm(read.setting, "adamw", kind, width, factor)
            directory = losses_of(read.grid, read.setting, arm, seed, [6.0] * 6, loss + 0.5 * (seed - 1))
            if math.isinf(loss):
                (directory / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n{"step": 1, "valid_loss": null}\n')


def claims(kind: str) -> tuple[Claim, Claim]:
    """Claim and reported regret of a kind, by AdamW."""
    first, second = (claim for claim in transfer.EXPERIMENT.claims if claim.text.startswith(f"AdamW, {kind}:"))
    return first, second


@pytest.mark.parametrize(
    ("kind", "at_64", "at_256", "verdict"),
    [
        ("free", 1.3, 0.9, "reproduced"),
        ("free", 0.7, 1.9, "not reproduced"),
        ("fixed", 0.9, 0.31, "not reproduced"),
        ("mup", 0.7, 0.7, "reproduced"),
        ("none", 1.9, 0.45, "reproduced"),
        ("none", 1.3, 0.9, "not reproduced"),
        ("none", 0.5, 2.0, "not reproduced"),
    ],
)
def test_the_best_rate_is_that_of_a_parabola_and_must_stay_or_fall(
    tmp_path: Path, kind: str, at_64: float, at_256: float, verdict: str
) -> None:
    read = Results(tiny(), Grid(tmp_path), (1, 2))
    for width, best in ((64, at_64), (256, at_256)):
        # At the base width, muP's runs are those without multipliers.
        train(read, "none" if (kind, width) == ("mup", 64) else kind, width, parabola(kind, best))
    measured = claims(kind)[0].measure(read)
    assert measured.estimate is not None
    assert measured.estimate.mean == pytest.approx(math.log(at_256 / at_64))
    assert measured.verdict == verdict, measured


def test_the_error_of_the_best_rate_is_the_spread_of_noisy_parabolas() -> None:
    draw, noise = np.random.default_rng(5), 0.003
    exact = parabola("free", 1.3)
    found = transfer.optimum(exact, noise)
    noisy = [
        transfer.optimum({f: y + noise * draw.standard_normal() for f, y in exact.items()}, noise) for _ in range(4000)
    ]
    tops = [each.mean for each in noisy if each is not None]
    assert found is not None and found.mean == pytest.approx(math.log(1.3))
    # 4,000 draws leave 1 % of a deviation; the rest is the second order.
    assert found.error == pytest.approx(np.std(tops), rel=0.05)


def test_flat_losses_have_no_resolved_rate(tmp_path: Path) -> None:
    read = Results(tiny(), Grid(tmp_path), (1,))
    for width in (64, 256):
        train(read, "free", width, parabola("free", 1.3, 0.01))
    assert claims("free")[0].measure(read).verdict == "not resolved"
    level = transfer.optimum(dict.fromkeys(transfer.FACTORS["free"], 4.0) | {0.25: 4.0, 0.5: 3.0, 1.0: 3.0}, 0.01)
    assert level is not None and math.exp(level.mean) == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize(
    "found", [parabola("free", 0.2), parabola("free", 5.0), parabola("free", 1.0) | {2.0: math.inf}]
)
def test_a_minimum_at_an_end_or_beside_a_divergence_is_no_optimum(tmp_path: Path, found: dict[float, float]) -> None:
    read = Results(tiny(), Grid(tmp_path), (1,))
    train(read, "free", 64, parabola("free", 1.0))
    train(read, "free", 256, found)
    measured = claims("free")[0].measure(read)
    assert measured.verdict == "not resolved" and measured.estimate is None
    assert "256: none in the range" in measured.note


def test_regret_is_what_the_rate_of_the_smallest_width_costs_at_the_largest(tmp_path: Path) -> None:
    read = Results(tiny(), Grid(tmp_path), (1, 2))
    for width, best in ((64, 2.0), (128, 1.0), (256, 0.5)):
        train(read, "none", width, parabola("none", best))
    measured = claims("none")[1].measure(read)
    assert measured.estimate is not None and measured.verdict == "reported"
    assert measured.estimate.mean == pytest.approx(CURVATURE * math.log(4) ** 2)
    assert measured.note.startswith("lr x 2 instead of x 0.5; best at 64: lr x 2.00")


def test_all_keys_but_those_of_width_and_rate_are_one_kinds(tmp_path: Path) -> None:
    setting = tiny()
    names = {
        kind: make_run(setting, transfer.arm(setting, "adamw", kind, 64, 1.0), 1).name for kind in transfer.FACTORS
    }
    assert names["mup"] == names["none"] and len(set(names.values())) == 3
    for kind in transfer.FACTORS:
        small, wide = (transfer.arm(setting, "adamw", kind, width, 0.5).overrides for width in (128, 256))
        differing = {key for key in small if small[key] != wide[key]}
        # The head's size and its share of keys and values stay.
        assert set(sizes_at(128)) <= differing
        assert differing <= {*sizes_at(128), *(mup_keys(setting, "adamw", 64, sizes_at(128)) if kind == "mup" else ())}
        assert wide["optimizer.lr"] * wide["optimizer.weight_decay"] == pytest.approx(4e-3 * 0.8)


def test_a_plot_is_drawn_of_complete_sweeps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `reproduce` brings it")
    read = Results(tiny(), Grid(tmp_path), (1,))
    file = tmp_path / "transfer.png"
    assert not report.drawn(transfer.plot, read, file)
    train(read, "free", 64, parabola("free", 1.0))
    assert report.drawn(transfer.plot, read, file) and file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("width", [64, 128])  # the first is the base width, where muP changes nothing
def test_mup_is_refused_for_a_hybrid(width: int) -> None:
    hybrid = {**sizes_at(width), **HYBRID}
    said = "model.architecture is 'falcon_h1': .* known here for llama only, .*; tune this model at its own width"
    with pytest.raises(ValueError, match=said):
        mup_keys(tiny(), "muon", 64, hybrid)
    with pytest.raises(ValueError, match=said):
        e08.constants(tiny(), hybrid)
