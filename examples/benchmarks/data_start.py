"""What a run of 1,024 ranks does before its first step: seconds, bytes, opened files and memory of one rank.

    python examples/benchmarks/data_start.py

One process plays single ranks of the run: the first rank of a node, a rank that reads samples, one that does not. A
corpus of `--tokens` tokens in `--files` pairs of files is simulated. `--indices` real .idx files, and .bin files of
the true size without contents, have many names each: hard links, with stamps. A rank reads from them what it would
read from as many different files, so that its figures are measured, and not scaled. What ranks would do without the
sharing of work is calculated from measured parts.

`read` is the number of bytes that a rank gets by system calls (the kernel's rchar). `disk` is the number of bytes that
come from the disk, where an index is mapped into memory; for this, the kernel's copies of the .idx files are dropped
before. `opened` counts calls of open on files of the corpora and of the run. Memory is resident memory.

The plan for Muon and the process groups are those of Llama-3 70B on the same ranks (muon_plan.py, process_groups.py).
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from model_start import processor
from muon_plan import LLAMA, zero_cuts
from process_groups import groups_made

from megamult.data.dataset import BlendedDataset
from megamult.data.described import Described, describe_all, others_here
from megamult.data.identity import Identity, contents_digest, order_digest
from megamult.data.indexed import PIECE_BYTES, read_index
from megamult.data.source import Source
from megamult.data.stamp import SUFFIX, Stamp
from megamult.distributed import process_groups
from megamult.optim.muon.newton_schulz import flops
from megamult.optim.muon.plan import make_plan
from megamult.parameters.axes import Grid

_HEADER = struct.Struct("<9sQBQQ")
_INT32 = 4
SEQ, SEED = 4096, 1234


class Tokenizer:
    """Stand-in for a tokenizer: the attributes that a dataset reads, without a file."""

    vocab_size, eod, sha256, path = 128_256, 2, "0" * 64, "none"
    unique_identifiers: ClassVar = {"class": "none"}


TOKENIZER: Any = Tokenizer()


def make_pair(prefix: Path, documents: int, length: int) -> None:
    """Write the .idx of documents of `length` tokens each, a .bin of its size without contents, and a stamp."""
    with open(prefix.with_suffix(".idx"), "wb") as stream:
        stream.write(_HEADER.pack(b"MMIDIDX\0\0", 1, _INT32, documents, documents + 1))
        stream.write(np.full(documents, length, "<i4").tobytes())
        stream.write((np.arange(documents, dtype="<i8") * 4 * length).tobytes())
        stream.write(np.arange(documents + 1, dtype="<i8").tobytes())
        os.fsync(stream.fileno())
    with open(prefix.with_suffix(".bin"), "wb") as stream:
        stream.truncate(4 * length * documents)
    files = read_index(prefix)
    sizes = [file.stat().st_size for file in (files.bin, files.idx)]
    Stamp(
        tokenizer_sha256=Tokenizer.sha256,
        vocab_size=Tokenizer.vocab_size,
        dtype="int32",
        tokens=files.tokens,
        documents=documents,
        bin_bytes=sizes[0],
        idx_bytes=sizes[1],
        order=order_digest(files),
        contents=contents_digest(files),
        piece_bytes=PIECE_BYTES,
        bin_sha256=["0" * 64] * -(-sizes[0] // PIECE_BYTES),
        idx_sha256=["0" * 64] * -(-sizes[1] // PIECE_BYTES),
    ).write(Path(f"{prefix}{SUFFIX}"))


def link_index_files(dataset: BlendedDataset, position: int, like: Path) -> None:
    """Give a source the index files of its first epoch, as links to the files of another source's epoch."""
    source = dataset._sources[position]
    folder = source.epochs.path(0)
    folder.mkdir(parents=True, exist_ok=True)
    named = source.epochs._named(0, folder, None)
    for kind in ("document", "sample", "shuffle"):
        os.link(next(like.glob(f"*{kind}_index.npy")), getattr(named, f"path_to_{kind}_index"))


class Measured:
    """Figures of some work that a new process has done (see this module's docstring)."""

    def __init__(self, work: Callable[[], object], rank: int = 0, ranks: int = 1, cold: Path | None = None) -> None:
        answers = multiprocessing.get_context("fork").SimpleQueue()
        process = multiprocessing.get_context("fork").Process(target=self._run, args=(work, rank, ranks, cold, answers))
        process.start()
        self.seconds, self.read, self.disk, self.opened, self.kept, self.peak = answers.get()
        process.join()

    @staticmethod
    def _run(work: Callable[[], object], rank: int, ranks: int, cold: Path | None, answers: Any) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
        if cold is not None:
            for file in cold.glob("real_*.idx"):
                with open(file, "rb") as stream:
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        opened = [0]

        def count(event: str, arguments: Any) -> None:
            if event == "open" and "start_of_a_run" in str(arguments[0]):
                opened[0] += 1

        sys.addaudithook(count)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
        before, memory, began = _io(), _status("VmRSS"), time.perf_counter()
        kept = work()
        seconds = time.perf_counter() - began
        after = _io()
        peak = _status("VmHWM") - memory
        read, disk = after["rchar"] - before["rchar"], after["read_bytes"] - before["read_bytes"]
        answers.put((seconds, read, disk, opened[0], _status("VmRSS") - memory, peak))
        del kept

    def row(self, who: str, what: str) -> str:
        """Return the line of the table."""
        figures = f"{self.seconds:>9.2f}{self.read / 1e6:>10.1f}{self.disk / 1e6:>10.1f}{self.opened:>9,}"
        return f"{who:<24}{what:<62}{figures}{self.peak / 1e6:>9.0f}"


