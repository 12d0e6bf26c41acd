"""A run that leaves out ranges of samples sees exactly the others, wherever it is restarted."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from megamult.data.dataset import BlendedDataset
from tests.data.conftest import SEQ, StubTokenizer, window
from tests.data.conftest import write_indexed as write_indexed  # a fixture
from tests.processes import run_distributed
from tests.train.skip_workers import BATCH, STEPS, Windows, runs

SKIP = [[160, 319], [345, 350]]
"""From step 11 on, the first after ten batches of 16; and a few samples in the middle of a batch."""
STARTS = [
    ("", 0, SKIP),
    ("0", 10, SKIP),  # inside the first range: it is reached, and sample 320 not read
    ("0", 12, SKIP),  # inside the second: after samples 320 to 344 and 351 to 357
    ("0", 11, SKIP),
    ("0", 15, SKIP),  # after both
    ("", 0, []),
    ("5", 10, SKIP),  # ranges that are new, the first from the next sample on
    ("5", 11, SKIP),  # begins before what has been read
    ("0", 11, []),
    ("0", 10, []),  # not passed yet: may be given up
]


def said_runs(prefix: str, folder: Path) -> tuple[list[Windows | str], str]:
    """What the starts saw, and the lines about what is left out."""
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        found = runs(prefix, folder, STARTS)
    return found, "\n".join(line for line in stream.getvalue().splitlines() if "left out" in line)


@pytest.fixture
def outcome(write_indexed: Callable[..., str], tmp_path: Path) -> tuple[list[Windows | str], str, list[list[int]]]:
    """What the starts saw, what they said, and all samples of the order by position."""
    documents = [list(range(start, start + 50)) for start in range(0, 6000, 50)]
    prefix = write_indexed("a", documents)
    found, said = run_distributed(1, said_runs, prefix, tmp_path)[0]
    plain = BlendedDataset([(prefix, 1.0)], StubTokenizer(), SEQ, 1234, tmp_path / "plain")
    count = STEPS * BATCH + 200
    assert plain.samples_per_epoch[0] > count, "no sample comes twice"
    return found, said, [window(plain[i])[:-1] for i in range(count)]


def test_restarts_inside_and_after_a_range_see_exactly_the_other_samples(
    outcome: tuple[list[Windows | str], str, list[list[int]]],
) -> None:
    found, said, order = outcome
    kept = [window for i, window in enumerate(order) if not any(first <= i <= last for first, last in SKIP)]
    kept, plain = kept[: STEPS * BATCH], order[: STEPS * BATCH]
    assert found[0] == kept
    for number in (1, 2, 3, 4):
        assert found[number] == kept[STARTS[number][1] * BATCH :], STARTS[number]
    assert found[5] == plain
    assert found[6] == kept[10 * BATCH :]
    assert isinstance(found[7], str) and "has the samples 160 to 175, on which the run has trained" in found[7]
    assert "(a range that is new may begin with sample 176): set them back, or load another checkpoint" in found[7]
    assert isinstance(found[8], str) and "data.skip lacks the samples 160 to 319, which the run has left" in found[8]
    assert found[9] == plain[10 * BATCH :]
    # One line for each range and start that passes it.
    first, second = "step 11: samples 160 to 319 are left out", "step 12: samples 345 to 350 are left out"
    assert said.count(first) == 3 and said.count(second) == 4
    assert said.count("left out") == 7
