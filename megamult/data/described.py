"""Descriptions of a run's sources, made from their files.

In :func:`megamult.train.corpora.open_datasets` one rank of each node describes a share of the sources, and all ranks
are told the result.
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from megamult.data.identity import Identity, contents_digest, order_digest
from megamult.data.indexed import IndexedFiles, read_index, validate_indexed, validate_sample
from megamult.data.stamp import SUFFIX, Stamp
from megamult.data.tokenizer import Tokenizer

# Number of threads. Each source takes some 40 small reads, which wait for a file server rather than for a processor.
_THREADS = 16
_TELL_SECONDS = 5.0
"""Seconds between the progress reports of a long check."""
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Described:
    """Description of one source: its files, the digests that identify it, and whether it has a stamp.

    Attributes:
        seen: result of :func:`look_at` before the files were read. It does not count when descriptions are compared.
    """

    files: IndexedFiles
    identity: Identity
    stamped: bool
    seen: tuple[tuple[int, ...] | None, ...] = field(default=(), compare=False)


def look_at(prefix: str) -> tuple[tuple[int, ...] | None, ...]:
    """Return the inode number, the size and the times of the last changes of a source's files, without opening them.

    An element is None if its file does not exist. Nodes that share a file system find the same. Where files have been
    copied, they do not, because a copy cannot have the original's time of the last change of an inode (ctime).
    """

    def look(suffix: str) -> tuple[int, ...] | None:
        try:
            found = os.stat(prefix + suffix)
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    return look(".bin"), look(".idx"), look(SUFFIX)


def describe(prefix: str, tokenizer: Tokenizer) -> Described:
    """Describe a source by its stamp, the header of its .idx, and the sizes and a few blocks of its .bin and .idx.

    If there is no stamp, the .idx is also read for the positions where documents start, to compute `Identity.order`.

    Raises:
        ValueError: a file is missing or damaged, does not fit its stamp, or was encoded with another tokenizer.
    """
    seen = look_at(prefix)
    files, stamp = read_index(prefix), Stamp.read(prefix)
    if stamp is None:
        return Described(files, Identity(order_digest(files), contents_digest(files)), stamped=False, seen=seen)
    identity = stamp.check_files(files)
    stamp.check_tokenizer(prefix, tokenizer)
    return Described(files, identity, stamped=True, seen=seen)


def describe_all(prefixes: Sequence[str], tokenizer: Tokenizer) -> dict[str, Described]:
    """Describe each source. If it has no stamp, also check a few blocks of its .bin and .idx (see `validate_sample`).

    Raises:
        ValueError: `describe` or `validate_sample` failed. One message lists the mistakes of all sources.
    """

    def check(prefix: str) -> Described:
        found = describe(prefix, tokenizer)
        if not found.stamped:
            validate_sample(found.files, tokenizer.vocab_size)
        return found

    return _each(check, prefixes)


def others_here(described: Mapping[str, Described]) -> list[str]:
    """Return the sources whose files on this node are not the ones that another node has described.

    They may be copies with the same contents, which only :func:`describe_all` tells.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(described, pool.map(look_at, described), strict=True))
    return [prefix for prefix, each in described.items() if found[prefix] != each.seen]


def check_ends(described: Sequence[Described], eod: int) -> None:
    """Check that the last document of each source ends with the end-of-document token, as data.document_mask needs.

    Raises:
        ValueError: it does not. The message names all such sources.
    """
    ends = [(each.files.prefix, each.files.last_token()) for each in described]
    wrong = [f"{prefix} (with {token})" for prefix, token in ends if token != eod]
    if wrong:
        raise ValueError(
            f"data.document_mask is true, and the last document does not end with the end-of-document token {eod} in "
            f"{', '.join(wrong)}: set data.eod to the token that ends documents there, prepare these corpora with it "
            "(launch/prepare_data.py writes it, Megatron's preprocess_data.py with --append-eod), or leave "
            "data.document_mask out"
        )


def validate_all(
    prefixes: Sequence[str], tokenizer: Tokenizer, share: tuple[int, int], note: Callable[[int], None] = lambda n: None
) -> None:
    """Check this rank's share of all sequences and token ids, and checksums of both files if a source has a stamp.

    Args:
        share: (k, n) if this is rank k of the n ranks that divide the work.
        note: function that is called every few seconds with the number of checked pieces of files, if this number has
            grown.

    Raises:
        ValueError: a stamp cannot be read, or `validate_indexed` failed. One message lists the mistakes of all sources.
    """

    checked: list[str] = []  # one entry, the source, for each checked piece; several threads append to it

    def check(prefix: str) -> None:
        stamp = Stamp.read(prefix)
        checksums = None if stamp is None else (stamp.bin_sha256, stamp.idx_sha256)
        validate_indexed(prefix, tokenizer.vocab_size, share, checksums, lambda: checked.append(prefix))

    told = 0

    def tell() -> None:
        nonlocal told
        if len(checked) > told:
            told = len(checked)
            note(told)

    _each(check, prefixes, tell)


def _each(
    check: Callable[[str], _Result], prefixes: Sequence[str], waiting: Callable[[], None] = lambda: None
) -> dict[str, _Result]:
    """Run `check` on each source in several threads, and call `waiting` every few seconds until all checks end."""
    found: dict[str, _Result] = {}
    mistakes: list[str] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        tasks = {prefix: pool.submit(check, prefix) for prefix in dict.fromkeys(prefixes)}
        while concurrent.futures.wait(tasks.values(), _TELL_SECONDS).not_done:
            waiting()
        for prefix, task in tasks.items():
            try:
                found[prefix] = task.result()
            except ValueError as error:
                mistakes.append(str(error))
    if mistakes:
        raise ValueError("; ".join(mistakes))
    return found


def unchecked(described: Sequence[Described], full: bool) -> str | None:
    """Return a line that says what could not be checked because stamps are missing, or None if every source has one.

    Args:
        full: whether `validate_all` checks every token id.
    """
    bare = [each for each in described if not each.stamped]
    if not bare:
        return None
    names = ", ".join(each.files.prefix for each in bare[:3]) + (", ..." if len(bare) > 3 else "")
    ids = (
        ""
        if full
        else "; only a sample of the token ids is checked now, and the others when training reads them "
        "(data.validate full checks all of them now)"
    )
    return (
        f"{len(bare)} of {len(described)} data sources have no stamp of launch/prepare_data.py ({names}): whether "
        f"they were encoded with the run's tokenizer is not checked{ids}"
    )