def _io() -> dict[str, int]:
    lines = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {key: int(value) for key, value in lines}


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=1e13, help="number of tokens of all files (int32 ids)")
    parser.add_argument("--files", type=int, default=2000, help="number of pairs of .bin and .idx")
    parser.add_argument("--document", type=int, default=1000, help="tokens of a document")
    parser.add_argument("--indices", type=int, default=17, help="number of .idx files that are written")
    parser.add_argument("--ranks", type=int, default=1024, help="number of ranks")
    parser.add_argument("--tensor", type=int, default=8, help="tensor-parallel size, and ranks per node")
    parser.add_argument("--batch", type=int, default=4096, help="sequences of a global batch")
    parser.add_argument("--directory", type=Path, default=None, help="directory to write to")
    arguments = parser.parse_args()
    files, ranks, tensor, batch = arguments.files, arguments.ranks, arguments.tensor, arguments.batch
    documents = int(arguments.tokens) // files // arguments.document
    nodes = data = ranks // tensor
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory("start_of_a_run", dir=arguments.directory)))
        for number in range(arguments.indices):
            make_pair(folder / f"real_{number}", documents, arguments.document)
        stamped, bare = ([str(folder / f"{kind}_{i}") for i in range(files)] for kind in ("corpus", "bare"))
        for i in range(files):
            for prefixes, suffixes in ((stamped, (".bin", ".idx", SUFFIX)), (bare, (".bin", ".idx"))):
                for suffix in suffixes:
                    os.link(folder / f"real_{i % arguments.indices}{suffix}", f"{prefixes[i]}{suffix}")

        one = describe_all(stamped[:1], TOKENIZER)[stamped[0]]
        described = {
            prefix: Described(
                read_index(prefix), Identity(f"{i:064x}", one.identity.contents), stamped=True, seen=one.seen
            )
            for i, prefix in enumerate(stamped)
        }
        weighted = [(prefix, 1.0) for prefix in stamped]

        def blend() -> BlendedDataset:
            return BlendedDataset(weighted, TOKENIZER, SEQ, SEED, folder / "cache", described=described)

        def share(prefixes: list[str]) -> list[object]:
            return [describe_all(prefixes[1::nodes], TOKENIZER), others_here(dict.fromkeys(prefixes, one))]

        # A rank looks whether it sees the files of the first source, which rank 0 builds.
        dataset = blend()
        dataset._sources[0].epochs.build(0)
        built = dataset._sources[0].epochs.path(0)

        def first_batch(rank: int, at: int) -> BlendedDataset:
            reading = blend()
            if at:
                reading.load_state_dict(reading.state_dict(), at)
            reading.prepare(at, at + batch)
            if rank % tensor == 0:
                assert len([reading[i] for i in range(at + rank // tensor, at + batch, data)]) == batch // data
            return reading

        print(
            f"{arguments.tokens:.0e} tokens (int32) in {files:,} files of {documents:,} documents; {ranks:,} ranks, "
            f"{nodes} nodes; {processor()}\n"
        )
        print(f"{'':<86}{'seconds':>9}{'read, MB':>10}{'disk, MB':>10}{'opened':>9}{'peak, MB':>9}")
        before = "(before)"
        rows = [
            ("first rank of a node", f"check of its share, 1 of {nodes}, by stamps", Measured(partial(share, stamped))),
            ("", "the same without stamps", Measured(partial(share, bare), cold=folder)),
            ("", f"check of all files, by stamps {before}", Measured(partial(describe_all, stamped, TOKENIZER))),
            ("every rank", "blend of all sources", Measured(blend)),
        ]
        building = Measured(lambda: blend().prepare(0, batch), tensor - 3, ranks, folder)
        mine = -(-files // ranks)
        rows.append(("", f"blend, and index files of its share, {mine} of {files:,} sources", building))
        one_source = Measured(partial(Source.open, dataset._sources[1], 0))
        rows.append(("", "index files of one source", one_source))
        for position in range(files):
            if not dataset._sources[position].epochs.path(0).exists():
                link_index_files(dataset, position, built)
        middle = int(arguments.tokens) // SEQ // 2
        for what, at in (("the first batch", 0), ("a batch in the middle, by a resumed run", middle)):
            for who, rank in (("reads samples", tensor), ("does not", tensor + 1)):
                rows.append(
                    (f"rank that {who}", f"blend, and {what}", Measured(partial(first_batch, rank, at), rank, ranks))
                )

        def open_all() -> list[Any]:
            return [source.open(0) for source in blend()._sources]

        rows.append(("every rank", f"blend, and all sources opened {before}", Measured(open_all)))
        cuts = zero_cuts(LLAMA["70B"].specs(), tensor, data, 3)
        grid, cost = Grid(tensor=tensor, data=data), partial(flops, steps=5)
        rows.append(("", "plan for Muon, Llama-3 70B, ZeRO 3", Measured(lambda: make_plan(cuts, grid, cost))))

        def groups() -> object:
            return groups_made(ranks - 1, ranks, lambda: process_groups.create(tensor, datetime.timedelta(minutes=1)))

        rows.append(("", "process groups, with nobody to wait for", Measured(groups)))
        for who, what, each in rows:
            print(each.row(who, what))
        alone = files * one_source.seconds
        print(f"\nindex files of all sources by rank 0, while all ranks wait {before}: {alone:,.0f} s (arithmetic)")


if __name__ == "__main__":
    main()
