"""The samples that training reads: weighted sources, each a Megatron `GPTDataset` per epoch.

A GPTDataset orders its documents by how many epochs it is asked for, so one that covers a whole run changes when the
run gets longer. Here each (source, epoch) is a dataset of exactly one epoch with a seed of its own. Sample k of a
source is then a function of (seed, source, k) only, wherever the source stands in a blend, and a run resumes at any
sample without a state. A source is known by its contents.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megamult.data.ahead import BuildsAhead
from megamult.data.blend import Blend
from megamult.data.described import Described, describe
from megamult.data.epochs import MOST_DOCUMENTS, EpochFiles, TokenizerFacts, open_indexed
from megamult.data.names import Names
from megamult.data.tokenizer import Tokenizer
from megamult.distributed import environment

# How long a network file system may take to show rank 0's index files to the other ranks.
_SHARED_FILES_SECONDS = 60


class BlendedDataset:
    """Global sample i -> {"tokens": i64[seq], "labels": i64[seq]}, labels[t] being the token after tokens[t].

    `sources` are (prefix of .bin/.idx, positive weight); weights are relative. Sample i is sample k of the source that
    `Blend.locate` names, found in epoch k // samples_per_epoch at place k % samples_per_epoch. Each epoch shuffles the
    documents, cuts them into samples of seq_length tokens (one more is read for the last label) and shuffles those. The
    last, incomplete sample of an epoch is left out; no sample is padded, none is masked.

    In a distributed run call `prepare` on all ranks before reading; a single process may skip it. A thread may read
    prepared samples while another one prepares.

    Args:
        cache_dir: where GPTDataset keeps its index files, on a file system that all ranks see. Files are keyed by
            source contents, seed, seq_length and tokenizer, so a directory may be used again and by several runs.
        described: the result of `describe` for each prefix, if it is known already.

    Raises:
        ValueError: bad weights, damaged files or another tokenizer's (see `describe`), a source shorter than one
            sample, or one with more documents than Megatron's index holds.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, float]],
        tokenizer: Tokenizer,
        seq_length: int,
        seed: int,
        cache_dir: str | Path,
        described: Mapping[str, Described] | None = None,
    ) -> None:
        if seq_length < 1:
            raise ValueError(f"seq_length is {seq_length}: give at least 1 token")
        self._weights = [float(weight) for _, weight in sources]
        self.blend = Blend(self._weights)
        self._origin = 0  # global sample with which the present blend began,
        self._first = [0] * len(sources)  # and each source's sample there
        self._left: dict[str, int] = {}  # next samples of sources that an earlier blend had
        found = described or {prefix: describe(prefix, tokenizer) for prefix, _ in sources}
        each = [found[prefix] for prefix, _ in sources]
        self._names = Names.fresh([one.identity for one in each])
        cache = Path(cache_dir)
        self._sources = [
            _Source(one, twin, tokenizer, seq_length, seed, cache)
            for one, twin in zip(each, self._names.twins, strict=True)
        ]
        self._prepared: set[tuple[int, int]] = set()
        self._look_ahead = False
        self._ahead = BuildsAhead()

    @property
    def samples_per_epoch(self) -> list[int]:
        """Samples in one epoch of each source."""
        return [source.samples_per_epoch for source in self._sources]

    def prepare(self, first: int, last: int, barrier: Callable[[], None] | None = None, end: int | None = None) -> None:
        """Open every (source, epoch) that the samples [first, last) touch and close all others.

        Global rank 0 builds the index files that do not exist yet, then `barrier` is called, then the other ranks load
        them. All ranks must make the same calls; where nothing new is touched there is neither work nor a barrier.

        Args:
            end: sample before which the run will end. Index files of each source's next epoch are then built in the
                background; None: each is built when it is needed.

        Raises:
            RuntimeError: rank 0's index files do not appear on this rank (cache_dir is not shared).
        """
        needed = self._touched(first, last)
        new = sorted(needed - self._prepared)
        if new:
            # The barrier is reached even if building fails: rank 0's error is then the one that is seen.
            try:
                if environment.rank() == 0:
                    for position, epoch in new:
                        self._ahead.wait_for(self._sources[position].epochs, epoch)
                        self._sources[position].open(epoch)
            finally:
                if barrier is not None:
                    barrier()
            for position, epoch in new:
                self._sources[position].open(epoch)
        if needed != self._prepared:
            for position, source in enumerate(self._sources):
                source.keep({epoch for p, epoch in needed if p == position})
            self._prepared, self._look_ahead = needed, True
        if self._look_ahead and end is not None and environment.rank() == 0 and not self._ahead.busy:
            self._look_ahead = False
            self._ahead.start(self._next_epochs(last, end))

    def _touched(self, first: int, last: int) -> set[tuple[int, int]]:
        """Return (position of the source, epoch) of every epoch that the samples [first, last) belong to."""
        touched: set[tuple[int, int]] = set()
        counts = zip(self._positions(first), self._positions(last), self._sources, strict=True)
        for position, (start, stop, source) in enumerate(counts):
            if stop > start:
                epochs = range(start // source.samples_per_epoch, (stop - 1) // source.samples_per_epoch + 1)
                touched.update((position, epoch) for epoch in epochs)
        return touched

    def _next_epochs(self, last: int, end: int) -> list[tuple[EpochFiles, int]]:
        """Return, for each source, the first epoch that is not prepared, if samples [last, end) need it; the one
        that is needed soonest comes first."""
        found = []
        for position, (reached, stop, share) in enumerate(
            zip(self._positions(last), self._positions(end), self._weights, strict=True)
        ):
            source = self._sources[position]
            epoch = max(
                (e + 1 for p, e in self._prepared if p == position), default=reached // source.samples_per_epoch
            )
            if epoch * source.samples_per_epoch < stop:
                away = (epoch * source.samples_per_epoch - reached) / share
                found.append((away, position, epoch))
        return [(self._sources[position].epochs, epoch) for _, position, epoch in sorted(found)]

    def close(self) -> None:
        """End the background process that builds index files."""
        self._ahead.close()

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
        """State that a checkpoint holds, beside the number of samples, to continue with every source's next sample."""
        sources = zip(self._names.names, self._weights, self._first, strict=True)
        return {
            "origin": self._origin,
            "sources": [{"source": name, "weight": w, "first": first} for name, w, first in sources],
            "left": self._left,
            "contents": self._names.contents,
        }

    def load_state_dict(self, state: dict[str, Any], samples: int) -> list[str]:
        """Continue a run that left `state`, from global sample `samples` on. Call it before preparing or reading.

        With the same sources and weights the same blend continues. Otherwise a new blend begins here, in which each
        source that the run had continues with its next sample, and new ones begin with their first.

        Returns:
            Lines for the user: sources that are new to the run, sources that are left out from here on, and what an
            older checkpoint does not hold.
        """
        saved = state["sources"]
        known = [*(each["source"] for each in saved), *state["left"]]
        contents: dict[str, str] = state.get("contents", {})
        self._names = Names.resumed([source.identity for source in self._sources], known, contents)
        for source, twin in zip(self._sources, self._names.twins, strict=True):
            source.draw_as(twin)
        notes = []
        if any(name not in contents for name in known):
            notes.append(
                "the checkpoint holds no digests of the tokens: its data sources are recognized by their sizes and by "
                "where their documents start"
            )
        for name, source in zip(self._names.names, self._sources, strict=True):
            if name not in known:
                notes.append(f"data source {source.prefix} is new to this run and begins with its first sample")
        names = set(self._names.names)
        gone = sum(each["source"] not in names for each in saved)
        if gone:
            notes.append(f"{gone} of the {len(saved)} data sources that the run had are not in its blend any more")
        mine = list(zip(self._names.names, self._weights, strict=True))
        if [(each["source"], each["weight"]) for each in saved] == mine:
            self._origin, self._first = state["origin"], [each["first"] for each in saved]
            self._left = state["left"]
            return notes
        counts = Blend([each["weight"] for each in saved]).counts(samples - state["origin"])
        reached = state["left"] | {
            each["source"]: each["first"] + count for each, count in zip(saved, counts, strict=True)
        }
        self._origin = samples
        self._first = [reached.pop(name, 0) for name in self._names.names]
        self._left = reached
        return notes


class _Source:
    """One indexed dataset and its open epochs."""

    def __init__(
        self, described: Described, twin: int, tokenizer: Tokenizer, seq_length: int, seed: int, cache_dir: Path
    ) -> None:
        """Open nothing yet; `twin` is that of `draw_as`."""
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
                f"data source {prefix} has {files.sequences} documents, and Megatron's sample index numbers at most "
                f"{MOST_DOCUMENTS}: prepare it in several parts, and list them in data.train with weights in "
                "proportion to their tokens"
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
        """Shuffle as the `twin`-th of the sources that share an `Identity.order`: each shuffles in its own way."""
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

    def keep(self, epochs: set[int]) -> None:
        """Close all other epochs."""
        # A new mapping: a thread may be reading from the old one.
        self._epochs = {epoch: dataset for epoch, dataset in self._epochs.items() if epoch in epochs}

    def sample(self, k: int) -> dict[str, torch.Tensor]:
        """The source's sample `k`, its token ids checked."""
        epoch, place = divmod(k, self.samples_per_epoch)
        item = self.open(epoch)[place]
        tokens, labels = item["tokens"], item["labels"]
        # Vocabulary-parallel embeddings mask the ids they look up: a wrong one would be zeros, not an error.
        for wrong in (int(torch.min(tokens[0], labels.min())), int(torch.max(tokens[0], labels.max()))):
            if 0 <= wrong < self._tokenizer.vocab_size:
                continue
            raise ValueError(
                f"data source {self.prefix}, sample {k}: token id {wrong} is outside the vocabulary of "
                f"{self._tokenizer.vocab_size}: use the tokenizer that the corpus was prepared with"
            )
        return {"tokens": tokens, "labels": labels}

    def open(self, epoch: int) -> Any:
        """The GPTDataset of one epoch, loaded from complete index files; global rank 0 builds them first."""
        if epoch in self._epochs:
            return self._epochs[epoch]
        if environment.rank() == 0:
            self.epochs.build(epoch)
        else:
            _wait_for(self.epochs.path(epoch), self._cache_dir)
        if self._indexed is None:
            self._indexed = open_indexed(self.prefix)
        dataset = self.epochs.load(epoch, self._indexed)
        assert len(dataset) == self.samples_per_epoch, (len(dataset), self.samples_per_epoch)
        self._epochs[epoch] = dataset
        return dataset


def _wait_for(directory: Path, cache_dir: Path) -> None:
    deadline = time.monotonic() + _SHARED_FILES_SECONDS
    while not directory.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"rank {environment.rank()} does not see {directory}, which rank 0 builds: "
                f"call prepare() on all ranks, and put {cache_dir} on a file system that all nodes share"
            )
        time.sleep(0.1)
