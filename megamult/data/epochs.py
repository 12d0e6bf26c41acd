"""Epochs of a source: Megatron's `GPTDataset` of each epoch, and the index files that fix the order of its samples.

As a program (`python -m megamult.data.epochs DESCRIPTOR`), this module reads descriptions of epochs from the open file
descriptor DESCRIPTOR (a number), one JSON object per line, and builds the index files of these epochs. A run starts the
program (`megamult.data.ahead`) with DESCRIPTOR open on a temporary file. Its standard input is a pipe to which nothing
is written: if the run ends before the program, the pipe closes, and the program ends at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import mmap
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from megamult.data.positioned import PositionedReader
from megamult.data.splitmix import splitmix
from megamult.runtime.partial import partial_folder

MOST_DOCUMENTS = 2**31 - 1
"""Maximum number of documents of a source. Megatron's sample index stores document numbers as 32-bit integers."""

# Megatron zeroes and masks tokens that equal its padding id, which is -1 by default. A damaged corpus may contain -1,
# and the damage would then stay unseen. So the padding id is set to a value that no token can have: it does not fit the
# types in which launch/prepare_data.py writes tokens.
_NO_PADDING = -(1 << 40)

_IMPORTED = "megatron.core.datasets.gpt_dataset"
_quieting = threading.RLock()  # a thread that reads samples opens epochs too


@dataclass(frozen=True)
class TokenizerFacts:
    """Attributes of a tokenizer that a GPTDataset reads.

    There is no `pad`: a GPTDataset would replace each token id equal to it by 0, and leave this token out of the loss.
    """

    vocab_size: int
    eod: int
    unique_identifiers: dict[str, str]


@dataclass(frozen=True)
class EpochFiles:
    """Epochs of one source: where their index files are, and everything on which the contents of these files depend.

    Attributes:
        prefix: prefix of the source's .bin and .idx.
        name: digest of the source, which Megatron uses in the names of the index files.
        seed: integers that are hashed, together with an epoch's number, to the seed of the epoch.
        directory: folder that has one folder per epoch.
    """

    prefix: str
    name: str
    seed: tuple[int, ...]
    seq_length: int
    tokenizer: TokenizerFacts
    directory: str

    def path(self, epoch: int) -> Path:
        """Return the folder of an epoch's index files. It exists once they are complete."""
        return Path(self.directory) / f"epoch_{epoch}"

    def build(self, epoch: int) -> None:
        """Write an epoch's index files, unless they exist. Any rank can do this."""
        final = self.path(epoch)
        if final.exists():
            return
        final.parent.mkdir(parents=True, exist_ok=True)
        # The index is built in another folder and renamed, so that a killed process leaves no half-written index here.
        with partial_folder(final) as partial:
            self._write(epoch, partial)
            try:
                os.rename(partial, final)
            except OSError:
                if not final.exists():  # if it exists, another process has written the same files
                    raise

    def load(self, epoch: int, indexed: Any) -> Any:
        """Return the GPTDataset of an epoch whose index files exist. `indexed` is an open `IndexedDataset`.

        Raises:
            FileNotFoundError: a file is missing, or has the name that another version of Megatron gave it.
        """
        dataset = self._named(epoch, self.path(epoch), indexed)
        dataset.document_index = np.load(dataset.path_to_document_index, mmap_mode="r")
        dataset.sample_index = np.load(dataset.path_to_sample_index, mmap_mode="r")
        dataset.shuffle_index = np.load(dataset.path_to_shuffle_index, mmap_mode="r")
        for table in (
            dataset.document_index,
            dataset.sample_index,
            dataset.shuffle_index,
            indexed.index.bin_buffer_mmap,
        ):
            # Samples come in a random order. If the kernel read ahead, as far as file systems for large files do
            # (megabytes), a sample of 20 kB would cost tens of megabytes where an .idx is not in memory yet.
            table._mmap.madvise(mmap.MADV_RANDOM)
        dataset.config.defer_npy_index_mmap = False  # it has its index: from here on its length is that of the index
        assert dataset._pad_token_id < 0, dataset._pad_token_id
        dataset._pad_token_id = _NO_PADDING
        return dataset

    def _write(self, epoch: int, directory: Path) -> None:
        """Write the index files that a GPTDataset of one epoch would write, byte for byte.

        A GPTDataset itself writes them on global rank 0 only, so here its functions are called in its order.
        """
        indexed = open_indexed(self.prefix)
        dataset = self._named(epoch, directory, indexed)
        from megatron.core.datasets import gpt_dataset, helpers

        draw = np.random.RandomState(dataset.config.random_seed)
        lengths = indexed.sequence_lengths.copy()  # read in one go: the documents come in a random order below
        documents = gpt_dataset._build_document_index(np.arange(len(lengths), dtype=np.int32), 1, draw, False)
        tokens = int(lengths.sum(dtype=np.int64))
        samples = helpers.build_sample_idx(lengths, documents, self.seq_length, 1, tokens, True, True)
        count = len(samples) - 1
        shuffle = gpt_dataset._build_shuffle_index(count, count, draw)
        document_file = Path(dataset.path_to_document_index)
        description = document_file.name.replace("document_index.npy", "description.txt")
        (directory / description).write_text(dataset.unique_description)
        np.save(document_file, documents)
        np.save(dataset.path_to_sample_index, samples)
        np.save(dataset.path_to_shuffle_index, shuffle)

    def _named(self, epoch: int, directory: Path, indexed: Any) -> Any:
        """Return a GPTDataset of an epoch that has the names of its index files, and no index yet."""
        with quiet_megatron():
            from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
            from megatron.core.datasets.utils import Split

            config = GPTDatasetConfig(
                random_seed=splitmix(*self.seed, epoch) >> 32,  # numpy's RandomState takes 32 bits
                sequence_length=self.seq_length,
                # With blend=None the config would switch to mock data. The dataset below gets its data from `indexed`.
                blend=([self.prefix], None),
                split="1,0,0",
                path_to_cache=str(directory),
                tokenizer=cast(Any, self.tokenizer),
                reset_position_ids=False,
                reset_attention_mask=False,
                eod_mask_loss=False,
                create_attention_mask=False,
                defer_npy_index_mmap=True,
            )
            # The name enters the cache key. It is a digest, because files may move, and a path has several spellings.
            # Only building needs the list of documents; a loaded dataset would keep it in memory for nothing.
            return GPTDataset(indexed, self.name, np.empty(0, np.int32), None, Split.train, config)


