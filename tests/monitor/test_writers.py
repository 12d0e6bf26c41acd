"""What a run leaves in its directory: lines of JSON, TensorBoard events, a line of text now and then."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megamult.monitor.writers import Writers

NOON = 1795176000.0
"""A time, in seconds since 1970."""


class Clock:
    """A clock that goes on by `step` seconds between two steps and stands still in between."""

    def __init__(self, step: float = 0.0) -> None:
        self.now, self.step = NOON, step

    def __call__(self) -> float:
        return self.now

    def tick(self) -> None:
        """Let the time of a step pass."""
        self.now += self.step


def record(step: int) -> dict[str, float]:
    return {
        **{"step": step, "loss": 5.0 - step, "lr": 0.1, "tokens_per_second": 1234.0, "skipped_steps": 0},
        **{"grad_norm": 0.5, "multiplier_grad_norm": 0.25, "batch_size": 2},
    }


def line(step: int) -> dict[str, float]:
    return record(step) | {"time": NOON}


def write(folder: Path, steps: int) -> None:
    with Writers(folder, steps, clock=Clock()) as writers:
        for step in range(1, steps + 1):
            writers.step(record(step), {"memory_bytes": 2.0**20})
        writers.histograms({"q/row": torch.linspace(0.5, 1.5, 11)}, steps)
        writers.evaluation({"step": steps, "valid_loss": 2.5})


def test_metrics_hold_one_object_per_step_and_one_per_evaluation(tmp_path: Path) -> None:
    write(tmp_path / "new" / "run", 3)
    lines = (tmp_path / "new" / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        *(line(step) for step in (1, 2, 3)),
        {"step": 3, "valid_loss": 2.5, "time": NOON},
    ]


def test_the_monitors_figures_are_a_line_of_their_own_and_curves_of_their_own_names(tmp_path: Path) -> None:
    figures = {"weight_rms/q": 0.5, "weight_rms/q/layer_00": 0.25, "weight_row_cv/q": float("nan")}
    with Writers(tmp_path, 1, clock=Clock()) as writers:
        writers.step(record(1), {})
        writers.figures(1, figures)
    lines = [json.loads(each) for each in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [line(1), {"step": 1, **figures, "weight_row_cv/q": None, "time": NOON}]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("weight_rms/q/layer_00")] == [(1, 0.25)]


def test_a_line_is_in_the_file_as_soon_as_its_step_is_done(tmp_path: Path) -> None:
    with Writers(tmp_path, 2, clock=Clock()) as writers:
        writers.step(record(1), {})
        assert json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8")) == line(1)


def test_tensorboard_holds_every_scalar_and_the_histograms(tmp_path: Path) -> None:
    write(tmp_path, 3)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0, "scalars": 0}).Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss",
        "train/lr",
        "train/tokens_per_second",
        "train/memory_bytes",
        *("train/grad_norm", "train/multiplier_grad_norm", "train/batch_size"),
        "train/skipped_steps",
        "valid/loss",
    }
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert [(e.step, e.value) for e in events.Scalars("valid/loss")] == [(3, 2.5)]
    (histogram,) = events.Histograms("multipliers/q/row")
    value = histogram.histogram_value
    # TensorBoard keeps extremes and count in float64 of the fp32 values 0.5 and 1.5, which are exact.
    assert (histogram.step, value.min, value.max, value.num) == (3, 0.5, 1.5, 11)


def told(folder: Path, capsys: pytest.CaptureFixture[str], steps: int, seconds: float) -> list[tuple[int, str]]:
    """(step, line) of the steps that are told without a terminal, if each takes so many seconds."""
    clock = Clock(seconds)
    with Writers(folder, steps, samples=(2 * steps, 0), clock=clock) as writers:
        for step in range(1, steps + 1):
            clock.tick()
            writers.step(record(step), {"mfu": 0.321} if step > 1 else {})
    lines = [each for each in capsys.readouterr().out.splitlines() if "tokens/s" in each]
    return [(int(each.split("step ")[1].split("/")[0]), each) for each in lines]


def test_without_a_terminal_lines_come_soon_at_first_and_every_two_minutes_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [step for step, _ in told(tmp_path, capsys, 4000, 2.0)]
    assert steps[0] == 1 and steps[-1] == 4000
    gaps = [2 * (later - earlier) for earlier, later in itertools.pairwise(steps)]
    # Steps of 2 s: the first gap is the shortest, 5 s, rounded up; none is longer than 2 minutes.
    assert gaps[0] == 6 and max(gaps) == 120 and all(gap == 120 for gap in gaps[-50:-1])
    assert len(steps) < 110, "8,000 s are 67 times two minutes, and there are some lines more at the start"


def test_a_run_of_slow_steps_tells_each_and_a_run_of_quick_ones_only_the_first_and_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [step for step, _ in told(tmp_path / "slow", capsys, 5, 150.0)] == [1, 2, 3, 4, 5]
    assert [step for step, _ in told(tmp_path / "quick", capsys, 40, 0.1)] == [1, 40]


def test_the_time_left_follows_from_the_pace_after_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = dict(told(tmp_path, capsys, 10, 60.0))
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(NOON + 180))
    assert "left" not in lines[1] and "MFU" not in lines[1]
    assert lines[3] == (
        f"{clock} step 3/10: loss 2.0000, lr 0.1, gradient norm 0.5, 1,234 tokens/s, MFU 32.1 %, 7 min 0 s left"
    )


def test_the_bar_counts_sequences_so_that_steps_of_any_size_have_their_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with Writers(tmp_path, steps=4, done=1, samples=(20, 2)) as writers:
        for step, batch in ((2, 2), (3, 6), (4, 10)):
            writers.step(record(step) | {"batch_size": batch}, {})
        assert (writers._bar.n, writers._bar.total) == (20, 20)
        assert writers._bar.desc == "step 4/4"


def test_a_skipped_step_is_told_and_what_is_not_finite_is_null(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Writers(tmp_path, 1000) as writers:
        writers.step(record(1), {})
        writers.step(record(2) | {"loss": float("nan"), "grad_norm": float("inf"), "skipped_steps": 1}, {})
        writers.step(record(3) | {"skipped_steps": 1}, {})
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    second = json.loads(lines[1], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert second["loss"] is None and second["grad_norm"] is None and second["lr"] == 0.1
    assert capsys.readouterr().out.count("so the step changes no weight (1 steps skipped so far)") == 1


def test_both_norms_of_a_skipped_step_are_told_because_their_joint_norm_may_be_the_one_that_is_limited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Writers(tmp_path, 1000) as writers:
        writers.step(record(1) | {"skipped_steps": 1}, {})
    limited = (
        "step 1: the gradient norm is above optimizer.skip_grad_norm (0.5 without multipliers, 0.25 of multipliers)"
    )
    assert limited in capsys.readouterr().out


def test_a_resumed_run_drops_what_was_recorded_after_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 5)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "lo')  # a crash cut it off
    with Writers(tmp_path, 7, done=3, clock=Clock()) as writers:
        writers.step(record(4) | {"loss": 9.0}, {})
    lines = [json.loads(each) for each in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [line(1), line(2), line(3), line(4) | {"loss": 9.0}]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 9.0)]


def test_a_full_disk_is_told_once_and_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Writers(tmp_path, 3) as writers:
        writers._metrics.close()
        writers._metrics = open("/dev/full", "w", encoding="utf-8", buffering=1)  # noqa: SIM115
        writers.step(record(1), {})
        writers.step(record(2), {})
    assert capsys.readouterr().out.count("metrics.jsonl cannot be written ([Errno 28] No space left on device)") == 1


def test_an_output_that_fails_is_told_once_and_keeps_no_other_from_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(figures: dict[str, float]) -> None:
        raise RuntimeError("the service is down")

    got: list[dict[str, float]] = []
    with Writers(tmp_path, 3, further={"a monitor of deepspeed": refuse, "monitor.wandb": got.append}) as writers:
        for step in (1, 2):
            writers.step(record(step), {})
    assert [figures["train/loss"] for figures in got] == [4.0, 3.0]
    said = capsys.readouterr().out
    assert said.count("warning: a monitor of deepspeed cannot be written (the service is down)") == 1
    assert "monitor.wandb" not in said
