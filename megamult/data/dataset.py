"""The samples that training reads: weighted sources, each a Megatron `GPTDataset` per epoch.

A GPTDataset orders its documents by how many epochs it is asked for, so one that covers a whole run changes
when the run gets longer. Here each (source, epoch) is a dataset of exactly one epoch with a seed of its own.
Sample k of a source is then a function of (seed, source, k) alone, wherever the source stands in a blend, and a
run resumes at any sample without a state. A source is known by its contents.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megamult.data.blend import Blend
from megamult.data.indexed import IndexedFiles, read_index
from megamult.data.splitmix import splitmix
from megamult.data.tokenizer import Tokenizer

# How long a network file system may take to show rank 0's index files to the other ranks.
_SHARED_FILES_SECONDS = 60
# Megatron zeroes and masks tokens equal to its padding id, by default -1, which a damaged corpus may hold and
# which would then pass unseen. No token type holds this one.
_NO_PADDING = -(1 << 40)


class BlendedDataset:
    """Global sample i -> {"tokens": i64[seq], "labels": i64[seq]}, labels[t] being the token after tokens[t].

    `sources` are (prefix of .bin/.idx, positive weight); weights are relative. Sample i is sample k of the
    source that `Blend.locate` names, found in epoch k // samples_per_epoch at place k % samples_per_epoch.
    Each epoch shuffles the documents, cuts them into samples of seq_length tokens (one more is read for the
    last label) and shuffles those. The last, incomplete sample of an epoch is left out; no sample is padded,
    none is masked.

    In a distributed run call `prepare` on all ranks before reading; a single process may skip it.

    Args:
        cache_dir: where GPTDataset keeps its index files, on a file system that all ranks see. Files are
            keyed by source contents, seed, seq_length and tokenizer, so a directory may be used again and by
            several runs.

    Raises:
        ValueError: bad weights, damaged files (see `read_index`), or a source shorter than one sample.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, float]],
        tokenizer: Tokenizer,
        seq_length: int,
        seed: int,
        cache_dir: str | Path,
    ) -> None:
        if seq_length < 1:
            raise ValueError(f"seq_length is {seq_length}; give at least 1 token")
        self._weights = [float(weight) for _, weight in sources]
        self.blend = Blend(self._weights)
        self._origin = 0  # global sample with which the present blend began,
        self._first = [0] * len(sources)  # and each source's sample there
        self._left: dict[str, int] = {}  # next samples of sources that an earlier blend had
        self._sources: list[_Source] = []
        for prefix, _ in sources:
            files = read_index(prefix)
            identity = _contents_digest(files)
            twins = sum(source.identity == identity for source in self._sources)
            self._sources.append(_Source(files, (identity, twins), tokenizer, seq_length, seed, Path(cache_dir)))
        self._prepared: set[tuple[int, int]] = set()

    @property
    def samples_per_epoch(self) -> list[int]:
        """How many samples one epoch of each source has."""
        return [source.samples_per_epoch for source in self._sources]

    def prepare(self, first: int, last: int, barrier: Callable[[], None] | None = None) -> None:
        """Open every (source, epoch) that the samples [first, last) touch and close all others.

        Global rank 0 builds the index files that do not exist yet, then `barrier` is called, then the other
        ranks load them. All ranks must make the same calls; where nothing new is touched there is neither
        work nor a barrier.

        Raises:
            RuntimeError: rank 0's index files do not appear on this rank (cache_dir is not shared).
        """
        needed: set[tuple[int, int]] = set()
        counts = zip(self._positions(first), self._positions(last), self._sources, strict=True)
        for position, (start, stop, source) in enumerate(counts):
            if stop > start:
                epochs = range(start // source.samples_per_epoch, (stop - 1) // source.samples_per_epoch + 1)
                needed.update((position, epoch) for epoch in epochs)
        new = sorted(needed - self._prepared)
        if new:
            # The barrier is reached even if building fails: rank 0's error is then the one that is seen.
            try:
                if _global_rank() == 0:
                    for position, epoch in new:
                        self._sources[position].open(epoch)
            finally:
                if barrier is not None:
                    barrier()
            for position, epoch in new:
                self._sources[position].open(epoch)
        self._prepared = needed
        for position, source in enumerate(self._sources):
            source.keep({epoch for p, epoch in needed if p == position})

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """Global sample `i` >= 0.

        Raises:
            ValueError: the sample holds a token id outside the tokenizer's vocabulary.
        """
        if i < self._origin:
            raise IndexError(f"sample {i} does not exist: samples count from {self._origin}")
        position, k = self.blend.locate(i - self._origin)
        return self._sources[position].sample(self._first[position] + k)

    def _positions(self, i: int) -> list[int]:
        """Each source's next sample, before global sample `i`."""
        return [first + count for first, count in zip(self._first, self.blend.counts(i - self._origin), strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold, beside the number of samples, to go on with every source's next sample."""
        sources = zip(self._sources, self._weights, self._first, strict=True)
        return {
            "origin": self._origin,
            "sources": [{"source": source.name, "weight": w, "first": first} for source, w, first in sources],
            "left": self._left,
        }

    def load_state_dict(self, state: dict[str, Any], samples: int) -> None:
        """Go on before global sample `samples` of a run that left `state`.

        The same sources and weights go on with the same blend. Otherwise a new blend begins here, in which each
        source that the run had goes on with its next sample, and others begin.
        """
        saved = state["sources"]
        mine = [(source.name, weight) for source, weight in zip(self._sources, self._weights, strict=True)]
        if [(each["source"], each["weight"]) for each in saved] == mine:
            self._origin, self._first = state["origin"], [each["first"] for each in saved]
            self._left = state["left"]
            return
        counts = Blend([each["weight"] for each in saved]).counts(samples - state["origin"])
        reached = state["left"] | {
            each["source"]: each["first"] + count for each, count in zip(saved, counts, strict=True)
        }
        self._origin = samples
        self._first = [reached.pop(source.name, 0) for source in self._sources]
        self._left = reached


class _Source:
    """One indexed dataset and its open epochs."""

    def __init__(
        self,
        files: IndexedFiles,
        which: tuple[str, int],
        tokenizer: Tokenizer,
        seq_length: int,
        seed: int,
        cache_dir: Path,
    ) -> None:
        """`which`: a digest of the contents, and how many sources with the same contents come before."""
        prefix = files.prefix
        if files.tokens < seq_length + 1:
            raise ValueError(
                f"data source {prefix} has {files.tokens} tokens, but one sample takes "
                f"{seq_length + 1} (seq_length + 1); prepare more text (for a valid set, a larger "
                "valid_fraction) or shorten model.seq_length"
            )
        self.prefix, self._tokenizer, self._seq_length = prefix, tokenizer, seq_length
        self.samples_per_epoch = (files.tokens - 1) // seq_length
        self.identity, twins = which
        self._seed = (seed, int(self.identity[:16], 16), twins)
        self.name = f"{self.identity}.{twins}"
        key = repr((self.identity, tokenizer.sha256, seq_length, seed, twins))
        self._directory = cache_dir / hashlib.sha256(key.encode()).hexdigest()[:16]
        self._indexed: Any = None
        self._epochs: dict[int, Any] = {}

    def keep(self, epochs: set[int]) -> None:
        self._epochs = {epoch: dataset for epoch, dataset in self._epochs.items() if epoch in epochs}

    def sample(self, k: int) -> dict[str, torch.Tensor]:
        epoch, place = divmod(k, self.samples_per_epoch)
        item = self.open(epoch)[place]
        tokens, labels = item["tokens"], item["labels"]
        # Vocabulary-parallel embeddings mask the ids they look up: a wrong one would be zeros, not an error.
        for wrong in (int(torch.min(tokens[0], labels.min())), int(torch.max(tokens[0], labels.max()))):
            if 0 <= wrong < self._tokenizer.vocab_size:
                continue
            raise ValueError(
                f"data source {self.prefix}, sample {k}: token id {wrong} is outside the vocabulary of "
                f"{self._tokenizer.vocab_size}; use the tokenizer that the corpus was prepared with"
            )
        return {"tokens": tokens, "labels": labels}

    def open(self, epoch: int) -> Any:
        """The GPTDataset of one epoch, loaded from complete index files or, on global rank 0, built."""
        if epoch in self._epochs:
            return self._epochs[epoch]
        final = self._directory / f"epoch_{epoch}"
        if final.exists():
            dataset = self._load(epoch, final)
        elif _global_rank() == 0:
            # Built aside and renamed: a run that is killed meanwhile leaves no half-written index behind.
            partial = self._directory / f"epoch_{epoch}.{os.getpid()}.partial"
            try:
                dataset = self._load(epoch, partial)
                try:
                    os.rename(partial, final)
                except OSError:
                    if not final.exists():  # otherwise another process was faster, with the same files
                        raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        else:
            _wait_for(final, self._directory.parent)
            dataset = self._load(epoch, final)
        assert len(dataset) == self.samples_per_epoch, (len(dataset), self.samples_per_epoch)
        self._epochs[epoch] = dataset
        return dataset

    def _load(self, epoch: int, directory: Path) -> Any:
        with _quiet_megatron():
            from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
            from megatron.core.datasets.indexed_dataset import IndexedDataset
            from megatron.core.datasets.utils import Split

            if self._indexed is None:
                self._indexed = IndexedDataset(self.prefix)
            config = GPTDatasetConfig(
                random_seed=splitmix(*self._seed, epoch) >> 32,  # numpy's RandomState takes 32 bits
                sequence_length=self._seq_length,
                # Not None, or the config switches to mock data; the dataset below is given its files.
                blend=([self.prefix], None),
                split="1,0,0",
                path_to_cache=str(directory),
                tokenizer=self._tokenizer,
                reset_position_ids=False,
                reset_attention_mask=False,
                eod_mask_loss=False,
                create_attention_mask=False,
            )
            documents = np.arange(len(self._indexed), dtype=np.int32)
            # The name enters the cache key: contents, not a path that may move or be spelled in two ways.
            dataset = GPTDataset(self._indexed, self.identity, documents, None, Split.train, config)
        assert dataset._pad_token_id < 0, dataset._pad_token_id
        dataset._pad_token_id = _NO_PADDING
        return dataset


def _contents_digest(files: IndexedFiles) -> str:
    """A digest of the sizes and of where up to 65,536 evenly spaced documents start."""
    digest = hashlib.sha256(f"{files.dtype.__name__} {files.tokens} {files.sequences}".encode())
    digest.update(files.pointers[:: 1 + files.sequences // 65536].tobytes())
    return digest.hexdigest()


def _global_rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _wait_for(directory: Path, cache_dir: Path) -> None:
    deadline = time.monotonic() + _SHARED_FILES_SECONDS
    while not directory.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"rank {_global_rank()} does not see {directory}, which rank 0 builds; "
                f"call prepare() on all ranks, and put {cache_dir} on a file system that all nodes share"
            )
        time.sleep(0.1)


@contextlib.contextmanager
def _quiet_megatron() -> Iterator[None]:
    """Keep Megatron's INFO lines per index and its warnings on missing packages out of a run's output."""
    logger = logging.getLogger("megatron.core.datasets")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
