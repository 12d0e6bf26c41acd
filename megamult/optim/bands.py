"""A piece of a partition as few bands of rows, each with the packed multipliers that scale it. Pure.

ZeRO cuts parameters anywhere, and a fused parameter has its logical matrices in turns: rectangles are many. Those that
lie one after the other and are as wide as each other are scaled together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megamult.layout import Side
from megamult.multipliers.kernels import Span
from megamult.rectangles import Rectangle

_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Of a band at most: bounds temporary memory (of a GPU to 256 MiB), stays in a CPU's cache."""


@dataclass(frozen=True)
class Band:
    """Rows of a piece, and the packed entries that scale them; the entry after the last multiplier is 1."""

    offset: int
    """In the piece."""
    height: int
    width: int
    row: Tensor | None
    """[height] entries of row multipliers; None: no row has any. Likewise below."""
    scalar: Tensor | None
    """[height] entries of scalars."""
    scalars: tuple[Tensor, Tensor] | None
    """[count] entries of scalars, each once, and [count, height]: 1 where it scales a row, else 0."""
    col: Tensor | None
    """[vectors, width] entries of column multipliers."""
    spans: tuple[Span, ...]
    """Which of these vectors scales which rows."""

    def of(self, values: Tensor) -> Tensor:
        """[height, width] view of the band in the values [length] of its piece."""
        return values[self.offset : self.offset + self.height * self.width].view(self.height, self.width)

    def factors(self, packed: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Of the multipliers and 1: rows' own, their scalars, both joined [height]; columns' [vectors, width]."""
        row, scalar, kappa = (None if at is None else packed[at] for at in (self.row, self.scalar, self.col))
        rho = scalar if row is None else row if scalar is None else row * scalar
        return row, scalar, rho, kappa


def bands(
    found: Iterable[Rectangle], places: Mapping[tuple[int, Side], slice], one: int, here: torch.device
) -> list[Band]:
    """As few as widths and the bound of temporary memory allow; none where nothing is scaled.

    Args:
        found: the rectangles of one piece, in the order of their offsets.
        places: packed entries of each (part, side) that has multipliers.
        one: the entry that is 1.
        here: where the entries are needed.
    """
    made = (_band(together, places, one, here) for together in _together(found, _ELEMENTS[here.type]))
    return [band for band in made if band is not None]


def _together(found: Iterable[Rectangle], elements: int) -> Iterator[list[Rectangle]]:
    """Rectangles, or rows of them, that follow one another and are equally wide: so many elements, or one row."""
    together: list[Rectangle] = []
    for r in itertools.chain.from_iterable(_bounded(r, elements) for r in found):
        if together:
            first, last = together[0], together[-1]
            follows = (r.col, r.width, r.offset) == (last.col, last.width, last.offset + last.numel)
            if not follows or r.offset + r.numel - first.offset > elements:
                yield together
                together = []
        together.append(r)
    if together:
        yield together


def _bounded(r: Rectangle, elements: int) -> Iterator[Rectangle]:
    """Its rows, in rectangles of at most so many elements or one row."""
    step = max(1, elements // r.width)
    for row in range(0, r.height, step):
        height = min(step, r.height - row)
        yield Rectangle(r.part, r.row + row, r.col, height, r.width, r.offset + row * r.width)


def _band(
    together: list[Rectangle], places: Mapping[tuple[int, Side], slice], one: int, here: torch.device
) -> Band | None:
    """The band of these rectangles, unless nothing scales it."""
    row, scalar = torch.full((2, sum(r.height for r in together)), one)
    cols: dict[int, Tensor] = {}
    spans, stop = [], 0
    for r in together:
        start, stop = stop, stop + r.height
        if (of_rows := places.get((r.part, "row"))) is not None:
            row[start:stop] = of_rows.start + r.row + torch.arange(r.height)
        if (of_all := places.get((r.part, "scalar"))) is not None:
            scalar[start:stop] = of_all.start
        if (of_cols := places.get((r.part, "col"))) is not None:
            cols.setdefault(r.part, of_cols.start + r.col + torch.arange(r.width))
        spans.append(Span(start, stop, list(cols).index(r.part) if of_cols is not None else None))
    has_rows, entries = bool((row != one).any()), scalar[scalar != one].unique()
    if not (has_rows or cols or len(entries)):
        return None
    return Band(
        together[0].offset,
        len(row),
        together[0].width,
        row.to(here) if has_rows else None,
        scalar.to(here) if len(entries) else None,
        (entries.to(here), (scalar == entries[:, None]).float().to(here)) if len(entries) else None,
        torch.stack(list(cols.values())).to(here) if cols else None,
        tuple(spans),
    )
