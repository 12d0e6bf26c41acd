"""The samples that training reads. They come from weighted sources, and each epoch of a source is a `GPTDataset`.

The order of documents in Megatron's GPTDataset depends on the number of epochs that it covers. If one GPTDataset
covered a whole run, the order would change when the run gets longer. Here each (source, epoch) is a GPTDataset of
exactly one epoch, with its own seed. Sample k of a source is then a function of (seed, source, k) only. It does not
depend on the source's position in a blend, and a run can resume at any sample without reading the samples before it.
A source is identified by the contents of its files, not by their path.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megamult.data.ahead import BuildsAhead
from megamult.data.blend import Blend
from megamult.data.described import Described, describe
from megamult.data.epochs import EpochFiles
from megamult.data.names import Names
from megamult.data.skip import NOTHING, Skip, changes_of_the_past
from megamult.data.source import Source
from megamult.data.tokenizer import Tokenizer
from megamult.distributed import environment


class BlendedDataset:
    """Dataset that maps global sample i to {"tokens": i64[seq], "labels": i64[seq]}.

    labels[t] is the token after tokens[t].

    `Blend.locate` maps sample i to sample k of a source, which is sample k % samples_per_epoch of the source's epoch
    k // samples_per_epoch. Each epoch shuffles the documents, cuts them into samples of seq_length tokens (one more
    token is read for the last label) and shuffles the samples. The last, incomplete sample of an epoch is left out. No
    sample is padded or masked. With `skip`, sample i is the one at position `skip.position(i)` of this order.

    In a distributed run, call `prepare` on all ranks before reading. A single process may skip it. A thread may read
    prepared samples while another thread prepares further samples.

    Args:
        sources: (prefix of .bin and .idx, positive weight) of each source. Weights are relative.
        cache_dir: directory for the index files of GPTDataset, on a file system that all ranks see. Files are keyed by
            source contents, seed, seq_length and tokenizer, so several runs may use the same directory.
        skip: ranges of positions that are left out.
        described: the result of `describe` for each prefix, if it is known already.

    Raises:
        ValueError: weights are bad, files are damaged or do not fit the tokenizer (see `describe`), or a source is
            shorter than one sample or has more documents than Megatron's index can number.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, float]],
        tokenizer: Tokenizer,
        seq_length: int,
        seed: int,
        cache_dir: str | Path,
        skip: Skip = NOTHING,
        described: Mapping[str, Described] | None = None,
    ) -> None:
        if seq_length < 1:
            raise ValueError(f"seq_length is {seq_length}: give at least 1 token")
        self._weights = [float(weight) for _, weight in sources]
        self.blend = Blend(self._weights)
        # Steps ask for the same counts several times, and with thousands of sources each takes milliseconds.
        self._counts = functools.lru_cache(maxsize=8)(self.blend.counts)
        self._skip = skip
        self._origin = 0  # the present blend began with the sample at this position
        self._first = [0] * len(sources)  # for each source, its next sample when the present blend began
        self._left: dict[str, int] = {}  # name of a source that only earlier blends had -> its next sample
        found = described or {prefix: describe(prefix, tokenizer) for prefix, _ in sources}
        each = [found[prefix] for prefix, _ in sources]
        self._names = Names.fresh([one.identity for one in each])
        cache = Path(cache_dir)
        self._sources = [
            Source(one, twin, tokenizer, seq_length, seed, cache)
            for one, twin in zip(each, self._names.twins, strict=True)
        ]
        self._prepared: set[tuple[int, int]] = set()
        self._look_ahead = False
        self._ahead = BuildsAhead()

    @property
    def weights(self) -> list[float]:
        """Weight of each source, as given."""
        return list(self._weights)

    @property
    def samples_per_epoch(self) -> list[int]:
        """Number of samples in one epoch of each source."""
        return [source.samples_per_epoch for source in self._sources]

    def prepare(self, first: int, last: int, barrier: Callable[[], None] | None = None, end: int | None = None) -> None:
        """Make the index files of every (source, epoch) that has some of the samples [first, last).

        Ranks share the work of building those that do not exist yet: each source is one rank's. Then `barrier` is
        called. A rank opens the files of a source when it reads its first sample of it, and closes epochs that lie
        before or after these samples. All ranks must make the same calls. If no new epoch is needed, there is no work
        and no barrier.

        Args:
            end: sample before which the run will end. If it is given, the index files of each source's next epoch are
                built in the background, provided that a sample before `end` needs this epoch. If it is None, index
                files are built only when an epoch is needed, and all ranks wait for them.

        Raises:
            RuntimeError: index files of another rank do not appear on this rank, for example because cache_dir is not
                shared.
        """
        spans = self._skip.spans(first, last)
        self._make({each for span in spans for each in self._touched(*span)}, barrier)
        self._keep(self._skip.position(first), self._skip.reached(last))
        if self._look_ahead and end is not None and not self._ahead.busy:
            self._look_ahead = False
            self._ahead.start(self._next_epochs(self._skip.reached(last), self._skip.reached(end)))

    def prepare_first_epochs(self, barrier: Callable[[], None] | None = None) -> None:
        """Make the index files of every source's first epoch. All ranks must make the same calls.

        Raises:
            RuntimeError: see :meth:`prepare`.
        """
        self._make({(position, 0) for position in range(len(self._sources))}, barrier)

    def _is_mine(self, position: int) -> bool:
        """Return whether this rank builds the index files of the source at `position`."""
        return position % environment.world_size() == environment.rank()

    def _make(self, needed: set[tuple[int, int]], barrier: Callable[[], None] | None) -> None:
        """Make the index files of the needed (position of the source, epoch)."""
        new = sorted(needed - self._prepared)
        if not new:
            return
        # The barrier is called even if building fails, so that this rank's error is the one that the user sees.
        try:
            for position, epoch in new:
                if self._is_mine(position):
                    self._ahead.wait_for(self._sources[position].epochs, epoch)
                    self._sources[position].open(epoch, build=True)
        finally:
            if barrier is not None:
                barrier()
        # A look at one of them shows whether this rank sees what others build. All ranks looking at all of them would
        # be thousands of requests to a file server from each rank.
        position, epoch = new[0]
        self._sources[position].wait_for(epoch)
        self._prepared |= needed
        self._look_ahead = True

    def _keep(self, first: int, last: int) -> None:
        """Close all epochs that lie before or after the positions [first, last)."""
        spans = [
            range(start // source.samples_per_epoch, stop // source.samples_per_epoch + 1)
            for start, stop, source in zip(self._positions(first), self._positions(last), self._sources, strict=True)
        ]
        past = {(position, epoch) for position, epoch in self._prepared if epoch not in spans[position]}
        self._prepared -= past
        for position in {position for position, _ in past}:
            self._sources[position].keep(spans[position])

    def _touched(self, first: int, last: int) -> set[tuple[int, int]]:
        """Return (index of the source, epoch) of every epoch with some of the samples at positions [first, last)."""
        touched: set[tuple[int, int]] = set()
        counts = zip(self._positions(first), self._positions(last), self._sources, strict=True)
        for position, (start, stop, source) in enumerate(counts):
            if stop > start:
                epochs = range(start // source.samples_per_epoch, (stop - 1) // source.samples_per_epoch + 1)
                touched.update((position, epoch) for epoch in epochs)
        return touched

    def _next_epochs(self, last: int, end: int) -> list[tuple[EpochFiles, int]]:
        """Return, for each source whose index files this rank builds, its first epoch that is not yet prepared, if
        samples [last, end) need that epoch.

        The epoch that is needed soonest comes first.
        """
        found, prepared = [], dict[int, int]()
        for position, epoch in self._prepared:
            prepared[position] = max(epoch + 1, prepared.get(position, 0))
        for position, (reached, stop, share) in enumerate(
            zip(self._positions(last), self._positions(end), self._weights, strict=True)
        ):
            source = self._sources[position]
            epoch = prepared.get(position, reached // source.samples_per_epoch)
            if self._is_mine(position) and epoch * source.samples_per_epoch < stop:
                away = (epoch * source.samples_per_epoch - reached) / share
                found.append((away, position, epoch))
        return [(self._sources[position].epochs, epoch) for _, position, epoch in sorted(found)]

    def close(self) -> None:
        """End the background process that builds index files."""
        self._ahead.close()

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """Return global sample `i` >= 0.

        Raises:
            ValueError: the sample holds a token id outside the tokenizer's vocabulary.
        """
        at = self._skip.position(i)
        if at < self._origin:
            raise IndexError(f"sample {at} does not exist: the present blend begins with sample {self._origin}")
        position, k = self.blend.locate(at - self._origin)
        return self._sources[position].sample(self._first[position] + k)

    def first_epoch_sample(self, position: int, k: int) -> dict[str, torch.Tensor]:
        """Return sample `k` of the first epoch of the source at `position`, whatever the blend.

        Raises:
            ValueError: the sample holds a token id outside the tokenizer's vocabulary.
        """
        if not 0 <= k < self._sources[position].samples_per_epoch:
            raise IndexError(f"sample {k} is not in the first epoch")
        return self._sources[position].sample(k)

    def samples_read(self, last: int) -> list[int]:
        """Return, for each source, how many of its samples the run has read when it has read `last` samples in all.

        Samples of earlier blends of a resumed run count too, except that those that they left out count as read.
        """
        end = max(self._skip.reached(last), self._origin)
        read = self._positions(end)
        for first, stop in ((first, final + 1) for first, final in self._skip.ranges if self._origin <= first < end):
            for source, (before, after) in enumerate(zip(self._positions(first), self._positions(stop), strict=True)):
                read[source] -= after - before
        return read

    def _positions(self, i: int) -> list[int]:
        """Return, for each source, how many of its samples come before position `i`, left out or not."""
        return [first + count for first, count in zip(self._first, self._counts(i - self._origin), strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which a resumed run continues with the next sample of every source.

        A checkpoint stores this state and the number of samples that the run has consumed.
        """
        sources = zip(self._names.names, self._weights, self._first, strict=True)
        return {
            "origin": self._origin,
            "sources": [{"source": name, "weight": w, "first": first} for name, w, first in sources],
            "left": self._left,
            "contents": self._names.contents,
            "skip": [list(each) for each in self._skip.ranges],
        }

    def load_state_dict(self, state: dict[str, Any], samples: int) -> list[str]:
        """Continue the run that saved `state` after its first `samples` samples. Call this before preparing or reading.

        If the sources and weights are the same, the blend continues. Otherwise a new blend begins at this sample. In
        the new blend, sources from before continue with their next sample, and new sources begin with their first.

        Returns:
            Lines for the user: which sources are new to the run, how many of its earlier sources are left out from here
            on, and whether the checkpoint lacks digests of tokens, as checkpoints of older versions of megamult do.

        Raises:
            ValueError: this run leaves out samples that it has trained on, or has left out other ones before.
        """
        old = Skip.of(state.get("skip", ()))
        if changed := changes_of_the_past(self._skip, old, samples):
            raise ValueError(f"{'; '.join(changed)}: set data.skip back")
        samples = old.reached(samples)
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
