"""A dry run checks everything, says what would run and leaves nothing behind; a complete run has nothing left to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamult.monitor.screen import LINES
from megamult.parameters.roles import resolve
from megamult.train.command_line import asked, parse
from tests.screens import unknown_lines
from tests.train.command import REPOSITORY, data_arguments, snapshot, start


def arguments(corpus: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        *("--config", str(REPOSITORY / "examples/configs/tiny.yaml"), *data_arguments(corpus)),
        *("--model.seq_length", "32", "--optimizer.warmup_steps", "0", "--train.run_dir", str(run_dir), *more),
    ]


def test_a_dry_run_says_what_would_run_and_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    monitors = f"--deepspeed={{csv_monitor: {{enabled: true, output_path: {tmp_path}/csv, job_name: x}}}}"
    outcome = start(
        [*arguments(corpus, tmp_path / "deep" / "run", "--train.steps", "50", monitors), "--dry_run"], processes=2
    )
    assert outcome.code == 0, outcome.text
    lines = outcome.stdout.splitlines()
    assert lines[-1] == "dry run: all checks passed, nothing was written"
    said = dict(line.split("  ", 1) for line in lines if not line.startswith("warning: ") and "  " in line)
    assert len(said) <= LINES
    # tiny.yaml at 32 tokens and 16 sequences: 50 steps of 512 tokens. With a vocabulary of 400, its matrices are q, k,
    # v, out, gate, up and down of 2 layers, the embedding and the head; its vectors two norms per layer and the last.
    elements = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 352 * 128) + 2 * 400 * 128 + 5 * 128
    assert f"{elements:,} parameters in 16 matrices and 5 vectors, and 5,200 multipliers (layer)" in said["model"]
    assert "2 processes (tensor parallel 1, data parallel 2), ZeRO 2" in said["sharding"]
    assert "micro-batch 8 x accumulation 1 x data parallel 2" in said["batch"]
    assert said["training"].strip() == "50 steps, 25,600 tokens"
    assert f"{corpus}_train: 25,600 tokens, " in said["data"]
    assert said["directory"].strip() == str(tmp_path / "deep" / "run")
    assert snapshot(tmp_path) == {}


def test_a_dry_run_reports_mistakes_and_ends_with_exit_code_2(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = start([*arguments(corpus, tmp_path / "file" / "run"), "--dry_run"])
    assert outcome.code == 2 and len(outcome.errors) == 1, outcome.text
    assert "train.run_dir" in outcome.errors[0] and "cannot be written (Not a directory" in outcome.errors[0]
    assert list(snapshot(tmp_path)) == ["file"]


def test_a_complete_run_that_is_started_again_says_so_and_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    given = arguments(corpus, tmp_path / "run", "--train.steps", "2", "--checkpoint.load", "latest")
    first = start(given)
    assert first.code == 0, first.text
    assert unknown_lines(first.text) == []
    before = snapshot(tmp_path)
    again = start(given)
    assert again.code == 0, again.text
    assert unknown_lines(again.text) == []
    assert again.stdout == (
        f"nothing is left to do: {tmp_path / 'run' / 'checkpoints' / 'step_2'} is of step 2, and train.steps is 2; to "
        "train on, raise train.steps\n"
    )
    assert snapshot(tmp_path) == before
    more = {role: sorted(sides) for role, sides in resolve("all").items()} | {"head": ["row"]}
    dry = start([*given, "--dry_run", "--train.steps", "3", f"--multipliers.placement={json.dumps(more)}"])
    assert dry.code == 0 and snapshot(tmp_path) == before, dry.text
    assert "1 of 3 steps, 512 of 1,536 tokens, are left" in dry.stdout
    *_, place, heading, change, last = (line for line in dry.stdout.splitlines() if "placement" not in line)
    assert place == (
        f"going on from {tmp_path / 'run' / 'checkpoints' / 'step_2'}: step 2, 32 sequences; 1 multipliers are new and "
        "start at 1"
    )
    assert heading == "configuration changed since the checkpoint (old -> new):"
    assert change.split() == ["train.steps", "2", "->", "3"]
    assert last == "dry run: all checks passed, nothing was written"


@pytest.mark.parametrize("given", [[], ["--dry_run"]])
def test_a_dry_run_is_no_key_of_the_run(given: list[str]) -> None:
    *_, resolved, dry = asked(given)
    assert dry is bool(given) and "dry_run" not in resolved


def test_a_section_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "new.yaml").write_text("name: muon\nlr: 0.01\nmuon: {momentum: 0.9}\n")
    config, resolved = parse(["--optimizer", str(tmp_path / "new.yaml")])
    assert (config.optimizer.name, config.optimizer.lr) == ("muon", 0.01)
    assert config.optimizer.muon is not None and config.optimizer.muon.momentum == 0.9
    (tmp_path / "config.yaml").write_text(resolved)
    assert parse(["--config", str(tmp_path / "config.yaml")])[0] == config
