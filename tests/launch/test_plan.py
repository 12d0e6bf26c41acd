"""launch/plan.py prints the plan of a configuration, or all mistakes at once with exit code 2."""

from __future__ import annotations

import re

from tests.processes import REPOSITORY
from tests.programs import run

TINY = ["launch/plan.py", "--config", str(REPOSITORY / "examples" / "configs" / "tiny.yaml"), "--gpu", "cpu"]
KEYS = ["--model.vocab_size", "300", "--data.tokenizer", "null", "--gpus_per_node", "2"]


def test_a_plan_names_kinds_and_assumptions() -> None:
    done = run([*TINY, *KEYS, "--optimizer.name", "muon"])
    assert done.returncode == 0, done.stderr
    for label in ("weights", "momentum", "activations", "gradient reduction", "together", "MFU"):
        assert re.search(rf"^ *{label}( +\S.*)+$", done.stdout, re.M), label
    assert "best of" in done.stdout and "Newton-Schulz per step" in done.stdout
    for subject in ("cluster", "memory", "compute", "communication", "MFU"):
        assert f"assumed for {subject}: " in done.stdout


def test_what_does_not_fit_says_by_how_much() -> None:
    done = run([*TINY, *KEYS, "--memory", "0.001"])
    assert done.returncode == 0, done.stderr
    assert re.search(r"does not fit: this run needs \S+ MB per rank, \S+ MB more than the 900 kB", done.stdout)
    assert re.search(
        r"nothing fits: the smallest of \d+ shardings needs .* \(--parallel.tensor 2 .*; take more", done.stdout
    )


def test_all_mistakes_are_told_at_once() -> None:
    wrong = ["--gpu", "h10", "--nodes", "0", "--peak", "much", "--efficiency", "2", "--train.steps", "-1"]
    done = run([*TINY, *KEYS, *wrong])
    assert done.returncode == 2 and not done.stdout
    for part in ("--gpu is 'h10'", "--nodes is 0", "--peak is 'much'", "--efficiency is 2.0", "train.steps"):
        assert part in done.stderr, part
    done = run([*TINY, *KEYS, "--gpus_per_node", "3", "--parallel.tensor", "2"])
    assert done.returncode == 2
    assert "3 processes were started" in done.stderr and "would span nodes" in done.stderr
