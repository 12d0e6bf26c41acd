"""launch/mup.py: keys that a run reads, and one line for a mistake."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megamult.models.llama.mup import mup
from megamult.multipliers.config import MultipliersConfig
from megamult.optim.config import OptimizerConfig
from megamult.train.command_line import parse
from tests import programs

REPOSITORY = Path(__file__).parents[2]
TINY = str(REPOSITORY / "examples" / "configs" / "tiny.yaml")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return programs.run([REPOSITORY / "launch" / "mup.py", "--config", TINY, *arguments], environment)


def test_its_output_is_a_second_configuration(tmp_path: Path) -> None:
    done = run("--base_hidden_size", "64", "--optimizer.lr", "0.01")
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "mup.yaml").write_text(done.stdout)
    config, _ = parse(["--config", TINY, "--config", str(tmp_path / "mup.yaml")])
    narrow = replace(config.model, hidden_size=64, num_attention_heads=2, num_query_groups=1, ffn_hidden_size=176)
    plain = replace(config.model, init_std_factors={})
    expected = mup(plain, narrow).overrides(plain, OptimizerConfig(), MultipliersConfig())
    matrices = ("q", "k", "v", "attention_out", "gate", "up", "down")
    assert expected["model"]["init_std_factors"] == pytest.approx(dict.fromkeys(matrices, 2**-0.5))
    assert config.model.init_std_factors == expected["model"]["init_std_factors"]
    assert config.optimizer.lr_factors == expected["optimizer"]["lr_factors"]
    assert config.multipliers.initial_values().value("head", "scalar") == 0.5
    assert config.multipliers.by_side("lr_factors") == {("head", "scalar"): 0.0}


def test_muon_keeps_the_spectral_norm_of_updates() -> None:
    done = run("--base_hidden_size", "64", "--optimizer.name", "muon", "--learned")
    keys = yaml.safe_load(done.stdout)
    assert list(keys["optimizer"]["lr_factors"].values()) == pytest.approx([2**-0.5] * 7)
    assert keys["multipliers"]["lr_factors"] == {"head": {"scalar": 0.5}}


def test_a_width_that_does_not_fit_is_a_mistake_of_one_line() -> None:
    done = run("--base_hidden_size", "50")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: base_hidden_size is 50 with model.hidden_size 128: ")
    assert "model.num_attention_heads 4" in done.stderr and done.stderr.count("\n") == 1
    done = run("--base_hidden_size", "64", "--model.tie_embeddings", "true")
    assert done.returncode == 2 and "model.tie_embeddings is true" in done.stderr
