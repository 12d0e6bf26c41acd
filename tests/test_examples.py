"""The examples run as they stand, and do what they say."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.benchmarks import gpu
from tests.processes import starts_processes
from tests.programs import Ranks
from tests.screens import unknown_lines

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def _screen(*command: str, ranks: int | None = None, **variables: str) -> str:
    """What a script printed, which is nothing but lines that docs/screen.md shows."""
    program = Ranks(command, ranks, {**_AS_A_USER, **variables})
    stdout, stderr = program.communicate(timeout=300)
    assert program.poll() == 0, stderr
    assert unknown_lines(stdout + stderr) == []
    return stdout


_AS_A_USER = {
    **{name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"},
    "DS_ACCELERATOR": "cpu",
}


def _run(*command: str, ranks: int | None = None, **variables: str) -> str:
    """What a script printed: by itself, or on so many ranks."""
    program = Ranks(command, ranks, {**os.environ, "DS_ACCELERATOR": "cpu", **variables})
    stdout, stderr = program.communicate(timeout=300)
    assert program.poll() == 0, stderr
    return stdout


def test_own_loop_learns_its_one_batch() -> None:
    starts_processes()
    # A new interpreter: what Megatron warns about at its import must not be on the screen either.
    command = [sys.executable, str(EXAMPLES / "own_loop.py")]
    done = subprocess.run(command, env=_AS_A_USER, capture_output=True, text=True, timeout=300, check=True)
    assert unknown_lines(done.stdout + done.stderr) == []
    losses = [float(value) for value in re.findall(r"cross entropy ([\d.]+)", done.stdout)]
    assert len(losses) == 10
    # One batch of 256 tokens over and over, from ln(1000) = 6.9: ten steps must show.
    assert losses[0] > 6.5 and losses[-1] < losses[0] - 1.0


@pytest.mark.parametrize("script", ["own_loop.py", "fold_huggingface.py", "fold_megatron.py"])
def test_megamult_is_imported_before_what_warns_at_its_import(script: str) -> None:
    tree = ast.parse((EXAMPLES / script).read_text(encoding="utf-8"))
    names = [each.name for node in tree.body if isinstance(node, ast.Import) for each in node.names]
    assert next(name for name in names if name != "argparse") == "megamult"
    first = next(node for node in tree.body if isinstance(node, ast.ImportFrom))
    assert first.lineno > next(
        node.lineno for node in tree.body if isinstance(node, ast.Import) and node.names[0].name == "megamult"
    )


@pytest.mark.parametrize(
    ("script", "stage", "flags"),
    [
        ("fold_huggingface.py", (), ()),
        ("fold_huggingface.py", ("--stage", "3"), ()),
        ("fold_megatron.py", (), ("--tensor", "2")),
    ],
    ids=["hf", "hf, zero.Init", "megatron"],
)
def test_a_folded_model_of_someone_else_learns_the_same_on_one_process_and_two(
    script: str, stage: tuple[str, ...], flags: tuple[str, ...]
) -> None:
    path = str(EXAMPLES / script)
    alone, pair = (
        _folded(said) for said in (_screen(path, *stage), _screen(path, *stage, *flags, ranks=2, OMP_NUM_THREADS="1"))
    )
    losses = [loss for loss, _, _ in alone]
    # One batch of 256 tokens over and over, from ln(1000) = 6.91, where weights of 0.02 leave it: ten steps must show.
    assert len(losses) == 10 and 6.85 < losses[0] < 6.97 and losses[-1] < losses[0] - 2.0
    assert alone[-1][1] < 0.97 and alone[-1][2] > 1.03, "the multipliers must spread"
    # Printed to four decimals: fp32 sums in another order, amplified by ten steps of Muon, may tip the last two.
    for one, two in zip(alone, pair, strict=True):
        assert one == pytest.approx(two, abs=2e-3)


def _folded(said: str) -> list[tuple[float, ...]]:
    """(loss, smallest and largest multiplier) of each step."""
    lines = re.findall(r"step \d+: loss ([\d.]+), multipliers ([\d.]+) to ([\d.]+)", said)
    return [tuple(map(float, line)) for line in lines]


def test_the_benchmark_of_falcon_h1_compares_what_it_says() -> None:
    sizes = ("--batch", "2", "--seq", "32", "--hidden", "96", "--layers", "1", "--heads", "4", "--repeat", "1")
    said = _run(str(EXAMPLES / "benchmarks" / "falcon_h1.py"), *sizes, "--state", "16", "--chunk", "16")
    times = {name: float(seconds) for name, seconds in re.findall(r"(?:mixer|step), (\w+): ([\d.]+) s", said)}
    assert set(times) == {"megamult", "transformers", "falcon_h1", "llama"}
    faster, longer = (float(value) for value in re.findall(r"([\d.]+) times as", said))
    # Times are shown to a millisecond, of some tens of them.
    assert faster == pytest.approx(times["transformers"] / times["megamult"], rel=0.3)
    assert longer == pytest.approx(times["falcon_h1"] / times["llama"], rel=0.3)
    hybrid, llama = (int(count.replace(",", "")) for count in re.findall(r"([\d,]+) parameters", said))
    assert llama == pytest.approx(hybrid, rel=1e-3), "an MLP is as wide as it takes, to a column"
    memory = [float(value) for value in re.findall(r"([\d.]+) MB kept", said)]
    assert len(memory) == 2 and min(memory) > 0


def test_layer_overhead_prints_ratios_of_the_medians_and_what_folding_keeps() -> None:
    sizes = ("--hidden", "64", "--ffn", "128", "--layers", "1", "--seq", "16", "--batch", "2", "--steps", "3")
    said = _run(str(EXAMPLES / "benchmarks" / "layer_overhead.py"), *sizes, "--dtype", "fp32")
    rows = re.findall(r"^(none|layer|folded) +([\d,.]+)", said, re.M)
    rate = {name: float(value.replace(",", "")) for name, value in rows}
    ratios = dict(re.findall(r"ratio (\w+) / none: ([\d.]+)", said))
    assert set(rate) == {"none", "layer", "folded"} and set(ratios) == {"layer", "folded"}
    rows = [found for line in said.splitlines() if (found := gpu._overhead(line))]  # as gpu.sh reads it
    assert len(rows) == 6 and ("speed with layer multipliers over none", ratios["layer"]) in rows
    for name, ratio in ratios.items():
        # The table shows one decimal of some hundreds or thousands of tokens per second, the ratio four.
        assert abs(rate[name] / rate["none"] - float(ratio)) < 1e-3
    ((per_element, added, elements, vectors, count),) = re.findall(
        r"folded adds: ([\d.]+) bytes per matrix element \(([\d,]+) bytes, ([\d,]+) elements\), and vectors: "
        r"[\d.]+ \(([\d,]+) bytes, ([\d,]+) multipliers\)",
        said,
    )
    number = {key: int(v.replace(",", "")) for key, v in zip("aevc", (added, elements, vectors, count), strict=True)}
    # Embedding (4096 x 64), q, k, v, out (64 x 64), gate, up, down (128 x 64): W in fp32 and nothing else of that size.
    assert number["e"] == 4096 * 64 + 4 * 64 * 64 + 3 * 128 * 64
    assert number["a"] == 4 * number["e"] and float(per_element) == 4.0
    assert number["c"] == (4096 + 64) + 4 * (64 + 64) + 3 * (128 + 64)
    # Values, gradient, two moments, and AdamW's step counter, all in fp32.
    assert number["v"] == 4 * (4 * number["c"] + 1)


def test_muon_plan_prints_a_balanced_plan() -> None:
    said = _run(str(EXAMPLES / "benchmarks" / "muon_plan.py"), "--data", "8", "--stages", "1")
    rows = [line.split() for line in said.splitlines() if line.startswith(("8B", "70B"))]
    assert [(row[0], row[2]) for row in rows] == [("8B", "64"), ("70B", "64")]
    assert all(1.0 <= float(row[5]) <= float(row[4]) < 1.05 for row in rows)


def test_muon_step_counts_what_newton_schulz_costs() -> None:
    sizes = ("--hidden", "128", "--ffn", "192", "--layers", "2", "--steps", "2", "--ns_form", "standard")
    starts_processes()
    # Compiling DeepSpeed's Newton-Schulz would take most of a minute, and is not what this shows. torch reads the
    # variable at its import, so this needs an interpreter of its own.
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, EXAMPLES / "benchmarks" / "muon_step.py", *sizes]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True).stdout
    rows = {line[:20].strip(): line[20:].split() for line in said.splitlines() if "Muon" in line or "DeepSpeed" in line}
    ours = next(line.split() for line in said.splitlines() if line.startswith("megamult"))
    figures = dict(found for line in said.splitlines() if (found := gpu._muon_step(line)))  # as gpu.sh reads it
    assert len(figures) == 4 and f"{ours[1]} ms; ours over it 1.000" in figures.values()
    # Two layers of q, k, v, out (128 x 128) and gate, up, down (128 x 192): a multiply-add counts 2, five steps.
    dense = 2 * 5 * (4 * 3 * 2 * 128**3 + 3 * (4 * 128**2 * 192 + 2 * 128**3)) / 1e9
    assert 0.75 * dense < float(ours[5]) < dense, "symmetric products must save something"
    assert float(rows["torch.optim.Muon"][4]) > 0
    found = re.search(r"sequences of (\d+), .* ([\d.]+) s each, ([\d.]+) s for .*: ([\d.]+) % \(megamult\)", said)
    assert found is not None, said
    tokens, one, passes, share = map(float, found.groups())
    # One process has all of half a million tokens. Printed to 0.1 ms of some, and the step to 0.1 ms of some ten.
    assert passes == pytest.approx(one * 524288 / tokens, rel=0.05)
    step = float(ours[1]) / 1e3
    assert share == pytest.approx(100 * step / (step + passes), rel=0.05)


def test_step_launches_counts_few_kernels_for_a_band_and_for_all_norms() -> None:
    """A gradient's band takes one kernel, one product for its columns and one sum; its weight a copy and one kernel."""
    said = _run(str(EXAMPLES / "benchmarks" / "step_launches.py"), "--data", "8")
    rows = re.findall(r"(8B|70B) +(\d+) +(\d+) +(gradient norms|chain rule|effective weights)[a-z, ]* +(\d+)", said)
    assert len(rows) == 6
    for _, slices, bands, work, calls in rows:
        # Beside what each band or tensor takes, a dozen for all together: gathers, sums, the multipliers and 1.
        most = {
            "gradient norms": 0,
            "chain rule": 3 * int(bands),
            "effective weights": int(bands) + int(slices),
        }[work] + 12
        assert 0 < int(calls) <= most, (work, calls)


def test_muon_and_adam_s_steps_do_not_grow_with_the_width_under_mup() -> None:
    """Of the activations that the blocks and the head write: without muP, AdamW's steps grow with the width."""
    for optimizer in ("adamw", "muon"):
        said = _run(
            str(EXAMPLES / "experiments" / "coord_check.py"), "--widths", "64", "128", "256", "--optimizer", optimizer
        )
        rows = [row for row in said.splitlines() if row.startswith(("standard", "muP"))]
        slopes = {(row[:12].strip(), row[12:32].strip()): float(row.split()[-1]) for row in rows}
        assert len(slopes) == 8
        for name in ("attention output", "MLP output", "logits"):
            # The part of the change that comes from initial weights falls as width^-0.5, and the rest stays.
            assert -0.5 < slopes["muP", name] < 0.2, (optimizer, slopes)
        if optimizer == "adamw":
            assert slopes["standard", "logits"] > 0.6 and slopes["standard", "MLP output"] > 0.6, slopes
