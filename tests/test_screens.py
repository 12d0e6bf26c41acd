"""docs/screen.md shows whole screens, and a line that it does not show is found."""

from __future__ import annotations

import re

import pytest

from tests.processes import REPOSITORY
from tests.screens import kind, unknown_lines

STEP = "2026-11-27 10:09:29 step 7/100: loss 4.9885, lr 0.0028, gradient norm 0.87, 2,294 tokens/s, 1 min 21 s left"


@pytest.mark.parametrize(
    "line",
    [
        STEP,
        STEP.replace("lr 0.0028", "lr 1e-05").replace(", 1 min 21 s left", ""),
        "down/scalar               0.9 1.0 1.1 0.1 12",
        "here           gpu07, 8 x NVIDIA H100 80GB HBM3",
        "saved elsewhere/checkpoints/step_9 in 12.5 s (training stopped for 0.00 s)",
    ],
)
def test_numbers_and_names_do_not_matter(line: str) -> None:
    assert unknown_lines(line) == []


@pytest.mark.parametrize(
    "line",
    [
        "optimizer.py:24: UserWarning: Transformer Engine and Apex are not installed. Falling back to Torch.",
        "  warnings.warn(",
        "DeepSpeed deepspeed.ops.comm.deepspeed_shm_comm_op built successfully",
        "[2026-11-27 09:13:24,092] [WARNING] [engine.py:2304:_do_optimizer_sanity_check] **** You are using ZeRO",
        "warning: metrics.jsonl cannot be written",
        STEP.replace("gradient norm", "grad norm"),
    ],
)
def test_another_line_is_found(line: str) -> None:
    assert unknown_lines(f"{STEP}\n{line}") == [line]


def test_both_screens_are_there_with_few_lines_before_the_first_step() -> None:
    page = (REPOSITORY / "docs" / "screen.md").read_text(encoding="utf-8")
    screens = [
        block.splitlines() for block in re.findall(r"```text\n(.*?)```", page, re.S) if block.startswith("model")
    ]
    assert len(screens) == 2
    for lines in screens:
        first = next(number for number, line in enumerate(lines) if kind(line) == kind(STEP))
        assert len([line for line in lines[:first] if not line.startswith("warning: ")]) <= 15
    assert "data parallel 1" in screens[0][3] and "2 processes" in screens[1][3]
