"""Work that every rank does, and whose failure on one rank all get to know."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megamult.distributed.mesh import Mesh

Result = TypeVar("Result")


def on_every_rank(mesh: Mesh, do: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """Run `do` on every rank, and let all know where it fails. Collective over all ranks.

    Returns:
        (its result, None) if no rank raises ValueError or OSError, else (None, the first such rank's message).
    """
    result, message = None, None
    try:
        result = do()
    except (ValueError, OSError) as error:
        message = str(error)
    first = next((each for each in mesh.gather_objects(message) if each is not None), None)
    return (result, None) if first is None else (None, str(first))
