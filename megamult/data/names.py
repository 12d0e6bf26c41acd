"""Names of data sources in a run's checkpoints, and how a run that resumes finds its sources again.

A name is the source's `Identity.order` and a number, its twin. Several sources can share an `Identity.order` (the same
corpus given twice, or corpora whose documents have the same lengths), and the twin makes each of them shuffle in its
own way. Twins are numbered by position in the blend when the sources are first used; from then on the number belongs to
the source's contents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from megamult.data.identity import Identity


@dataclass(frozen=True)
class Names:
    """Names of the sources of a blend, in its order.

    Attributes:
        twins: each source's number among the sources with the same `Identity.order`.
        names: each source's name.
        contents: name -> `Identity.contents`, of these sources and of all that the run had before.
    """

    twins: list[int]
    names: list[str]
    contents: dict[str, str]

    @staticmethod
    def fresh(identities: Sequence[Identity]) -> Names:
        """Name a new run's sources, numbering twins by position."""
        return Names.resumed(identities, [], {})

    @staticmethod
    def resumed(identities: Sequence[Identity], known: Sequence[str], contents: Mapping[str, str]) -> Names:
        """Name the sources of a run that resumes.

        Args:
            known: names of all sources that the run has had.
            contents: name -> `Identity.contents`, as far as the checkpoint holds them; older ones do not.

        Returns:
            Names that give each source the name that the run had for its contents. Where the contents are unknown, the
            `Identity.order` decides; a new source takes a number that no other has had.
        """
        taken: dict[int, str] = {}
        for sure in (True, False):
            for position, identity in enumerate(identities):
                if position in taken:
                    continue
                fits = {identity.contents} if sure else {None}
                free = (
                    name
                    for name in sorted(known, key=_twin)
                    if name.rpartition(".")[0] == identity.order
                    and contents.get(name) in fits
                    and name not in taken.values()
                )
                name = next(free, None)
                if name is not None:
                    taken[position] = name
        for position, identity in enumerate(identities):
            if position not in taken:
                used = {*known, *taken.values()}
                taken[position] = next(name for number in count() if (name := f"{identity.order}.{number}") not in used)
        names = [taken[position] for position in range(len(identities))]
        mine = {name: identity.contents for name, identity in zip(names, identities, strict=True)}
        return Names([_twin(name) for name in names], names, {**contents, **mine})


def _twin(name: str) -> int:
    return int(name.rpartition(".")[2])
