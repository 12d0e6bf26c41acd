"""The start of a run with thousands of large sources: ranks share the work, and no rank reads all tokens."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megamult.data.config import DataConfig
from megamult.data.described import describe_all, unchecked, validate_all
from megamult.data.epochs import quiet_megatron
from megamult.data.identity import Identity
from megamult.data.indexed import validate_indexed
from megamult.data.names import Names
from tests.data.conftest import StubTokenizer, distinct_ids, of

Write = Callable[..., str]


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))


def sources(write_indexed: Write, count: int) -> list[str]:
    return [write_indexed(f"s{n}", distinct_ids(300 * n, n)) for n in range(count)]


def test_index_files_are_those_that_megatron_itself_writes(
    write_indexed: Write, make: Callable, tmp_path: Path
) -> None:
    dataset = make(write_indexed("a", [*distinct_ids(0, 1), []]))
    epochs = dataset._sources[0].epochs
    epochs.build(3)
    ours = {file.name: file.read_bytes() for file in epochs.path(3).iterdir()}
    with quiet_megatron():
        from megatron.core.datasets.gpt_dataset import GPTDataset
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split

        indexed = IndexedDataset(epochs.prefix)
        config = epochs._named(3, tmp_path / "theirs", indexed).config
        config.defer_npy_index_mmap = False
        GPTDataset(indexed, epochs.name, np.arange(len(indexed), dtype=np.int32), None, Split.train, config)
    assert ours == {file.name: file.read_bytes() for file in (tmp_path / "theirs").iterdir()}
    assert len(ours) == 4


def test_ranks_share_out_the_index_files_and_open_only_what_they_read(
    write_indexed: Write, make: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefixes = sources(write_indexed, 5)
    alone = of(make(*prefixes, cache_dir=tmp_path / "alone"), range(20))
    ranks = [make(*prefixes) for _ in range(3)]

    def built() -> set[int]:
        return {n for n, source in enumerate(ranks[0]._sources) if source.epochs.path(0).exists()}

    for rank, (dataset, share) in enumerate(zip(ranks, ({0, 3}, {1, 4}, {2}), strict=True)):
        as_rank(monkeypatch, rank, 3)
        before, reached = built(), []
        dataset.prepare(0, 20, lambda reached=reached: reached.append(built()))
        assert reached == [before | share]
        assert {n for n, source in enumerate(dataset._sources) if source._epochs} == share
    assert of(ranks[1], range(20)) == alone
    assert all(source._epochs for source in ranks[1]._sources)


def test_a_rank_that_cannot_build_raises_when_the_others_have_come(
    write_indexed: Write, make: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, reached = make(*sources(write_indexed, 2)), []
    as_rank(monkeypatch, 1, 2)
    monkeypatch.setattr("megatron.core.datasets.helpers.build_sample_idx", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dataset.prepare(0, 4, lambda: reached.append(1))
    assert reached == [1]


def test_ranks_share_out_the_epochs_to_come(
    write_indexed: Write, make: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefixes = sources(write_indexed, 3)
    dataset = make(*prefixes)
    dataset.prepare(0, 6)
    end = 10 * sum(dataset.samples_per_epoch)
    given = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        given.append({files.prefix: epoch for files, epoch in dataset._next_epochs(6, end)})
    assert given == [{prefixes[0]: 1, prefixes[2]: 1}, {prefixes[1]: 1}]


def test_a_source_that_a_step_does_not_read_stays_open(write_indexed: Write, make: Callable) -> None:
    """Otherwise every step of a large blend would close and open sources, and all ranks would wait for each other."""
    a, b = sources(write_indexed, 2)
    dataset, barriers = make((a, 9.0), (b, 1.0)), []
    read = [dataset.blend.locate(i)[0] for i in range(25)]
    assert all(1 in read[i : i + 10] for i in range(15)) and read.count(1) < 5
    for i in range(0, 24, 2):
        dataset.prepare(i, i + 2, lambda: barriers.append(1))
    assert len(barriers) == 2, "one for each source"
    assert [set(source._epochs) for source in dataset._sources] == [{0}, {0}]


def test_a_rank_holds_as_many_files_open_as_are_counted(write_indexed: Write, make: Callable) -> None:
    prefixes = sources(write_indexed, 3)
    dataset = make(*prefixes)
    before = len(os.listdir("/proc/self/fd"))
    for source in dataset._sources:
        assert source.open(0) and source.open(1)
    config = DataConfig(train=prefixes[:2], valid={"one": prefixes[2]})
    assert len(os.listdir("/proc/self/fd")) - before == config.open_files()


def test_a_corpus_of_a_trillion_bytes_is_opened_with_a_few_reads(make: Callable, write_indexed: Write) -> None:
    """The kernel counts this process's reads. The .bin is sparse: only its size is true."""
    prefix, lengths = write_indexed("huge", []), np.full(1000, 250_000_000, "<i4")
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * 4
    header = bytearray(Path(f"{prefix}.idx").read_bytes()[:34])
    header[17], header[18:34] = 4, np.array([1000, 1001], "<i8").tobytes()  # int32; numbers of sequences and bounds
    bounds = np.arange(1001, dtype="<i8")
    Path(f"{prefix}.idx").write_bytes(bytes(header) + lengths.tobytes() + pointers.tobytes() + bounds.tobytes())
    os.truncate(f"{prefix}.bin", 10**12)
    before = _rchar()
    found = describe_all([prefix], StubTokenizer())
    assert found[prefix].files.tokens == 25 * 10**10
    # 16 blocks of 4 KiB for a digest, and 16 of 2048 tokens of 4 bytes that are checked; the .idx has 20 kB.
    assert 190_000 < _rchar() - before < 300_000
    before = _rchar()
    make(prefix, described=found, seq_length=10**8)._sources[0].epochs.build(0)
    assert _rchar() - before < 100_000, "the order of samples depends on the lengths of documents only"


