"""The choice of Newton-Schulz's method: the fastest by a clock, the same for all ranks and all later runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megamult.optim.muon import timing
from megamult.optim.muon.coefficients import Coefficients, coefficients
from megamult.optim.muon.newton_schulz import Method
from megamult.optim.muon.timing import Chosen, Kept, choose, fastest, methods
from tests.optim.muon.workers import chosen_methods
from tests.processes import run_distributed

STEPS = coefficients("simple", 5)
CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
SLOW, FAST = Method("standard", "whole", True, FP32), Method("gram", "block_rows", False, FP32)


class Device:
    """A clock that only Newton-Schulz moves: by `cost[method]` seconds per matrix, and tenfold at the first call."""

    def __init__(self, cost: dict[Method, float], patch: pytest.MonkeyPatch) -> None:
        self.now, self.cost, self.calls = 0.0, cost, list[Method]()
        patch.setattr(timing, "orthogonalize_by", self.compute)

    def compute(self, matrices: Tensor, steps: Coefficients, method: Method) -> Tensor:
        first = method not in self.calls
        self.calls.append(method)
        self.now += len(matrices) * self.cost.get(method, 3e-4) * (10 if first else 1)
        return matrices

    def clock(self) -> float:
        return self.now


def test_the_fastest_method_is_found_whatever_its_first_call_prepares(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device({FAST: 1e-4, SLOW: 1.1e-4}, monkeypatch)
    assert fastest((40, 30), STEPS, [FP32], CPU, device.clock) == Chosen(FAST, pytest.approx(1e-4))
    assert set(device.calls) == set(methods((40, 30), [FP32], CPU)), "each method had its chance"
    hopeless = Method("gram", "whole", True, FP32)
    assert device.calls.count(hopeless) == 2 < device.calls.count(SLOW)


def test_a_large_matrix_takes_one_timing_of_each_method(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device({}, monkeypatch)
    device.cost = dict.fromkeys(methods((2048, 2048), [BF16, FP32], CPU), 1.0)
    fastest((2048, 2048), STEPS, [BF16, FP32], CPU, device.clock)
    assert len(device.calls) == len(set(device.calls)) == 8, "two forms, two ways, two dtypes; one by one is together"


def test_timing_leaves_the_runs_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    chosen = fastest((8, 12), STEPS, [FP32], CPU)
    assert chosen.method in methods((8, 12), [FP32], CPU) and chosen.seconds > 0
    assert torch.equal(torch.get_rng_state(), before)


class Timer:
    """Stands in for `fastest`: always the same answer, and a list of what was asked."""

    def __init__(self, answer: Method) -> None:
        self.answer, self.asked = answer, list[Any]()

    def __call__(self, shape: Any, steps: Any, dtypes: Any, device: Any) -> Chosen:
        self.asked.append(shape)
        return Chosen(self.answer, 0.25)


def test_a_choice_is_kept_for_later_runs_and_for_the_transposed_shape(tmp_path: Path) -> None:
    first, second = Timer(FAST), Timer(SLOW)
    found = choose([(3, 5), (5, 3), (4, 4)], STEPS, [FP32], CPU, Kept(CPU, tmp_path), first)
    assert found == dict.fromkeys([(3, 5), (5, 3), (4, 4)], Chosen(FAST, 0.25)) and len(first.asked) == 2
    again = choose([(5, 3), (4, 4), (6, 6)], STEPS, [FP32], CPU, Kept(CPU, tmp_path), second)
    assert again[5, 3].method == again[4, 4].method == FAST and again[6, 6].method == SLOW
    assert second.asked == [(6, 6)]
    other = Timer(Method("standard", "whole", True, BF16))
    choose([(3, 5)], STEPS, [BF16, FP32], CPU, Kept(CPU, tmp_path), other)
    choose([(3, 5)], coefficients("simple", 4), [FP32], CPU, Kept(CPU, tmp_path), first)
    assert other.asked == [(3, 5)] and first.asked[-1] == (3, 5), "other dtypes, or another number of steps"


@pytest.mark.parametrize("damage", ["text", "list", "no method", "a method that this device lacks"])
def test_a_file_that_says_nothing_usable_is_made_anew(tmp_path: Path, damage: str) -> None:
    kept = Kept(CPU, tmp_path)
    choose([(3, 5)], STEPS, [FP32], CPU, kept, Timer(FAST))
    content = json.loads(kept.path.read_text())
    (entry,) = content["methods"].values()
    if damage == "no method":
        entry["form"] = "cubic"
    if damage == "a method that this device lacks":
        entry["products"] = "kernel"
    kept.path.write_text({"text": "{", "list": "[]"}.get(damage, json.dumps(content)))
    timer = Timer(SLOW)
    assert choose([(3, 5)], STEPS, [FP32], CPU, kept, timer)[3, 5].method == SLOW and timer.asked
    assert choose([(3, 5)], STEPS, [FP32], CPU, kept, Timer(FAST))[3, 5].method == SLOW


def test_a_run_that_was_slower_takes_the_choice_of_the_one_that_was_faster(tmp_path: Path) -> None:
    class Overtaken(Timer):
        def __call__(self, shape: Any, steps: Any, dtypes: Any, device: Any) -> Chosen:
            choose([shape], STEPS, [FP32], CPU, Kept(CPU, tmp_path), Timer(FAST))  # another run, meanwhile
            return super().__call__(shape, steps, dtypes, device)

    assert choose([(3, 5)], STEPS, [FP32], CPU, Kept(CPU, tmp_path), Overtaken(SLOW))[3, 5].method == FAST


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    found = choose([(3, 5)], STEPS, [FP32], CPU, Kept(CPU, tmp_path / "file" / "folder"), Timer(FAST))
    assert found[3, 5].method == FAST
    assert "Newton-Schulz is timed again at the next start" in capsys.readouterr().err


def test_all_ranks_use_the_choice_of_rank_0(tmp_path: Path) -> None:
    """Each rank has a file of its own, and they contradict each other."""
    ranks = run_distributed(2, chosen_methods, tmp_path, "auto")
    assert ranks[0] == ranks[1] == {(8, 6): ("gram", "block_rows"), (4, 6): ("gram", "block_rows")}


def test_a_fixed_form_times_nothing(tmp_path: Path) -> None:
    ranks = run_distributed(2, chosen_methods, tmp_path, "standard")
    assert ranks[0] == ranks[1] == {(8, 6): ("standard", "block_rows"), (4, 6): ("standard", "block_rows")}


def test_the_command_prints_and_removes_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGAMULT_CACHE_DIR", str(tmp_path))
    timing.main([])
    assert capsys.readouterr().out == f"{tmp_path} keeps no choice yet\n"
    choose([(3, 5)], STEPS, [FP32], CPU, None, Timer(FAST))
    timing.main([])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(timing.device_name(CPU)) and torch.__version__ in said[0]
    assert said[1] == "  3x5, 5 steps, float32: gram, block rows, one by one, float32, 250.000 ms"
    timing.main(["--clear"])
    assert list(tmp_path.glob("*.json")) == []
