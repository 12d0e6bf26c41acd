"""The names under which a run's checkpoints know its sources of data, and how a run that goes on finds them again.

A name is the source's `Identity.order` and a number, its twin: several sources can share an order (the same corpus
given twice, or corpora whose documents have the same lengths), and each draws its samples in an order of its own. Which
of them has which number depends on where they stood in the blend when they first came; from then on it stays with their
contents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from megamult.data.identity import Identity


@dataclass(frozen=True)
class Names:
    """Names of the sources of a blend, in its order.

    Attributes:
        twins: each source's number among those of the same order.
        names: each source's name.
        contents: name -> `Identity.contents`, of these sources and of those that the run had before.
    """

    twins: list[int]
    names: list[str]
    contents: dict[str, str]

    @staticmethod
    def fresh(identities: Sequence[Identity]) -> "Names":
        """Names of a new run's sources: twins are numbered as they stand."""
        return Names.resumed(identities, [], {})

    @staticmethod
    def resumed(identities: Sequence[Identity], known: Sequence[str], contents: Mapping[str, str]) -> "Names":
        """Names in a run that goes on.

        Args:
            known: names of all sources that the run has had.
            contents: name -> `Identity.contents`, as far as a checkpoint says it; older ones do not.

        Returns:
            Names in which a source has the name that the run knew its contents by. Where contents are not known its
            order decides; a source that is new takes a number that no other has had.
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
