"""A run under DeepSpeed's launcher at tensor parallel 2: what it leaves, and the same losses at ZeRO 3."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import megamult
from megamult.checkpoint.saved import SavedCheckpoint
from megamult.train.command_line import parse
from tests.processes import run_distributed
from tests.screens import unknown_lines
from tests.train.command import REPOSITORY, VOCAB, data_arguments, start

STEPS, SEQ, BATCH = 4, 32, 16  # the batch is tiny.yaml's
HIDDEN, FFN, LAYERS, KV = 128, 352, 2, 64  # tiny.yaml's
ZERO = [1, 3]


def arguments(prefix: Path, run_dir: Path, zero_stage: int) -> list[str]:
    return [
        *("--config", "examples/configs/tiny.yaml", *data_arguments(prefix)),
        *("--parallel.tensor", "2", "--parallel.zero_stage", str(zero_stage)),
        *("--train.steps", str(STEPS), "--model.seq_length", str(SEQ), "--optimizer.warmup_steps", "2"),
        *("--train.eval_every", "2", "--train.eval_batches", "1", "--train.log_histograms_every", "2"),
        *("--train.run_dir", str(run_dir)),
    ]


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """ZeRO stage -> run directory."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for stage in ZERO:
        found[stage] = folder / f"zero{stage}"
        outcome = start(arguments(corpus, found[stage], stage), processes=2, launcher=stage == 1)
        assert outcome.code == 0, outcome.text
        assert outcome.errors == [] and outcome.left == []
        assert unknown_lines(outcome.text) == []
        (found[stage] / "said.txt").write_text(outcome.stdout, encoding="utf-8")
    return found


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_losses_and_norms_do_not_depend_on_the_zero_stage(runs: dict[int, Path]) -> None:
    one, three = (metrics(runs[stage]) for stage in ZERO)
    for a, b in zip(one, three, strict=True):
        for key in {"loss", "valid_loss", "grad_norm", "multiplier_grad_norm"} & set(a):
            # fp32; reductions and partitions sum in other orders, and four steps amplify it a little.
            assert b[key] == pytest.approx(a[key], rel=1e-5), (a["step"], key)


@pytest.mark.parametrize("stage", ZERO)
def test_metrics_have_every_key_at_every_step(runs: dict[int, Path], stage: int) -> None:
    records = metrics(runs[stage])
    assert [(r["step"], "valid_loss" in r) for r in records] == [
        (1, False),
        (2, False),
        (2, True),
        (3, False),
        (4, False),
        (4, True),
    ]
    steps = [r for r in records if "loss" in r]
    for r in steps:
        assert {
            "step",
            "loss",
            "lr",
            "grad_norm",
            "multiplier_grad_norm",
            "tokens",
            "tokens_per_second",
            "seconds",
        } <= set(r)
        assert r["tokens"] == r["step"] * BATCH * SEQ
        assert r["tokens_per_second"] * r["seconds"] == pytest.approx(BATCH * SEQ, rel=1e-9)
        assert r["lr"] == pytest.approx(4e-3 * min(1.0, r["step"] / 2), rel=1e-12)
        assert 0 < r["multiplier_grad_norm"] < math.inf and 0 < r["grad_norm"] < math.inf
    assert all(set(r) == {"step", "valid_loss", "time"} for r in records if "valid_loss" in r)


