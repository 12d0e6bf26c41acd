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
from megamult.optim.muon.kept import Kept, device_name
from megamult.optim.muon.newton_schulz import Method, fixed_method
from megamult.optim.muon.timing import Chosen, choose, fastest, methods
from tests.optim.muon.workers import chosen_methods
from tests.processes import run_distributed

STEPS = coefficients("simple", 5)
CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
SLOW, FAST = Method("standard", "whole", True, FP32), Method("gram", "block_rows", False, FP32)


class Device:
    """A clock that only Newton-Schulz moves: by `cost[method]` seconds per matrix, and by 2 more at the first call."""

    def __init__(self, cost: dict[Method, float], patch: pytest.MonkeyPatch) -> None:
        self.now, self.cost, self.calls, self.no_room = 0.0, cost, list[Method](), set[Method]()
        patch.setattr(timing, "orthogonalize_by", self.compute)

    def compute(self, matrices: Tensor, steps: Coefficients, method: Method) -> Tensor:
        if method in self.no_room:
            raise torch.OutOfMemoryError
        self.now += len(matrices) * self.cost.get(method, 3e-4) + (2 if method not in self.calls else 0)
        self.calls.append(method)
        return matrices

    def clock(self) -> float:
        return self.now


def test_the_fastest_method_is_found_although_first_calls_compile_for_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    device, candidates = Device({FAST: 1e-4, SLOW: 1.1e-4}, monkeypatch), methods((40, 30), [FP32], False)
    assert fastest((40, 30), STEPS, candidates, CPU, device.clock) == Chosen(FAST, pytest.approx(1e-4))
    assert set(device.calls) == set(candidates), "each method had its chance"
    hopeless = Method("gram", "whole", True, FP32)
    assert device.calls.count(hopeless) == 2 < device.calls.count(SLOW)


def test_a_large_matrix_is_timed_once_by_each_method(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = methods((2048, 2048), [BF16, FP32], False)
    device = Device(dict.fromkeys(candidates, 1.0), monkeypatch)
    fastest((2048, 2048), STEPS, candidates, CPU, device.clock)
    assert len(candidates) == 8, "two forms, two ways, two dtypes; one by one is together"
    assert [device.calls.count(each) for each in candidates] == [3] * 8, "a round after the first timing"


def test_a_method_without_room_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    device, candidates = Device({FAST: 1e-4, SLOW: 1.1e-4}, monkeypatch), methods((40, 30), [FP32], False)
    device.no_room = {FAST}
    assert fastest((40, 30), STEPS, candidates, CPU, device.clock).method == SLOW
    device.no_room = set(candidates)
    with pytest.raises(torch.OutOfMemoryError, match=r"one matrix of the shape \(40, 30\)"):
        fastest((40, 30), STEPS, candidates, CPU, device.clock)


@pytest.mark.parametrize(("times", "dtype"), [(1.2, BF16), (1.4, FP32)])
def test_another_precision_must_be_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, times: float, dtype: torch.dtype
) -> None:
    candidates = methods((40, 30), [BF16, FP32], False)
    device = Device({each: 1e-3 if each.dtype == FP32 else times * 1e-3 for each in candidates}, monkeypatch)
    assert fastest((40, 30), STEPS, candidates, CPU, device.clock).method.dtype == dtype


def test_the_kernel_is_timed_where_all_ranks_have_it_and_it_suits() -> None:
    assert sum(each.products == "kernel" for each in methods((512, 1408), [BF16, FP32], True)) == 2, "bf16 only"
    assert not any(each.products == "kernel" for each in methods((512, 1408), [BF16], False))
    assert not any(each.products == "kernel" for each in methods((512, 1400), [BF16], True))


def test_timing_leaves_the_runs_random_numbers_alone() -> None:
    before, candidates = torch.get_rng_state(), methods((8, 12), [FP32], False)
    chosen = fastest((8, 12), STEPS, candidates, CPU)
    assert chosen.method in candidates and chosen.seconds is not None and chosen.seconds > 0
    assert torch.equal(torch.get_rng_state(), before)


class Timer:
    """Stands in for `fastest`: always the same answer, and a list of what was asked."""

    def __init__(self, answer: Method) -> None:
        self.answer, self.asked = answer, list[Any]()

    def __call__(self, shape: Any, steps: Any, candidates: Any, device: Any) -> Chosen:
        self.asked.append(shape)
        return Chosen(self.answer, 0.25)


def test_a_choice_is_kept_for_later_runs_and_for_the_transposed_shape(tmp_path: Path) -> None:
    first, second = Timer(FAST), Timer(SLOW)
    found = choose([(3, 5), (5, 3), (4, 4)], STEPS, [FP32], CPU, folder=tmp_path, time_one=first)
    assert found == dict.fromkeys([(3, 5), (5, 3), (4, 4)], Chosen(FAST, 0.25)) and len(first.asked) == 2
    again = choose([(5, 3), (4, 4), (6, 6)], STEPS, [FP32], CPU, folder=tmp_path, time_one=second)
    assert again[5, 3].method == again[4, 4].method == FAST and again[6, 6].method == SLOW
    assert second.asked == [(6, 6)]


def test_what_the_fastest_method_depends_on_is_timed_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer(SLOW)
    choose([(3, 5)], STEPS, [FP32], CPU, folder=tmp_path, time_one=timer)
    choose([(3, 5)], STEPS, [BF16, FP32], CPU, folder=tmp_path, time_one=timer)
    choose([(3, 5)], coefficients("simple", 4), [FP32], CPU, folder=tmp_path, time_one=timer)
    choose([(3, 5)], STEPS, [FP32], CPU, kernel=True, folder=tmp_path, time_one=timer)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    choose([(3, 5)], STEPS, [FP32], CPU, folder=tmp_path, time_one=timer)
    assert len(timer.asked) == 5
    choose([(3, 5)], STEPS, [FP32], CPU, folder=tmp_path, time_one=timer)
    assert len(timer.asked) == 5


