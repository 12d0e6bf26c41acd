"""Files that inputs name: folders and patterns in sorted order, and every mistake in one report."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megamult.data.defects import Kind, Report
from megamult.data.inputs import expand


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files d/{b/10.txt, b/2.txt, a.jsonl, c.jsonl, .hidden}, and the current folder above d."""
    monkeypatch.chdir(tmp_path)
    for name in ("d/b/10.txt", "d/b/2.txt", "d/c.jsonl", "d/a.jsonl", "d/.hidden", "d/.git/config", "x[1].txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("text")
    return tmp_path


def expanded(*inputs: str, outputs: tuple[str, ...] = ()) -> list[str]:
    report = Report()
    files = expand(inputs, map(Path, outputs), report)
    report.refuse()
    return files


def test_folders_are_walked_in_sorted_order_without_hidden_files(tree: Path) -> None:
    os.symlink("..", tree / "d" / "z")  # a link that leads back
    assert expanded("d") == ["d/a.jsonl", "d/b/10.txt", "d/b/2.txt", "d/c.jsonl", "d/z/x[1].txt"]
    os.symlink("d/b", tree / "e")
    assert expanded("e", "d/c.jsonl") == ["e/10.txt", "e/2.txt", "d/c.jsonl"]


def test_patterns_match_files_and_folders_in_sorted_order(tree: Path) -> None:
    assert expanded("d/*.jsonl") == ["d/a.jsonl", "d/c.jsonl"]
    assert expanded("d/*") == expanded("d/**") == ["d/a.jsonl", "d/b/10.txt", "d/b/2.txt", "d/c.jsonl"]
    assert expanded("d/**/*.txt") == expanded("**/b") == ["d/b/10.txt", "d/b/2.txt"]
    assert expanded("x[1].txt") == ["x[1].txt"]  # a file's own name is no pattern


def test_earlier_outputs_in_the_folder_are_not_read(tree: Path) -> None:
    for inputs in (["d"], ["d/*.jsonl", "d/b"]):
        assert expanded(*inputs, outputs=("d/a.jsonl", "d/new.bin")) == [
            file for file in expanded(*inputs) if file != "d/a.jsonl"
        ]


def test_an_output_that_is_a_folder_is_not_read(tree: Path) -> None:
    assert expanded("d", outputs=("d/b", "d/a")) == ["d/a.jsonl", "d/c.jsonl"]


def test_all_inputs_that_cannot_be_read_are_in_one_report(tree: Path) -> None:
    (tree / "empty").mkdir()
    os.symlink("nowhere", tree / "empty" / "broken")
    os.mkfifo(tree / "pipe")
    (tree / "hollow").mkdir()
    report = Report()
    assert expand(["no", "d/*.gz", "empty", "hollow", "pipe", "d/a.jsonl", "d"], [], report) == [
        "d/a.jsonl",
        "d/b/10.txt",
        "d/b/2.txt",
        "d/c.jsonl",
    ]
    assert report.count(Kind.MISSING) == 6
    with pytest.raises(ValueError, match="6 inputs cannot be opened") as caught:
        report.refuse(skip_defects=True)
    for part in (
        "(no: does not exist: give the path",
        "; d/*.gz: matches no file: correct the pattern, and quote it",
        "; empty/broken: does not exist",
        "; hollow: is a folder without files to read",
        "; pipe: is not a regular file",
        "; ...)",  # the sixth is counted, not shown
    ):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match=r"d/a\.jsonl: is named twice, by d/\*\.jsonl and by d: remove one"):
        expanded("d/*.jsonl", "d")