def open_indexed(prefix: str) -> Any:
    """Return Megatron's `IndexedDataset` of a source. It maps the .idx into memory, and reads the .bin by a
    :class:`PositionedReader`."""
    with quiet_megatron():
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        dataset = IndexedDataset(prefix, mmap=False)
    dataset.bin_reader = PositionedReader(f"{prefix}.bin")
    return dataset


@contextlib.contextmanager
def quiet_megatron() -> Iterator[None]:
    """Suppress the INFO lines that Megatron logs for every index file, and its warnings about missing packages."""
    logger = logging.getLogger("megatron.core.datasets")
    with _quieting:
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            # The filters of warnings belong to all threads, so they are changed only for the first import.
            with contextlib.nullcontext() if _IMPORTED in sys.modules else warnings.catch_warnings():
                if _IMPORTED not in sys.modules:
                    warnings.simplefilter("ignore")
                yield
        finally:
            logger.setLevel(level)


def to_json(files: EpochFiles, epoch: int) -> str:
    """Return the epoch as one line of JSON, which this module reads when it is run as a program."""
    return json.dumps({"files": dataclasses.asdict(files), "epoch": epoch})


def _from_json(line: str) -> tuple[EpochFiles, int]:
    content = json.loads(line)
    files = content["files"]
    facts = TokenizerFacts(**files.pop("tokenizer"))
    seed = tuple(files.pop("seed"))
    return EpochFiles(**files, seed=seed, tokenizer=facts), content["epoch"]


def _main() -> None:
    # Signals that stop a job reach all its processes. The run that started this process handles them.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)
    with open(int(sys.argv[1]), encoding="utf-8") as lines:
        work = [_from_json(line) for line in lines]
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    try:
        for files, epoch in work:
            files.build(epoch)
    except Exception as error:
        # The run that started this process shows the last line of this process's standard error in a warning.
        print(f"{type(error).__name__}: {error}".replace("\n", " "), file=sys.stderr, flush=True)
        os._exit(1)


if __name__ == "__main__":
    _main()