def test_every_field_of_a_step_is_documented(runs: dict[int, Path]) -> None:
    page = (REPOSITORY / "docs" / "monitoring.md").read_text(encoding="utf-8")
    table = page.partition("## Steps\n")[2].partition("\n\nIf ")[0]
    documented = {name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(\S+?)`", row)}
    written = {key for record in metrics(runs[1]) if "loss" in record for key in record}
    rates = {key for key in written if key.startswith("lr/")}
    assert rates and documented - {"lr/GROUP", "lr/ROLE", "lr/ROLE_SIDE"} == written - rates


def test_the_model_starts_ignorant_and_learns(runs: dict[int, Path]) -> None:
    losses = [r["loss"] for r in metrics(runs[1]) if "loss" in r]
    # Initial logits have a deviation of about 0.02 sqrt(128) = 0.23, which adds half its square to the entropy.
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.1)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("stage", ZERO)
def test_config_yaml_reproduces_the_run(
    runs: dict[int, Path], corpus: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    asked, _ = parse(arguments(corpus, runs[stage], stage))
    written, _ = parse(["--config", str(runs[stage] / "config.yaml")])
    assert written == asked


@pytest.mark.parametrize("stage", ZERO)
def test_tensorboard_has_the_losses_and_each_roles_multipliers(runs: dict[int, Path], stage: int) -> None:
    events = EventAccumulator(str(runs[stage] / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    records = metrics(runs[stage])
    for tag, key in (("train/loss", "loss"), ("valid/loss", "valid_loss"), ("train/grad_norm", "grad_norm")):
        logged = [(e.step, e.value) for e in events.Scalars(tag)]
        # TensorBoard keeps fp32.
        assert logged == [(r["step"], pytest.approx(r[key], rel=1e-6)) for r in records if key in r]
    assert {"train/lr", "train/tokens_per_second", "train/memory_bytes", "train/multiplier_grad_norm"} <= set(
        events.Tags()["scalars"]
    )
    roles = ("q", "k", "v", "attention_out", "gate", "up", "down", "embedding")
    assert set(events.Tags()["histograms"]) == {f"multipliers/{r}/{s}" for r in roles for s in ("row", "col")}
    for tag, count in (("gate/row", LAYERS * FFN), ("k/row", LAYERS * KV), ("embedding/row", VOCAB)):
        histograms = events.Histograms(f"multipliers/{tag}")
        assert [h.step for h in histograms] == [2, 4]
        assert all(h.histogram_value.num == count for h in histograms)
        assert histograms[-1].histogram_value.min < 1 < histograms[-1].histogram_value.max, "they have moved"


def saved_model(run_dir: Path) -> dict[str, torch.Tensor]:
    """Weights and multipliers of the last checkpoint by logical name."""
    checkpoint = SavedCheckpoint(run_dir / "checkpoints" / f"step_{STEPS}")
    checkpoint.verify()
    return {
        name.removeprefix("model."): checkpoint.read(name) for name in checkpoint.shapes if name.startswith("model.")
    }


def expected_weights() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (VOCAB, HIDDEN),
        "output_layer.weight": (VOCAB, HIDDEN),
        "decoder.final_layernorm.weight": (HIDDEN,),
    }
    for i in range(LAYERS):
        layer = f"decoder.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.pre_mlp_layernorm.weight": (HIDDEN,),
            f"{layer}.self_attention.linear_qkv.q.weight": (HIDDEN, HIDDEN),
            f"{layer}.self_attention.linear_qkv.k.weight": (KV, HIDDEN),
            f"{layer}.self_attention.linear_qkv.v.weight": (KV, HIDDEN),
            f"{layer}.self_attention.linear_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.mlp.linear_fc1.gate.weight": (FFN, HIDDEN),
            f"{layer}.mlp.linear_fc1.up.weight": (FFN, HIDDEN),
            f"{layer}.mlp.linear_fc2.weight": (HIDDEN, FFN),
        }
    return shapes


def scaled(name: str) -> bool:
    """Whether placement `all` scales this weight."""
    return "norm" not in name and not name.startswith("output_layer")


@pytest.mark.parametrize("stage", ZERO)
def test_the_saved_model_has_logical_names_and_shapes_without_padding(runs: dict[int, Path], stage: int) -> None:
    saved = saved_model(runs[stage])
    expected = expected_weights()
    for name, shape in expected_weights().items():
        if scaled(name):
            module = name.removesuffix(".weight")
            expected |= {f"{module}.row_multiplier": shape[:1], f"{module}.col_multiplier": shape[1:]}
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == expected
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in saved.values())


def test_both_stages_save_the_same_model(runs: dict[int, Path]) -> None:
    one, three = (saved_model(runs[stage]) for stage in ZERO)
    for name in one:
        # Looser than the losses: with eps 1e-8, AdamW divides the rounding of a gradient that vanishes by its size.
        assert (one[name] - three[name]).norm() < 1e-3 * one[name].norm(), name


@pytest.mark.parametrize("stage", ZERO)
def test_merging_the_saved_model_scales_rows_and_columns_and_leaves_no_multiplier(
    runs: dict[int, Path], stage: int
) -> None:
    saved = saved_model(runs[stage])
    merged = megamult.merge(saved)
    assert set(merged) == set(expected_weights())
    for name, weight in merged.items():
        wanted = saved[name].double()
        if scaled(name):
            module = name.removesuffix(".weight")
            rows, cols = (saved[f"{module}.{side}_multiplier"].double() for side in ("row", "col"))
            wanted = rows[:, None] * wanted * cols
            assert not torch.equal(weight, saved[name])
        # Two fp32 products.
        torch.testing.assert_close(weight.double(), wanted, rtol=3e-7, atol=0)


def test_the_run_says_where_the_weights_are_and_how_far_it_is_below_the_unigram_entropy(runs: dict[int, Path]) -> None:
    for stage, run_dir in runs.items():
        said = (run_dir / "said.txt").read_text(encoding="utf-8")
        assert f"ZeRO {stage}, fp32" in said
        assert f"checkpoint: {run_dir / 'checkpoints' / f'step_{STEPS}'}" in said
        assert (run_dir / "checkpoints" / "latest").read_text() == f"step_{STEPS}\n"
        assert f"valid loss {metrics(run_dir)[-1]['valid_loss']:.4f} nats per token" in said
        assert "unigram entropy of the training tokens" in said
        assert "gate/row" in said  # the table of spreads


def numbers_drawn(arguments: list[str]) -> tuple[int, set[str]]:
    """How many initial weights a run draws on this rank, and what its watchdog hears while it builds the model."""
    from megamult.models.common import draw
    from megamult.runtime.progress import Progress
    from megamult.train.pretrain import main

    with (
        mock.patch.object(draw, "fill_normal", wraps=draw.fill_normal) as fill,
        mock.patch.object(Progress, "at", autospec=True, side_effect=Progress.at) as at,
    ):
        main(arguments)
    heard = {call.args[2] for call in at.call_args_list}
    return sum(call.args[0].numel() for call in fill.call_args_list), heard


def test_a_run_that_resumes_draws_no_weights_and_new_multipliers_start_at_1(corpus: Path, tmp_path: Path) -> None:
    run = [
        *("--config", str(REPOSITORY / "examples/configs/tiny.yaml"), *data_arguments(corpus)),
        *("--train.run_dir", str(tmp_path / "run"), "--model.seq_length", "32", "--optimizer.warmup_steps", "0"),
    ]
    parts: list[list[str]] = [
        ["--train.steps", "1", "--multipliers.implementation", "none"],
        ["--train.steps", "2", "--checkpoint.load", "latest"],
    ]
    (fresh, heard), (resumed, _) = (run_distributed(1, numbers_drawn, run + part)[0] for part in parts)
    assert fresh > 400_000 and "drawing decoder.layers.0.mlp.linear_fc1.weight" in heard
    assert resumed == 0
    first, second = (record["loss"] for record in metrics(tmp_path / "run") if "loss" in record)
    # One step of 0.004 from where the model knows nothing: it neither explodes nor begins anew.
    assert second < first
    assert (
        SavedCheckpoint(tmp_path / "run" / "checkpoints" / "step_2").shapes.keys()
        > SavedCheckpoint(tmp_path / "run" / "checkpoints" / "step_1").shapes.keys()
    )
