"""One rank of each node reads a run's corpora at its start; all ranks know what it has found."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.processes import run_distributed
from tests.train.corpora_workers import opened


@pytest.mark.parametrize("nodes", [1, 2])
def test_one_rank_of_each_node_reads_and_all_know(corpus: Path, tmp_path: Path, nodes: int) -> None:
    first, second = run_distributed(2, opened, str(corpus), tmp_path, nodes, False)
    assert first == second == (None, "", first[2])
    assert first[2] is not None and first[2][0] > 100


def test_a_node_with_other_files_is_named(corpus: Path, tmp_path: Path) -> None:
    (code, said, _), (other_code, other_said, _) = run_distributed(2, opened, str(corpus), tmp_path, 2, True)
    assert (code, other_code, other_said) == (2, 2, "")
    where = re.escape(f"{corpus}_train (1 data sources differ)")
    assert re.fullmatch(rf"error: \S+ has other files than rank 0's host under {where}: put the data on .*\n", said)


def test_a_corpus_without_a_stamp_is_taken_with_a_line_that_says_so(corpus: Path, tmp_path: Path) -> None:
    corpus = shutil.copytree(corpus.parent, tmp_path / "copy") / corpus.name
    Path(f"{corpus}_valid.stamp.json").unlink()
    (code, said, samples), _ = run_distributed(2, opened, str(corpus), tmp_path, 1, False)
    assert (code, samples is None) == (None, False)
    assert said.startswith(f"note: 1 of 2 data sources have no stamp of launch/prepare_data.py ({corpus}_valid): ")
    assert said.count("\n") == 1