def test_a_run_goes_on_with_the_choices_of_its_checkpoint(tmp_path: Path) -> None:
    began = choose([(3, 5)], STEPS, [FP32], CPU, folder=tmp_path / "one", time_one=Timer(FAST))
    saved = json.loads(json.dumps(timing.plain(began, STEPS, [FP32])))
    timer = Timer(SLOW)
    went_on = choose([(5, 3), (6, 6)], STEPS, [FP32], CPU, known=saved, folder=tmp_path / "two", time_one=timer)
    assert went_on == {(5, 3): Chosen(FAST, 0.25), (6, 6): Chosen(SLOW, 0.25)} and timer.asked == [(6, 6)]
    impossible = {key: entry | {"products": "kernel"} for key, entry in saved.items()}
    found = choose([(3, 5)], STEPS, [FP32], CPU, known=impossible, folder=tmp_path / "two", time_one=timer)
    assert found[3, 5].method == SLOW, "of a machine with the kernel"


def test_shapes_that_would_take_minutes_are_not_timed_on_a_cpu(tmp_path: Path) -> None:
    timer = Timer(FAST)
    found = choose([(4096, 4096), (3, 5)], STEPS, [BF16], CPU, folder=tmp_path, time_one=timer)
    assert timer.asked == [(3, 5)] and found[4096, 4096] == Chosen(fixed_method(4096, 4096, 5, BF16), None)
    saved = timing.plain(found, STEPS, [BF16])
    assert choose([(4096, 4096)], STEPS, [BF16], CPU, known=saved, folder=tmp_path)[4096, 4096].seconds is None


@pytest.mark.parametrize("damage", ["text", "list", "no method"])
def test_a_file_that_says_nothing_usable_is_made_anew(tmp_path: Path, damage: str) -> None:
    path = Kept(CPU, tmp_path).path
    choose([(3, 5)], STEPS, [FP32], CPU, folder=tmp_path, time_one=Timer(FAST))
    content = json.loads(path.read_text())
    (entry,) = content["methods"].values()
    entry["shape"] = "round"
    path.write_text({"text": "{", "list": "[]"}.get(damage, json.dumps(content)))
    timer = Timer(SLOW)
    found = choose([(3, 5)], STEPS, [FP32], CPU, folder=tmp_path, time_one=timer)
    assert found[3, 5].method == SLOW and timer.asked
    assert choose([(3, 5)], STEPS, [FP32], CPU, folder=tmp_path, time_one=Timer(FAST))[3, 5].method == SLOW


def test_a_run_that_was_slower_takes_the_choice_of_the_one_that_was_faster(tmp_path: Path) -> None:
    class Overtaken(Timer):
        def __call__(self, shape: Any, steps: Any, candidates: Any, device: Any) -> Chosen:
            choose([shape], STEPS, [FP32], CPU, folder=tmp_path, time_one=Timer(FAST))  # another run, meanwhile
            return super().__call__(shape, steps, candidates, device)

    assert choose([(3, 5)], STEPS, [FP32], CPU, folder=tmp_path, time_one=Overtaken(SLOW))[3, 5].method == FAST


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    timer = Timer(FAST)
    found = choose([(3, 5)], STEPS, [FP32], CPU, folder=tmp_path / "file" / "folder", time_one=timer)
    assert found[3, 5].method == FAST and len(timer.asked) == 1
    assert "so that the next run may choose otherwise: set MEGAMULT_CACHE_DIR" in capsys.readouterr().err


def test_a_file_system_without_locks_still_keeps_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    choose([(3, 5)], STEPS, [FP32], CPU, folder=tmp_path, time_one=Timer(FAST))
    assert choose([(3, 5)], STEPS, [FP32], CPU, folder=tmp_path, time_one=Timer(SLOW))[3, 5].method == FAST


def test_all_ranks_use_the_choice_of_rank_0(tmp_path: Path) -> None:
    """Each rank has a file of its own, and they contradict each other."""
    ranks = run_distributed(2, chosen_methods, tmp_path, "auto")
    assert ranks[0] == ranks[1] == {(8, 6): ("gram", "block_rows"), (4, 6): ("gram", "block_rows")}


def test_an_error_on_rank_0_is_an_error_on_all(tmp_path: Path) -> None:
    ranks = run_distributed(2, chosen_methods, tmp_path, "broken")
    assert ranks[0] == ranks[1] == "rank 0 could not time Newton-Schulz (RuntimeError: no clock): set optimizer.muo"


def test_a_fixed_form_times_nothing(tmp_path: Path) -> None:
    ranks = run_distributed(2, chosen_methods, tmp_path, "standard")
    assert ranks[0] == ranks[1] == {(8, 6): ("standard", "block_rows"), (4, 6): ("standard", "block_rows")}


def test_the_command_prints_and_removes_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGAMULT_CACHE_DIR", str(tmp_path))
    timing.main([])
    assert capsys.readouterr().out == f"{tmp_path} keeps no choice yet\n"
    choose([(3, 5)], STEPS, [FP32], CPU, time_one=Timer(FAST))
    timing.main([])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(device_name(CPU)) and torch.__version__ in said[0]
    assert said[1].startswith("  3x5, 5 steps, float32; ")
    assert said[1].endswith(": gram, block rows, one by one, float32, 250.000 ms")
    timing.main(["--clear"])
    assert list(tmp_path.glob("*.json")) == []
