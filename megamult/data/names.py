"""Names of data sources in a run's checkpoints, by which a run that resumes recognizes its sources.

A name is the source's `Identity.order` and its twin number. Several sources can share an `Identity.order` (the same
corpus given twice, or corpora whose documents have the same lengths). Their twin numbers differ, so that each of them
shuffles differently. When sources are first used, their twin numbers follow their positions in the blend. From then on
a source with the same contents keeps its twin number, whatever its position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from megamult.data.identity import Identity


@dataclass(frozen=True)
class Names:
    """Names of the sources of a blend, in the order of the blend.

    Attributes:
        twins: twin number of each source, from 0. Sources that share an `Identity.order` have different ones.
        names: name of each source.
        contents: mapping from name to `Identity.contents`, for these sources and all that the run had before.
    """

    twins: list[int]
    names: list[str]
    contents: dict[str, str]

    @staticmethod
    def fresh(identities: Sequence[Identity]) -> Names:
        """Name a new run's sources. Those with the same `Identity.order` are twins, and are numbered in the order of
        the blend to tell them apart."""
        return Names.resumed(identities, [], {})

    @staticmethod
    def resumed(identities: Sequence[Identity], known: Sequence[str], contents: Mapping[str, str]) -> Names:
        """Name the sources of a run that resumes.

        Args:
            known: names of all sources that the run has had so far.
            contents: mapping from name to `Identity.contents`. A name is missing if an older version of megamult wrote
                the checkpoint.

        Returns:
            Names of the sources. A source whose contents the run has read before keeps its name. A known name that
            `contents` lacks is given to a source whose `Identity.order` is the one in the name. A new source gets a
            twin number that no earlier source with its `Identity.order` has had.
        """
        by_order: dict[str, list[str]] = {}  # the run's names of each order, by twin number; blends have thousands
        for each in sorted(known, key=_twin):
            by_order.setdefault(each.rpartition(".")[0], []).append(each)
        taken: dict[int, str] = {}
        used: set[str] = set()  # values of `taken`
        for sure in (True, False):
            for position, identity in enumerate(identities):
                if position in taken:
                    continue
                fits = {identity.contents} if sure else {None}
                free = (n for n in by_order.get(identity.order, ()) if contents.get(n) in fits and n not in used)
                name = next(free, None)
                if name is not None:
                    taken[position] = name
                    used.add(name)
        used.update(known)
        for position, identity in enumerate(identities):
            if position not in taken:
                taken[position] = next(name for number in count() if (name := f"{identity.order}.{number}") not in used)
                used.add(taken[position])
        names = [taken[position] for position in range(len(identities))]
        mine = {name: identity.contents for name, identity in zip(names, identities, strict=True)}
        return Names([_twin(name) for name in names], names, {**contents, **mine})


def _twin(name: str) -> int:
    return int(name.rpartition(".")[2])
