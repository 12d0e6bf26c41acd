"""What a run leaves in its directory: lines of JSON, TensorBoard events, a line of text now and then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megamult.monitor.writers import Writers


def record(step: int) -> dict[str, float]:
    return {"step": step, "loss": 5.0 - step, "lr": 0.1, "tokens_per_second": 1234.0, "skipped_steps": 0}


def write(folder: Path, steps: int) -> None:
    with Writers(folder, steps) as writers:
        for step in range(1, steps + 1):
            writers.step(record(step), {"memory_bytes": 2.0**20})
        writers.histograms({"q/row": torch.linspace(0.5, 1.5, 11)}, steps)
        writers.evaluation({"step": steps, "valid_loss": 2.5})


def test_metrics_hold_one_object_per_step_and_one_per_evaluation(tmp_path: Path) -> None:
    write(tmp_path / "new" / "run", 3)
    lines = (tmp_path / "new" / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        *(record(step) for step in (1, 2, 3)),
        {"step": 3, "valid_loss": 2.5},
    ]


def test_the_monitors_figures_are_a_line_of_their_own_and_curves_of_their_own_names(tmp_path: Path) -> None:
    figures = {"weight_rms/q": 0.5, "weight_rms/q/layer_00": 0.25, "weight_row_cv/q": float("nan")}
    with Writers(tmp_path, 1) as writers:
        writers.step(record(1), {})
        writers.figures(1, figures)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [record(1), {"step": 1, **figures, "weight_row_cv/q": None}]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("weight_rms/q/layer_00")] == [(1, 0.25)]


def test_a_line_is_in_the_file_as_soon_as_its_step_is_done(tmp_path: Path) -> None:
    with Writers(tmp_path, 2) as writers:
        writers.step(record(1), {})
        assert json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8")) == record(1)


def test_tensorboard_holds_every_scalar_and_the_histograms(tmp_path: Path) -> None:
    write(tmp_path, 3)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0, "scalars": 0}).Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss",
        "train/lr",
        "train/tokens_per_second",
        "train/memory_bytes",
        "train/skipped_steps",
        "valid/loss",
    }
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert [(e.step, e.value) for e in events.Scalars("valid/loss")] == [(3, 2.5)]
    (histogram,) = events.Histograms("multipliers/q/row")
    value = histogram.histogram_value
    # TensorBoard keeps extremes and count in float64 of the fp32 values 0.5 and 1.5, which are exact.
    assert (histogram.step, value.min, value.max, value.num) == (3, 0.5, 1.5, 11)


def test_without_a_terminal_about_twenty_lines_tell_the_progress_and_the_last_step_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 103)
    lines = [line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    assert 20 <= len(lines) <= 22
    assert lines[-1].startswith("step 103/103: loss -98.0000, 1,234 tokens/s")


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


def test_a_resumed_run_drops_what_was_recorded_after_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 5)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "lo')  # a crash cut it off
    with Writers(tmp_path, 7, done=3) as writers:
        writers.step(record(4) | {"loss": 9.0}, {})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [record(1), record(2), record(3), record(4) | {"loss": 9.0}]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 9.0)]


def test_a_full_disk_is_told_once_and_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Writers(tmp_path, 3) as writers:
        writers._metrics.close()
        writers._metrics = open("/dev/full", "w", encoding="utf-8", buffering=1)  # noqa: SIM115
        writers.step(record(1), {})
        writers.step(record(2), {})
    assert capsys.readouterr().out.count("metrics.jsonl cannot be written ([Errno 28] No space left on device)") == 1
