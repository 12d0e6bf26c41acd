"""Weights & Biases offline: what the folders that `wandb sync` would send hold."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megamult.monitor import weights_and_biases
from megamult.monitor.config import WandbConfig
from tests.train.command import REPOSITORY, data_arguments, start

OFFLINE = WandbConfig(project="screens", name="small", mode="offline")
BLOCK, HEADER = 32768, 7
"""Bytes of a block of the file of records, and of the file's and each record's header: LevelDB's log format."""


def records(run_dir: Path) -> Iterator[Any]:
    """The records of all starts of a run, in the order of the starts."""
    from wandb.proto import wandb_internal_pb2

    for path in sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb")):
        data, at, whole = path.read_bytes(), HEADER, b""
        while at + HEADER <= len(data):
            if BLOCK - at % BLOCK < HEADER:
                at += BLOCK - at % BLOCK
                continue
            _, length, kind = struct.unpack_from("<IHB", data, at)
            whole += data[at + HEADER : at + HEADER + length]
            at += HEADER + length
            if kind in (1, 4):  # a whole record, or the last piece of one
                record = wandb_internal_pb2.Record()
                record.ParseFromString(whole)
                whole = b""
                yield record


def curve(run_dir: Path, name: str) -> list[tuple[float, float]]:
    """(step, value) of one figure."""
    found = []
    for record in records(run_dir):
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if name in row:
            found.append((row["step"], row[name]))
    return found


def test_a_run_and_its_resume_are_one_run_with_every_figure(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the package wandb is not installed (extra wandb)")
    given = [
        *("--config", str(REPOSITORY / "examples/configs/tiny.yaml"), *data_arguments(corpus)),
        *("--model.seq_length", "32", "--optimizer.warmup_steps", "0", "--train.run_dir", str(tmp_path / "run")),
        *("--monitor.wandb.project", "screens", "--monitor.wandb.mode", "offline", "--checkpoint.load", "latest"),
    ]
    for steps in ("2", "3"):  # on two ranks, of which one writes
        outcome = start([*given, "--train.steps", steps], processes=2)
        assert outcome.code == 0, outcome.text
        assert f"Weights & Biases: {tmp_path / 'run' / 'wandb'} (offline: `wandb sync` sends it)" in outcome.stdout
        assert "wandb:" not in outcome.text
    runs = [record.run for record in records(tmp_path / "run") if record.WhichOneof("record_type") == "run"]
    known = (tmp_path / "run" / "wandb_id").read_text().strip()
    assert [(run.run_id, run.project, run.display_name) for run in runs] == [(known, "screens", "run")] * 2
    assert '"optimizer.lr"' in str(runs[0].config) or any(each.key == "optimizer.lr" for each in runs[0].config.update)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name, key in (("train/loss", "loss"), ("valid/loss", "valid_loss"), ("lr/matrix", "lr/matrix")):
        written = [(line["step"], line[key]) for line in lines if key in line]
        assert curve(tmp_path / "run", name) == [(step, pytest.approx(value, rel=1e-12)) for step, value in written]


def test_without_the_package_the_key_is_refused_and_without_the_key_the_package_is_not_needed() -> None:
    with mock.patch("importlib.util.find_spec", return_value=None):
        weights_and_biases.check(WandbConfig())
        with pytest.raises(
            ValueError, match=r"monitor\.wandb\.project is 'screens' .* pip install 'megamult\[wandb\]'"
        ):
            weights_and_biases.check(OFFLINE)


def test_keys_without_a_project_have_no_effect_and_are_refused_together() -> None:
    with pytest.raises(
        ValueError, match=r"monitor\.wandb\.name is x, monitor\.wandb\.mode is offline without .*project"
    ):
        WandbConfig(name="x", mode="offline")


def test_figures_that_cannot_be_sent_at_the_end_are_a_warning(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb", reason="the package wandb is not installed (extra wandb)")
    made = weights_and_biases.WeightsAndBiases(OFFLINE, tmp_path, {})
    try:
        settings = wandb.run.settings
        assert settings.finish_timeout == weights_and_biases.SEND_SECONDS, "other ranks wait for as long"
        assert settings.finish_timeout_raises, "or nobody would know"
        with mock.patch.object(made._run, "finish", side_effect=TimeoutError("timed out\nafter 300 s")):
            warning = made.close(0)
        assert warning == (
            "monitor.wandb: the run could not be ended at Weights & Biases (timed out after 300 s): the last figures "
            f"may be missing in {tmp_path / 'wandb'}"
        )
    finally:
        assert made.close(0) is None


def test_an_older_package_is_refused() -> None:
    with (
        mock.patch("importlib.metadata.version", return_value="0.26.1"),
        pytest.raises(ValueError, match=r"package wandb is of version 0\.26\.1, older than 0\.27: pip install"),
    ):
        pytest.importorskip("wandb", reason="the package wandb is not installed (extra wandb)")
        weights_and_biases.check(OFFLINE)
