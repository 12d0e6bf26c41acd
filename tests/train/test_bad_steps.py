"""Steps that must not be applied, and a run that has only such."""

from __future__ import annotations

import json
from pathlib import Path

from tests.train.command import data_arguments, start


def test_a_run_of_bad_steps_ends_with_code_65_and_names_the_checkpoint_from_before(
    corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    command = [
        *("--config", "examples/configs/tiny.yaml", *data_arguments(corpus), "--model.seq_length", "32"),
        *("--train.run_dir", str(run_dir), "--checkpoint.load", "latest", "--checkpoint.save_every", "1"),
    ]
    good = start([*command, "--train.steps", "10"])
    assert good.code == 0, good.text
    # No gradient is as small as this, so every step is bad.
    bad = start([*command, "--train.steps", "30", "--optimizer.skip_grad_norm", "1e-6", "--train.max_bad_steps", "4"])
    assert bad.code == 65, bad.text
    assert len(bad.errors) == 1 and "Traceback" not in bad.text
    assert "the last 4 steps, 11 to 14, were bad (train.max_bad_steps)" in bad.errors[0]
    assert str(run_dir / "checkpoints" / "step_10") in bad.errors[0]
    assert bad.text.count("the gradient norm is above optimizer.skip_grad_norm (") == 4
    assert bad.text.count(" of multipliers), so the step changes no weight") == 4
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    skipped = {record["step"]: record["skipped_steps"] for record in records if "loss" in record}
    assert [skipped[step] for step in range(10, 15)] == [0, 1, 2, 3, 4]
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == "step_10", "no bad step's state was saved"
    again = start([*command, "--train.steps", "12"])
    assert again.code == 0 and "going on from" in again.stdout, again.text