def _rchar() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_wrong_token_between_the_samples_is_said_to_be_possible_and_found_on_request(
    write_indexed: Write, make: Callable
) -> None:
    documents = [[n % 50 for n in range(1000)] for _ in range(200)]
    documents[90][500] = 1000
    prefix, tokenizer = write_indexed("a", documents), StubTokenizer(vocab_size=100)
    found = describe_all([prefix], tokenizer)
    said = unchecked(list(found.values()), full=False)
    assert said is not None and "only a sample of the token ids is checked now, and the others when training" in said
    with pytest.raises(ValueError, match=r"a\.bin: token id 1000 at token 90500 \(sequence 90\) is outside"):
        validate_all([prefix], tokenizer, (0, 1))
    dataset = make(prefix, tokenizer=tokenizer, seq_length=200)
    with pytest.raises(ValueError, match=r"token id 1000 is outside the vocabulary of 100"):
        list(map(dataset.__getitem__, range(dataset.samples_per_epoch[0])))
    with pytest.raises(ValueError, match=r"token id 1000 at token 90500"):
        validate_indexed(prefix, 100)  # launch/prepare_data.py calls it for what it has written


def test_the_next_page_is_not_read_with_a_page_of_an_index(
    write_indexed: Write, make: Callable, tmp_path: Path
) -> None:
    """The kernel's flag `rr` of a mapping: random reads."""
    dataset = make(write_indexed("a", distinct_ids(0, 1)))
    assert dataset[0]
    mapped, flags = "", dict[str, bool]()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            mapped = line.split()[-1]
        elif line.startswith("VmFlags:") and mapped.startswith(str(tmp_path)):
            flags[Path(mapped).name.rpartition("-")[2]] = " rr " in line
    assert flags == dict.fromkeys(("a.idx", "document_index.npy", "sample_index.npy", "shuffle_index.npy"), True)


def test_names_of_many_sources_take_time_in_proportion() -> None:
    """The test counts the names that are looked at, and no time."""
    looked = 0
    identities = [Identity(f"{n:064x}", f"{n:064x}") for n in range(500)]
    first = Names.fresh(identities)

    class Counted(dict):
        def get(self, *arguments: object) -> object:
            nonlocal looked
            looked += 1
            return super().get(*arguments)

    again = Names.resumed(identities[::-1], first.names, Counted(first.contents))
    assert again.names == first.names[::-1] and looked <= 1000
