"""Bands: groups of rows of one piece of a partition that are scaled by multipliers together. Pure.

ZeRO cuts parameters anywhere, and a fused parameter interleaves its logical matrices, so a piece can consist of many
rectangles. Consecutive rectangles of equal width become one band, so that a piece has few.
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
"""Largest number of elements in a band: bounds temporary memory (256 MiB on a GPU), and fits into a CPU's cache."""


@dataclass(frozen=True)
class Band:
    """Rows of a piece, and the indices of their multipliers in the packed vector.

    An *entry* is such an index. The packed vector ends with a 1, whose entry stands for "no multiplier".
    """

    offset: int
    """Position of the band's first element in the piece."""
    height: int
    width: int
    row: Tensor
    """[height] entries of the row multipliers; the entry of the 1 where a row has none, here and below."""
    scalar: Tensor
    """[height] entries of the scalars."""
    has_rho: bool
    """Whether any row has a row multiplier or a scalar."""
    scalars: tuple[Tensor, Tensor] | None
    """[count] distinct entries of scalars, and a mask [count, height]: 1 where that scalar scales the row, else 0."""
    col: Tensor
    """[vectors, width] entries of the column multipliers."""
    spans: tuple[Span, ...]
    """Spans of rows, each with the index of the column vector that scales it."""

    def of(self, values: Tensor) -> Tensor:
        """Return the view [height, width] of this band in `values`, the [length] values of its piece."""
        return values[self.offset : self.offset + self.height * self.width].view(self.height, self.width)


class Factors(NamedTuple):
    """Values of the multipliers of a table's bands: those of all rows, one band after the other, and band by band."""

    row: Tensor
    """[rows] row multipliers; 1 where a row has none, here and below."""
    scalar: Tensor
    """[rows] scalars."""
    bands: list[tuple[Tensor | None, Tensor | None]]
    """(rho [height], kappa [vectors, width]) of each band: rho is row multiplier times scalar, kappa the column
    multipliers; None where all are 1."""


class Table:
    """Entries of the rows and columns of many bands, concatenated so that few kernels look up all multipliers.

    Args:
        bands: bands in the order in which they are processed.
        here: device that the entries are needed on.
    """

    def __init__(self, bands: Sequence[Band], here: torch.device) -> None:
        nothing = [torch.empty(0, dtype=torch.long)]
        self.rows = torch.cat([band.row for band in bands] or nothing).to(here)
        """[rows] entry of each row's row multiplier."""
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
        """Bands whose entries are views of the table's."""

    def factors(self, packed: Tensor) -> Factors:
        """Look up the multipliers of all bands, with four kernels.

        Args:
            packed: [entries + 1] multipliers, then 1.
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
        """Split values [rows] of all rows into views [height], one for each band."""
        return rows.split(self._heights)


def bands(
    found: Iterable[Rectangle], places: Mapping[tuple[int, Side], slice], one: int, device_type: str
) -> list[Band]:
    """Make as few bands of a piece as widths and the bound on temporary memory allow; skip rows that nothing scales.

    Args:
        found: the rectangles of one piece, in the order of their offsets.
        places: the range of packed entries of each (part, side) that has multipliers.
        one: the entry of the 1.
        device_type: cpu or cuda: the device of the piece.
    """
    made = (_band(together, places, one) for together in _together(found, _ELEMENTS[device_type]))
    return [band for band in made if band is not None]


def _together(found: Iterable[Rectangle], elements: int) -> Iterator[list[Rectangle]]:
    """Yield groups of consecutive, equally wide rectangles (or rows of them): at most `elements`, or one row."""
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
    """Split a rectangle by rows into rectangles of at most `elements` elements, or of one row."""
    step = max(1, elements // r.width)
    for row in range(0, r.height, step):
        height = min(step, r.height - row)
        yield Rectangle(r.part, r.row + row, r.col, height, r.width, r.offset + row * r.width)


def _band(together: list[Rectangle], places: Mapping[tuple[int, Side], slice], one: int) -> Band | None:
    """Return the band of these rectangles; None if nothing scales it."""
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
