"""One rank of each node reads a share of a run's corpora at its start; all ranks know what it has found."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.processes import run_distributed
from tests.train.corpora_workers import opened


def copy(corpus: Path, folder: Path) -> Path:
    """Folder with a copy of the corpus."""
    folder.mkdir()
    for file in corpus.parent.glob(f"{corpus.name}*"):
        shutil.copy2(file, folder)  # the times of the files too, as rsync copies them
    return folder


@pytest.mark.parametrize("nodes", [1, 2])
def test_each_corpus_is_read_once_and_all_ranks_know_it(corpus: Path, nodes: int) -> None:
    first, second = run_distributed(2, opened, corpus.name, [corpus.parent] * 2, nodes)
    assert first[:3] == second[:3] == (None, "", first[2])
    assert first[2] is not None and first[2][0] > 100
    train, valid = f"{corpus.name}_train", f"{corpus.name}_valid"
    assert (first[3], second[3]) == (([train, valid], []) if nodes == 1 else ([train], [valid]))


def test_copies_on_another_node_are_read_there_and_others_are_named(corpus: Path, tmp_path: Path) -> None:
    here = [corpus.parent, copy(corpus, tmp_path / "copy")]
    first, second = run_distributed(2, opened, corpus.name, here, 2)
    assert first[:3] == second[:3] == (None, "", first[2])
    train, valid = f"{corpus.name}_train", f"{corpus.name}_valid"
    assert (first[3], second[3]) == ([train, valid], [valid, train])

    for suffix in (".bin", ".idx", ".stamp.json"):
        shutil.copy(here[1] / f"{valid}{suffix}", here[1] / f"{train}{suffix}")
    (code, said, *_), (other_code, other_said, *_) = run_distributed(2, opened, corpus.name, here, 2)
    assert (code, other_code, other_said) == (2, 2, "")
    where = re.escape(f"{train} (1 data sources differ)")
    assert re.fullmatch(rf"error: (\S+) has other files than \1 under {where}: put the data on .*\n", said)


def test_mistakes_that_several_nodes_find_come_in_one_message(corpus: Path, tmp_path: Path) -> None:
    folder = copy(corpus, tmp_path / "copy")
    for name in ("train", "valid"):
        with open(folder / f"{corpus.name}_{name}.bin", "r+b") as stream:
            stream.truncate(stream.seek(0, 2) - 2)
    (code, said, *_), _ = run_distributed(2, opened, corpus.name, [folder] * 2, 2)
    assert code == 2
    assert all(f"{corpus.name}_{name}.bin has " in said for name in ("train", "valid"))


def test_a_corpus_without_a_stamp_is_taken_with_a_line_that_says_so(corpus: Path, tmp_path: Path) -> None:
    folder = copy(corpus, tmp_path / "copy")
    (folder / f"{corpus.name}_valid.stamp.json").unlink()
    (code, said, samples, _), _ = run_distributed(2, opened, corpus.name, [folder] * 2, 1)
    assert (code, samples is None) == (None, False)
    name = f"{corpus.name}_valid"
    assert said.startswith(f"note: 1 of 2 data sources have no stamp of launch/prepare_data.py ({name}): ")
    assert said.count("\n") == 1
