"""Bytes of its corpora that a run reads at its start, and the memory for it: by stamps, and by reading everything.

    python examples/benchmarks/data_start.py

The corpora are sparse files with true sizes, headers and stamps, but without contents. A start by stamps needs no
contents, so its figures are measured on all files. Reading everything cannot be measured in this way. For this, an
index of `--sample_documents` documents is written in full, the cost per document of its check is measured, and the
other figures are calculated. Bytes read are the kernel's count for a process (rchar), and memory is the process's
resident set.
"""

from __future__ import annotations

import argparse
import multiprocessing
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megamult.data.dataset import BlendedDataset
from megamult.data.described import describe_all
from megamult.data.identity import contents_digest
from megamult.data.indexed import PIECE_BYTES, read_index
from megamult.data.stamp import SUFFIX, Stamp

_HEADER = struct.Struct("<9sQBQQ")
_INT32 = 4


class Tokenizer:
    """Stand-in for a tokenizer: the attributes that a dataset reads, without a file."""

    vocab_size, eod, sha256, path = 128_256, 2, "0" * 64, "none"
    unique_identifiers: ClassVar = {"class": "none"}


def make_sparse(prefix: Path, documents: int, tokens: int) -> None:
    """Make a corpus with these numbers of documents and tokens as sparse files, with a stamp."""
    idx, header = prefix.with_suffix(".idx"), _HEADER.pack(b"MMIDIDX\0\0", 1, _INT32, documents, documents + 1)
    with open(idx, "wb") as stream:
        stream.write(header)
        lengths, pointers, bounds = (_HEADER.size + at * documents for at in (0, 4, 12))
        for at, value in (
            (lengths + 4 * (documents - 1), struct.pack("<i", 1)),
            (pointers + 8 * (documents - 1), struct.pack("<q", 4 * (tokens - 1))),
            (bounds + 8 * documents, struct.pack("<q", documents)),
        ):
            stream.seek(at)
            stream.write(value)
    with open(prefix.with_suffix(".bin"), "wb") as stream:
        stream.truncate(4 * tokens)
    files = read_index(prefix)
    sizes = [file.stat().st_size for file in (files.bin, files.idx)]
    Stamp(
        tokenizer_sha256=Tokenizer.sha256,
        vocab_size=Tokenizer.vocab_size,
        dtype="int32",
        tokens=tokens,
        documents=documents,
        bin_bytes=sizes[0],
        idx_bytes=sizes[1],
        order="0" * 64,
        contents=contents_digest(files),
        piece_bytes=PIECE_BYTES,
        bin_sha256=["0" * 64] * -(-sizes[0] // PIECE_BYTES),
        idx_sha256=["0" * 64] * -(-sizes[1] // PIECE_BYTES),
    ).write(Path(f"{prefix}{SUFFIX}"))


def make_index(path: Path, documents: int) -> None:
    """Write the index file of documents that have 1,000 tokens each."""
    with open(path, "wb") as stream:
        stream.write(_HEADER.pack(b"MMIDIDX\0\0", 1, _INT32, documents, documents + 1))
        stream.write(np.full(documents, 1000, "<i4").tobytes())
        stream.write((np.arange(documents, dtype="<i8") * 4000).tobytes())
        stream.write(np.arange(documents + 1, dtype="<i8").tobytes())


def check_everything(path: Path, documents: int) -> None:
    """Check a whole index at once, as each rank would have to do without stamps."""
    table = np.memmap(path, np.uint8, "r")
    lengths = np.frombuffer(table, "<i4", documents, _HEADER.size)
    pointers = np.frombuffer(table, "<i8", documents, _HEADER.size + 4 * documents)
    ends = np.cumsum(lengths, dtype=np.int64) * _INT32
    starts = np.concatenate((np.zeros(1, np.int64), ends))[:-1]
    assert not len(np.flatnonzero((lengths < 0) | (pointers != starts)))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def _measured(work: Callable[..., object], arguments: tuple[Any, ...], answers: Any) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
    read = int(Path("/proc/self/io").read_text().split()[1])
    memory, began = _status("VmRSS"), time.perf_counter()
    kept = work(*arguments)
    seconds = time.perf_counter() - began
    read = int(Path("/proc/self/io").read_text().split()[1]) - read
    answers.put({"read": read, "kept": _status("VmRSS") - memory, "peak": _status("VmHWM") - memory, "s": seconds})
    del kept


def measure(work: Callable[..., object], *arguments: Any) -> dict[str, float]:
    """Run `work` in a new process; return bytes read, resident memory at its end and at its peak, and seconds."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=_measured, args=(work, arguments, answers))
    process.start()
    found: dict[str, float] = answers.get()
    process.join()
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=1e13, help="number of tokens of all files (int32 ids)")
    parser.add_argument("--files", type=int, default=2000, help="number of pairs of .bin and .idx")
    parser.add_argument("--document", type=int, default=1000, help="tokens of a document, on average")
    parser.add_argument(
        "--sample_documents",
        type=int,
        default=5_000_000,
        help="number of documents of the index that is written in full",
    )
    parser.add_argument(
        "--directory", type=Path, default=None, help="directory to write to, on a file system with sparse files"
    )
    arguments = parser.parse_args()
    tokens = int(arguments.tokens) // arguments.files
    documents = tokens // arguments.document
    everything = documents * arguments.files
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        prefixes = [f"{folder}/corpus_{number}" for number in range(arguments.files)]
        for prefix in prefixes:
            make_sparse(Path(prefix), documents, tokens)
        first = measure(describe_all, prefixes, Tokenizer())
        described = describe_all(prefixes, Tokenizer())
        sources = [(prefix, 1.0) for prefix in prefixes]
        other = measure(
            lambda: BlendedDataset(sources, Tokenizer(), 4096, 1234, folder, described)  # type: ignore[arg-type]
        )
        full = Path(folder) / "full.idx"
        make_index(full, arguments.sample_documents)
        old = measure(check_everything, full, arguments.sample_documents)
    per_document = old["peak"] / arguments.sample_documents
    print(
        f"{arguments.tokens:.0e} tokens (int32) in {arguments.files:,} files of {documents:,} documents, "
        f"{everything:.0e} documents in all; m: measured, a: arithmetic\n"
    )
    gb, mb = 1e-9, 1e-6
    rows = [
        ("read of .bin, all ranks together", f"{4 * arguments.tokens * gb:,.0f} GB a", "samples, in the next line"),
        (
            "read by a node's first rank",
            f".idx, twice {12 * everything * gb:,.0f} GB a",
            f"{first['read'] * gb:.2f} GB, {first['s']:.1f} s m",
        ),
        (
            "read by every other rank",
            f".idx, twice {12 * everything * gb:,.0f} GB a",
            f"{other['read'] * mb:.1f} MB, {other['s']:.1f} s m",
        ),
        (
            "peak memory of the check, each rank",
            f"{per_document:.0f} B per document m: {per_document * documents * mb:,.0f} MB per file a",
            f"first rank {first['peak'] * mb:.0f} MB, others {other['peak'] * mb:.0f} MB m",
        ),
        (
            "list of documents kept, each rank",
            f"4 B per document: {4 * everything * gb:,.0f} GB a",
            "none (tests/data/test_dataset.py)",
        ),
    ]
    print(f"{'':<38}{'reading everything':<46}by stamps")
    for what, before, after in rows:
        print(f"{what:<38}{before:<46}{after}")


if __name__ == "__main__":
    main()
