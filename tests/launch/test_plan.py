"""launch/plan.py prints the plan of a configuration, or all mistakes at once. Its exit code says which."""

from __future__ import annotations

import re

from megamult.runtime import exit_codes
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
    assert done.returncode == exit_codes.DOES_NOT_FIT, done.stderr
    assert re.search(r"^ *MFU( +\S.*)+$", done.stdout, re.M), "the table is there"
    assert re.search(r"does not fit: this run needs \S+ MB per rank, \S+ MB more than the 900 kB", done.stdout)
    assert re.search(
        r"nothing fits: the smallest of \d+ shardings needs .* \(--parallel.tensor 2 .*; take more", done.stdout
    )


def test_the_exit_code_without_a_search_is_that_of_the_run_of_the_keys() -> None:
    # 27 MB of 30 may be used: less than the 36 MB that this run needs, and more than the 12 MB of the smallest.
    keys = [*TINY, *KEYS, "--memory", "0.03"]
    assert run(keys).returncode == 0
    done = run([*keys, "--no_search"])
    assert done.returncode == exit_codes.DOES_NOT_FIT, done.stderr
    enough = run([*TINY, *KEYS, "--no_search"])
    assert enough.returncode == 0, enough.stderr
    assert "\n\n" not in enough.stdout, "no empty line where there is nothing to say"


def test_all_mistakes_are_told_at_once() -> None:
    wrong = ["--gpu", "h10", "--nodes", "0", "--peak", "much", "--efficiency", "2", "--train.steps", "-1"]
    done = run([*TINY, *KEYS, *wrong])
    assert done.returncode == 2 and not done.stdout
    for part in ("--gpu is 'h10'", "--nodes is 0", "--peak is 'much'", "--efficiency is 2.0", "train.steps"):
        assert part in done.stderr, part
    done = run([*TINY, *KEYS, "--gpus_per_node", "3", "--parallel.tensor", "2"])
    assert done.returncode == 2
    assert "3 processes were started" in done.stderr and "would span nodes" in done.stderr
    wrong = ["--parallel.tensor", "2", "--gpus_per_node", "3", "--deepspeed.gradient_clip", "1"]
    done = run([*TINY, *KEYS, *wrong])
    assert done.returncode == 2
    assert "3 processes were started" in done.stderr and "deepspeed.gradient_clip is not a" in done.stderr


def test_flags_without_value_or_with_another_name_are_told_in_one_line() -> None:
    done = run([*TINY, *KEYS, "--nodes", "--peak"])
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--nodes has no value: give a whole number; --peak has no value: give a number" in done.stderr
    done = run([*TINY, *KEYS, "--no_search=yes"])
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    done = run([*TINY, *KEYS, "--node", "3"])
    assert done.returncode == 2
    assert "--node is none of the cluster's flags either: these are --gpu, --nodes, " in done.stderr


def test_a_gpu_needs_its_peak_rate_where_a_run_computes_in_fp32() -> None:
    fp32 = [*TINY, *KEYS, "--gpu", "h100", "--train.dtype", "fp32", "--no_search"]
    done = run(fp32)
    assert done.returncode == 2
    assert "train.dtype is fp32, and 989 TFLOP/s is the peak rate of --gpu h100 in bf16: give" in done.stderr
    assert run([*fp32, "--peak", "67"]).returncode == 0
