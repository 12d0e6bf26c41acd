"""Work that every rank does. If it fails on one rank, all ranks are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megamult.distributed.mesh import Mesh

Result = TypeVar("Result")


def on_every_rank(mesh: Mesh, do: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """Run `do` on every rank, and tell all ranks if it failed on one of them. Collective over all ranks.

    Returns:
        (result of `do` on this rank, None) if `do` raised no ValueError or OSError on any rank, else (None, message of
        the error on the first rank that raised one).
    """
    result, message = None, None
    try:
        result = do()
    except (ValueError, OSError) as error:
        message = str(error)
    first = next((each for each in mesh.gather_objects(message) if each is not None), None)
    return (result, None) if first is None else (None, str(first))
