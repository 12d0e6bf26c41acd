"""One source of the training data: its samples, epoch by epoch."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch

from megamult.data.described import Described
from megamult.data.epochs import MOST_DOCUMENTS, EpochFiles, TokenizerFacts, open_indexed
from megamult.data.tokenizer import Tokenizer
from megamult.distributed import environment

# Seconds that a network file system may take to show one rank's index files to the others.
_SHARED_FILES_SECONDS = 60


class Source:
    """One indexed dataset and its open epochs.

    Args:
        described: description of the files.
        twin: number of the source among those with the same `Identity.order`, see :meth:`draw_as`.
        tokenizer: tokenizer that the source was encoded with.
        seq_length: number of tokens in a sample.
        seed: seed of the order of samples.
        cache_dir: directory for the index files of GPTDataset.

    Raises:
        ValueError: the source is shorter than one sample, or has more documents than Megatron's index can number.
    """

    def __init__(
        self, described: Described, twin: int, tokenizer: Tokenizer, seq_length: int, seed: int, cache_dir: Path
    ) -> None:
        # No file is opened here: the numbers of tokens and documents are in the description.
        files = described.files
        prefix = files.prefix
        if files.tokens < seq_length + 1:
            raise ValueError(
                f"data source {prefix} has {files.tokens} tokens, but one sample takes "
                f"{seq_length + 1} (seq_length + 1): prepare more text (for a valid set, a larger "
                "valid_fraction) or shorten model.seq_length"
            )
        if files.sequences > MOST_DOCUMENTS:
            raise ValueError(
                f"data source {prefix} has {files.sequences} documents, but Megatron's sample index has numbers for "
                f"only {MOST_DOCUMENTS}: prepare the source in several parts, and list the parts in data.train, each "
                "with a weight in proportion to its number of tokens"
            )
        self.prefix, self.identity, self._tokenizer, self._seq_length = (
            prefix,
            described.identity,
            tokenizer,
            seq_length,
        )
        self.samples_per_epoch = (files.tokens - 1) // seq_length
        self._seed, self._cache_dir = seed, cache_dir
        self._indexed: Any = None
        self._epochs: dict[int, Any] = {}
        self.draw_as(twin)

    def draw_as(self, twin: int) -> None:
        """Set this source's twin number, which distinguishes it from sources with the same `Identity.order`.

        The number is part of the seed, so that each of these sources shuffles differently (see `megamult.data.names`).
        """
        order, contents = self.identity.order, self.identity.contents
        key = repr((order, contents, self._tokenizer.sha256, self._seq_length, self._seed, twin))
        self.epochs = EpochFiles(
            prefix=self.prefix,
            name=order,
            seed=(self._seed, int(order[:16], 16), twin),
            seq_length=self._seq_length,
            tokenizer=TokenizerFacts(
                self._tokenizer.vocab_size, self._tokenizer.eod, self._tokenizer.unique_identifiers
            ),
            directory=str(self._cache_dir / hashlib.sha256(key.encode()).hexdigest()[:16]),
        )
        self._epochs = {}

    def keep(self, epochs: Container[int]) -> None:
        """Close all epochs that are not in `epochs`."""
        # The old dict is not changed, and is copied at once, because a thread may be reading samples.
        self._epochs = {epoch: dataset for epoch, dataset in self._epochs.copy().items() if epoch in epochs}

    def sample(self, k: int) -> dict[str, torch.Tensor]:
        """Return the source's sample `k`, after a check of its token ids."""
        epoch, place = divmod(k, self.samples_per_epoch)
        item = self.open(epoch)[place]
        tokens, labels = item["tokens"], item["labels"]
        # A vocabulary-parallel embedding masks ids that no rank holds, so a wrong id would give zeros, not an error.
        for wrong in (int(torch.min(tokens[0], labels.min())), int(torch.max(tokens[0], labels.max()))):
            if 0 <= wrong < self._tokenizer.vocab_size:
                continue
            raise ValueError(
                f"data source {self.prefix}, sample {k}: token id {wrong} is outside the vocabulary of "
                f"{self._tokenizer.vocab_size}: use the tokenizer that the corpus was prepared with, or, without a "
                "tokenizer, raise model.vocab_size"
            )
        return {"tokens": tokens, "labels": labels}

    def open(self, epoch: int, build: bool | None = None) -> Any:
        """Return the GPTDataset of one epoch, loaded from complete index files.

        Args:
            build: whether to build the files if they do not exist. If not, wait for another rank to build them. None:
                build them if there is no other rank.
        """
        if epoch in self._epochs:
            return self._epochs[epoch]
        build = environment.world_size() == 1 if build is None else build
        if build:
            self.epochs.build(epoch)
        else:
            self.wait_for(epoch)
        if self._indexed is None:
            self._indexed = open_indexed(self.prefix)
        try:
            dataset = self.epochs.load(epoch, self._indexed)
        except FileNotFoundError:
            # An older version of megamult or of Megatron wrote these files under other names.
            if not build:
                raise ValueError(
                    f"the index files in {self.epochs.path(epoch)} are those of another version: remove this "
                    "directory; it is written anew"
                ) from None
            shutil.rmtree(self.epochs.path(epoch))
            self.epochs.build(epoch)
            dataset = self.epochs.load(epoch, self._indexed)
        if len(dataset) != self.samples_per_epoch:
            raise ValueError(
                f"the index files in {self.epochs.path(epoch)} are of {len(dataset)} samples, and the epoch has "
                f"{self.samples_per_epoch}: remove this directory; it is written anew"
            )
        self._epochs[epoch] = dataset
        return dataset

    def wait_for(self, epoch: int) -> None:
        """Wait until the index files of an epoch, which another rank builds, are seen here.

        Raises:
            RuntimeError: they are not seen in time.
        """
        directory, deadline = self.epochs.path(epoch), time.monotonic() + _SHARED_FILES_SECONDS
        while not directory.exists():
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"rank {environment.rank()} does not see {directory}, which another rank builds: call prepare() "
                    f"on all ranks, and put {self._cache_dir} on a file system that all nodes share"
                )
            time.sleep(0.1)
