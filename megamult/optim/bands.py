"""A piece of a partition as few bands of rows, each with the packed multipliers that scale it. Pure.

ZeRO cuts parameters anywhere, and a fused parameter has its logical matrices in turns: rectangles are many. Those that
lie one after the other and are as wide as each other are scaled together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megamult.multipliers.kernels import Span
from megamult.parameters.rectangles import Rectangle
from megamult.parameters.spec import Side

_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Most elements of a band: bounds temporary memory (of a GPU to 256 MiB), stays in a CPU's cache."""


@dataclass(frozen=True)
class Band:
    """Rows of a piece, and the packed entries that scale them; the entry after the last multiplier is 1."""

    offset: int
    """Position of the first element in the piece."""
    height: int
    width: int
    row: Tensor
    """[height] entries of row multipliers; 1's where a row has none. Likewise below."""
    scalar: Tensor
    """[height] entries of scalars."""
    has_rho: bool
    """Whether any row has a row multiplier or a scalar."""
    scalars: tuple[Tensor, Tensor] | None
    """[count] entries of scalars, each once, and [count, height]: 1 where it scales a row, else 0."""
    col: Tensor
    """[vectors, width] entries of column multipliers."""
    spans: tuple[Span, ...]
    """Rows that each of these vectors scales."""

    def of(self, values: Tensor) -> Tensor:
        """[height, width] view of the band in the values [length] of its piece."""
        return values[self.offset : self.offset + self.height * self.width].view(self.height, self.width)


class Factors(NamedTuple):
    """The multipliers of all rows of a table's bands, one band after the other, and those of each band."""

    row: Tensor
    """[rows] row multipliers; 1 where a row has none. Likewise below."""
    scalar: Tensor
    """[rows] scalars."""
    bands: list[tuple[Tensor | None, Tensor | None]]
    """rho [height], the product of both, and kappa [vectors, width], the column multipliers; None: all are 1."""


class Table:
    """Entries of the rows and columns of many bands, so that their multipliers are looked up together.

    Args:
        bands: in the order in which they are worked on.
        here: where the entries are needed.
    """

    def __init__(self, bands: Sequence[Band], here: torch.device) -> None:
        nothing = [torch.empty(0, dtype=torch.long)]
        self.rows = torch.cat([band.row for band in bands] or nothing).to(here)
        """[rows]: the entry of each row's multiplier."""
        self._scalars = torch.cat([band.scalar for band in bands] or nothing).to(here)
        self._cols = torch.cat([band.col.view(-1) for band in bands] or nothing).to(here)
        self._heights = [band.height for band in bands]
        self._widths = [band.col.numel() for band in bands]
        rows, scalars = self.rows.split(self._heights), self._scalars.split(self._heights)
        cols = self._cols.split(self._widths)
        self.bands = [
            replace(
                band,
                row=row,
                scalar=scalar,
                col=col.view(-1, band.width),
                scalars=None if band.scalars is None else (band.scalars[0].to(here), band.scalars[1].to(here)),
            )
            for band, row, scalar, col in zip(bands, rows, scalars, cols, strict=True)
        ]
        """The bands, whose entries are views of the table's."""

    def factors(self, packed: Tensor) -> Factors:
        """Look the multipliers up: four kernels for all bands.

        Args:
            packed: [entries + 1] multipliers and 1.
        """
        row, scalar = packed[self.rows], packed[self._scalars]
        rhos = (row * scalar).split(self._heights)
        kappas = packed[self._cols].split(self._widths)
        by_band = [
            (rho if band.has_rho else None, kappa.view(-1, band.width) if kappa.numel() else None)
            for band, rho, kappa in zip(self.bands, rhos, kappas, strict=True)
        ]
        return Factors(row, scalar, by_band)

    def by_band(self, rows: Tensor) -> tuple[Tensor, ...]:
        """[height] views of values of all rows."""
        return rows.split(self._heights)


def bands(
    found: Iterable[Rectangle], places: Mapping[tuple[int, Side], slice], one: int, device_type: str
) -> list[Band]:
    """Make as few as widths and the bound of temporary memory allow; none where nothing is scaled.

    Args:
        found: the rectangles of one piece, in the order of their offsets.
        places: packed entries of each (part, side) that has multipliers.
        one: the entry that is 1.
        device_type: cpu or cuda, where the piece is.
    """
    made = (_band(together, places, one) for together in _together(found, _ELEMENTS[device_type]))
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


def _band(together: list[Rectangle], places: Mapping[tuple[int, Side], slice], one: int) -> Band | None:
    """Return the band of these rectangles; None: nothing scales it."""
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
    entries = scalar[scalar != one].unique()
    has_rho = bool((row != one).any()) or len(entries) > 0
    if not (has_rho or cols):
        return None
    width = together[0].width
    return Band(
        together[0].offset,
        len(row),
        width,
        row,
        scalar,
        has_rho,
        (entries, (scalar == entries[:, None]).float()) if len(entries) else None,
        torch.stack(list(cols.values())) if cols else torch.empty(0, width, dtype=torch.long),
        tuple(spans),
    )
