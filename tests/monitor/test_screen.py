"""Texts of the screen."""

from __future__ import annotations

import pytest

from megamult.monitor import screen


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (2_016_320, "2.02 MB"), (80e9, "80 GB"), (1.5e12, "1.5 TB")],
)
def test_sizes_have_three_digits_and_a_decimal_unit(number: float, text: str) -> None:
    assert screen.size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.6, "1 min 0 s"),
        (725, "12 min 5 s"),
        (3600 * 3 + 60 * 20 + 59, "3 h 20 min"),
        (86400 * 2 + 3600 * 4, "2 d 4 h"),
    ],
)
def test_times_have_their_two_largest_units(seconds: float, text: str) -> None:
    assert screen.duration(seconds) == text


def test_many_sources_take_few_lines_and_none_is_lost() -> None:
    read = [(f"s{number}", 100 * number, 0.25 * number) for number in range(1, 8)]
    assert len(screen.sources(read, 7)) == 7
    lines = screen.sources(read, 3)
    assert lines == [
        "s1: 100 tokens, 0.25 epochs",
        "s2: 200 tokens, 0.5 epochs",
        "5 more sources: 2,500 tokens, at most 1.75 epochs",
    ]


def test_the_line_of_a_step_has_time_rate_norm_speed_and_time_left() -> None:
    record = {"step": 7.0, "loss": 3.25, "lr": 4e-3, "grad_norm": 0.5, "tokens_per_second": 12345.6}
    assert screen.step_line(record, 100, "12:34:56", 725, 0.4567) == (
        "12:34:56 step 7/100: loss 3.2500, lr 0.004, gradient norm 0.5, 12,346 tokens/s, MFU 45.7 %, 12 min 5 s left"
    )
    assert screen.step_line(record, 100, "12:34:56", None, None).endswith("gradient norm 0.5, 12,346 tokens/s")
