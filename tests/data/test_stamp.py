"""A corpus's stamp: what it vouches for, what is found to differ, and what is done without one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megamult.data import indexed
from megamult.data.corpus import prepare_corpus
from megamult.data.described import describe, describe_all, unchecked, validate_all
from megamult.data.identity import contents_digest, order_digest
from megamult.data.indexed import read_index
from megamult.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megamult.data.stamp import Stamp

Write = Callable[..., str]


@pytest.fixture
def prefix(tmp_path: Path, documents: list[str], model: Path) -> str:
    (tmp_path / "c.txt").write_text("\n\n".join(documents), encoding="utf-8")
    prepare_corpus([tmp_path / "c.txt"], tmp_path / "c", tokenizer=model, valid_fraction=0.1)
    return str(tmp_path / "c_train")


def test_the_stamp_says_what_the_files_are(prefix: str, tokenizer: SentencePieceTokenizer) -> None:
    stamp, files = Stamp.read(prefix), read_index(prefix)
    assert stamp is not None
    assert (stamp.tokenizer_sha256, stamp.vocab_size) == (tokenizer.sha256, tokenizer.vocab_size)
    assert (stamp.tokens, stamp.documents, stamp.dtype) == (files.tokens, 55, "uint16")
    assert (stamp.bin_bytes, stamp.idx_bytes) == (files.bin.stat().st_size, files.idx.stat().st_size)
    found = describe(prefix, tokenizer)
    assert found.stamped and unchecked([found], full=False) is None
    assert (found.identity.order, found.identity.contents) == (order_digest(files), contents_digest(files))
    validate_all([prefix], tokenizer, (0, 1))


def test_another_tokenizer_of_the_same_size_is_an_error_that_names_both(
    prefix: str, tokenizer: SentencePieceTokenizer, documents: list[str], tmp_path: Path
) -> None:
    from megamult.data.sentencepiece_tokenizer import train_tokenizer

    train_tokenizer([text.upper() for text in documents], tokenizer.vocab_size, tmp_path / "other.model")
    other = SentencePieceTokenizer(tmp_path / "other.model")
    assert other.vocab_size == tokenizer.vocab_size
    was = f"{prefix}.stamp.json records one with the SHA-256 {tokenizer.sha256[:12]}... and 400 tokens"
    message = f"data source {prefix} was encoded with another tokenizer than {tmp_path / 'other.model'}: {was}"
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        describe(prefix, other)
    assert f"but the given one has the SHA-256 {other.sha256[:12]}... and 400 tokens" in str(caught.value)


def flip(path: str, at: int) -> None:
    content = bytearray(Path(path).read_bytes())
    content[at] ^= 1
    Path(path).write_bytes(content)


def test_files_that_the_stamp_was_not_written_for_are_found_at_the_start(
    prefix: str, tokenizer: SentencePieceTokenizer
) -> None:
    flip(f"{prefix}.bin", 0)
    with pytest.raises(ValueError, match=r"are not those that .*stamp\.json was written for: contents '"):
        describe(prefix, tokenizer)
    flip(f"{prefix}.bin", 0)
    describe(prefix, tokenizer)
    valid = prefix.replace("train", "valid")
    for suffix in (".bin", ".idx"):
        Path(prefix + suffix).write_bytes(Path(valid + suffix).read_bytes())
    with pytest.raises(ValueError, match=r"tokens \d+ where the stamp says \d+; documents 6 where the stamp says 55"):
        describe(prefix, tokenizer)


def test_a_change_between_the_samples_is_found_on_request(
    write_indexed: Write, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "PIECE_BYTES", 1 << 16)  # several pieces, of which each rank has its own
    prefix = write_indexed("long", [[i % 300 for i in range(500)]] * 400)
    Stamp.of(read_index(prefix), tokenizer).write(Path(prefix + ".stamp.json"))
    stamp = Stamp.read(prefix)
    assert stamp is not None and len(stamp.bin_sha256) == 7
    flip(f"{prefix}.bin", 200_000)
    assert describe(prefix, tokenizer).stamped
    wrong = []
    for rank in range(3):
        try:
            validate_all([prefix], tokenizer, (rank, 3))
        except ValueError as error:
            wrong.append((rank, str(error)))
    assert [rank for rank, _ in wrong] == [3 % 3]  # the fourth piece
    assert f"{prefix}.bin has changed since launch/prepare_data.py wrote it" in wrong[0][1]
    flip(f"{prefix}.bin", 200_000)
    flip(f"{prefix}.idx", len(Path(f"{prefix}.idx").read_bytes()) - 20)  # a bound that only older readers use
    with pytest.raises(ValueError, match=r"\.idx has changed since"):
        validate_all([prefix], tokenizer, (0, 1))


def test_without_a_stamp_samples_are_checked_and_that_is_said(
    write_indexed: Write, tokenizer: SentencePieceTokenizer
) -> None:
    good, bad = write_indexed("good", [[1, 2, 3]] * 9), write_indexed("bad", [[1, 2, 3], [4, 60_000]])
    found = describe_all([good], tokenizer)
    assert not found[good].stamped
    said, rest = (unchecked(list(found.values()), full) for full in (False, True))
    assert said is not None and rest is not None
    assert said.removeprefix(rest).startswith("; only a sample of the token ids is checked now")
    assert said.startswith(f"1 of 1 data sources have no stamp of launch/prepare_data.py ({good}): whether they were")
    with pytest.raises(ValueError, match=r"bad\.bin: token id 60000 at token 4 \(sequence 1\)"):
        describe_all([good, bad], tokenizer)


def test_all_sources_mistakes_come_together(
    prefix: str, write_indexed: Write, tokenizer: SentencePieceTokenizer
) -> None:
    bad = write_indexed("bad", [[60_000]])
    flip(f"{prefix}.bin", 0)
    with pytest.raises(ValueError, match=r"are not those that .*; .*bad\.bin: token id 60000 .*; data file none\.idx"):
        describe_all([prefix, bad, "none"], tokenizer)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[:-9], r"stamp\.json is no JSON file"),
        (lambda text: "[]", r"stamp\.json has format None, but this version of megamult reads formats up to 2: rerun"),
        (lambda text: text.replace('"format": 2', '"format": 3'), r"has format 3"),
        (lambda text: text.replace('"order"', '"disorder"'), r"stamp\.json is damaged \(.*disorder"),
    ],
)
def test_a_damaged_stamp_is_named(
    prefix: str, tokenizer: SentencePieceTokenizer, spoil: Callable[[str], str], message: str
) -> None:
    path = Path(prefix + ".stamp.json")
    path.write_text(spoil(path.read_text()))
    with pytest.raises(ValueError, match=message):
        describe(prefix, tokenizer)


def test_an_earlier_stamp_does_not_outlive_its_files(prefix: str, tmp_path: Path, model: Path) -> None:
    (tmp_path / "d.txt").write_text("only one document here")
    prepare_corpus([tmp_path / "d.txt"], tmp_path / "c", tokenizer=model, valid_fraction=0)
    assert not Path(prefix.replace("train", "valid") + ".stamp.json").exists()
    stamp = Stamp.read(prefix)
    assert stamp is not None and stamp.documents == 1


def test_the_digest_of_order_is_the_one_that_older_runs_drew_from(write_indexed: Write) -> None:
    """Runs that go on, and losses of the past, depend on it: it must never change."""
    files = read_index(write_indexed("a", [[1, 2, 3], [], [5] * 7]))
    assert order_digest(files) == "832c74e4451dd922cd7a338151776a8a04c29a41f28721e275e1561cf20cf025"
    assert order_digest(replace(files, dtype=np.int32)) != order_digest(files)


def test_what_is_read_at_the_start_does_not_grow_with_the_corpus(
    write_indexed: Write, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel counts this process's reads; the files have 1 and 8 million bytes."""

    def read(documents: int) -> int:
        prefix = write_indexed(f"n{documents}", [[7] * 500] * documents)
        Stamp.of(read_index(prefix), tokenizer).write(Path(prefix + ".stamp.json"))
        before = _bytes_read()
        with monkeypatch.context() as patch:
            patch.setattr(indexed.IndexedFiles, "_table", None)  # what is mapped into memory is not counted
            describe(prefix, tokenizer)
        return _bytes_read() - before

    read(1000)  # what Python itself reads on a first call is not meant
    small, large = read(1000), read(8000)
    # 16 blocks of 4 KiB of each file, headers and the stamp (64 digits for every 256 MiB).
    assert small <= large < 170_000


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(json.loads(next(line for line in lines if line.startswith("rchar")).split()[1]))
