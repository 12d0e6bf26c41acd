"""Indices of the multipliers that scale each row and column of a weight, for layers and folded multipliers.

The indices are made from the rectangles of an interval of a weight. For a layer the interval is the whole local
shard of its weight. For the optimizer it is a slice that ZeRO gives to a rank, and may begin and end anywhere. A fused
parameter interleaves its logical matrices, so a slice can consist of many rectangles. Consecutive rectangles of equal
width become one :class:`Band`, so that a slice has few bands.

The module does no communication.
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
from megamult.parameters.spec import Segment, Side

Places = Mapping[tuple[int, Side], Sequence[Segment]]
"""Mapping from (part, side) to the segments in which a vector of multipliers holds the multipliers of this part on this
side. If a part has no multipliers on a side, the mapping does not have this key."""

_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Largest number of elements in a band, by type of device. It bounds temporary memory (256 MiB on a GPU), and lets a
band fit into the cache of a CPU."""


@dataclass(frozen=True)
class Band:
    """Rows of a weight that are consecutive in memory, and for each row and column the index of its multiplier.

    Such an index is called an *entry*. For a layer it is an index into `row_multiplier`, `col_multiplier` or
    `scalar_multiplier`. For the optimizer it is an index into the single vector of all folded multipliers
    (:class:`PackedScaling`). A row without a multiplier has an entry at which the number 1 is stored: the argument
    `one` of :func:`band_of`.
    """

    offset: int
    """Position of the band's first element in the interval."""
    height: int
    width: int
    row: Tensor
    """Entries of the row multipliers, [height]."""
    scalar: Tensor
    """Entries of the scalars, [height]."""
    has_rho: bool
    """Whether any row has a row multiplier or a scalar."""
    scalars: tuple[Tensor, Tensor] | None
    """Distinct entries of scalars, [count], and a mask [count, height]: an element is 1 if the scalar scales the row,
    else 0. None if no row has a scalar."""
    col: Tensor
    """Entries of the column multipliers, [vectors, width]."""
    spans: tuple[Span, ...]
    """Spans of rows. The entries of a span's column multipliers are row `Span.col` of the attribute `col`."""
    counted: bool
    """Whether a sum over processes includes this process's copy of the rows (`ParameterSpec.row_intervals`)."""

    def of(self, values: Tensor) -> Tensor:
        """Return this band's part of `values`, as a view [height, width].

        `values` [length] has one value for each element of the layer's shard or of the slice, in memory order."""
        return values[self.offset : self.offset + self.height * self.width].view(self.height, self.width)


def bands(found: Iterable[Rectangle], places: Places, one: int, device_type: str) -> list[Band]:
    """Return the bands of a slice, as few as the rectangles' widths and the bound on temporary memory allow. Bands that
    no multiplier scales are left out.

    Args:
        found: the rectangles of one slice, in the order of their offsets.
        places: where the vectors of multipliers hold the multipliers of each (part, side) (:data:`Places`).
        one: the entry that stands for "no multiplier".
        device_type: type of the slice's device, cpu or cuda.
    """
    made = (band_of(together, places, one) for together in _together(found, _ELEMENTS[device_type]))
    return [band for band in made if band.has_rho or len(band.col)]


def _together(found: Iterable[Rectangle], elements: int) -> Iterator[list[Rectangle]]:
    """Yield groups of consecutive rectangles that have the same first column and width.

    A group has at most `elements` elements. Larger rectangles are split by rows. A row with more elements is a group of
    its own.

    All rectangles of a group have the same value of `Rectangle.counted`: a sum over processes includes this process's
    copy of the whole group, or of none of its rows.
    """
    together: list[Rectangle] = []
    for r in itertools.chain.from_iterable(_bounded(r, elements) for r in found):
        if together:
            first, last = together[0], together[-1]
            alike = (r.col, r.width, r.counted) == (last.col, last.width, last.counted)
            follows = alike and r.offset == last.offset + last.numel
            if not follows or r.offset + r.numel - first.offset > elements:
                yield together
                together = []
        together.append(r)
    if together:
        yield together


def _bounded(r: Rectangle, elements: int) -> Iterator[Rectangle]:
    """Split a rectangle by rows into rectangles of at most `elements` elements, or of one row if a row has more."""
    step = max(1, elements // r.width)
    for row in range(0, r.height, step):
        height = min(step, r.height - row)
        yield replace(r, row=r.row + row, height=height, offset=r.offset + row * r.width)


def band_of(together: Sequence[Rectangle], places: Places, one: int) -> Band:
    """Return the band that consists of consecutive rectangles of equal width.

    Args:
        together: the rectangles, at least one, in the order of their offsets.
        places, one: the same as for :func:`bands`.
    """
    row, scalar = torch.full((2, sum(r.height for r in together)), one)
    cols: dict[int, Tensor] = {}
    spans, stop = [], 0
    for r in together:
        start, stop = stop, stop + r.height
        if (first := _entry(places, r.part, "row", r.row)) is not None:
            row[start:stop] = first + torch.arange(r.height)
        if (first := _entry(places, r.part, "scalar", 0)) is not None:
            scalar[start:stop] = first
        if (first := _entry(places, r.part, "col", r.col)) is not None:
            cols.setdefault(first, first + torch.arange(r.width))
        spans.append(Span(start, stop, None if first is None else list(cols).index(first)))
    entries = scalar[scalar != one].unique()
    width = together[0].width
    return Band(
        together[0].offset,
        len(row),
        width,
        row,
        scalar,
        bool((row != one).any()) or len(entries) > 0,
        (entries, (scalar == entries[:, None]).float()) if len(entries) else None,
        torch.stack(list(cols.values())) if cols else torch.empty(0, width, dtype=torch.long),
        tuple(spans),
        all(r.counted for r in together),
    )


def _entry(places: Places, part: int, side: Side, position: int) -> int | None:
    """Return the entry (:class:`Band`) of the multiplier of row or column `position` of a part.

    It is the index in the vector that `places` describes: the packed vector, or the multipliers of a layer. For the
    side scalar, `position` is 0. The result is None if the part has no multipliers on this side.
    """
    for segment in places.get((part, side), ()):
        if segment.part_start <= position < segment.part_start + segment.length:
            return segment.start + position - segment.part_start
    return None


class Factors(NamedTuple):
    """Values of the multipliers of many bands.

    In `row` and `scalar` the rows of all bands follow one another; [rows] is their total number.
    """

    row: Tensor
    """Row multipliers, [rows]; 1 for a row that has none."""
    scalar: Tensor
    """Scalars, [rows]; 1 for a row that has none."""
    bands: list[tuple[Tensor | None, Tensor | None]]
    """(rho [height], kappa [vectors, width]) of each band. rho is the product of row multiplier and scalar of each row,
    or None if the band has neither. kappa is the column multipliers, or None if the band has none."""


class PackedScaling:
    """Bands whose multipliers are in one packed vector. The entries of all bands are concatenated, so that few kernels
    look up all multipliers.

    Args:
        bands: bands in the order in which they are processed. The packed vector holds n multipliers and then, at index
            n, a 1, which rows and columns without multipliers use. So the argument `one` of :func:`bands` must be n.
        here: device on which the entries are needed.
    """

    def __init__(self, bands: Sequence[Band], here: torch.device) -> None:
        nothing = [torch.empty(0, dtype=torch.long)]
        self._rows = torch.cat([band.row for band in bands] or nothing).to(here)
        self._scalars = torch.cat([band.scalar for band in bands] or nothing).to(here)
        self._cols = torch.cat([band.col.view(-1) for band in bands] or nothing).to(here)
        self._heights = [band.height for band in bands]
        self._widths = [band.col.numel() for band in bands]
        rows, scalars = self._rows.split(self._heights), self._scalars.split(self._heights)
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
        """The given bands, with entries that are views of the concatenated entries."""

    def factors(self, packed: Tensor) -> Factors:
        """Return the multipliers of all bands, looked up with four kernels.

        Args:
            packed: all multipliers followed by a 1, [multipliers + 1].
        """
        row, scalar = packed[self._rows], packed[self._scalars]
        rhos = (row * scalar).split(self._heights)
        kappas = packed[self._cols].split(self._widths)
        by_band = [
            (rho if band.has_rho else None, kappa.view(-1, band.width) if kappa.numel() else None)
            for band, rho, kappa in zip(self.bands, rhos, kappas, strict=True)
        ]
        return Factors(row, scalar, by_band)

    def add_cols(self, sums: Tensor, k: int, cols: Tensor) -> None:
        """Add dL/dkappa of band k to the gradients of the band's column multipliers.

        Args:
            sums: gradients of all multipliers, [multipliers + 1], changed in place.
            k: index of the band.
            cols: dL/dkappa, [vectors, width], the second result of
                :func:`megamult.multipliers.kernels.scale_backward`.
        """
        sums.index_add_(0, self.bands[k].col.view(-1), cols.view(-1))

    def add_rows(self, sums: Tensor, dots: Sequence[Tensor | None], factors: Factors) -> None:
        """Add each band's share to the gradients of its row multipliers and scalars.

        A band's share comes from its row sums, sum_j W[i, j] kappa[j] G[i, j], where kappa are its columns' factors
        and G is the gradient of its effective weights.

        Args:
            sums: gradients of all multipliers, [multipliers + 1], changed in place. The last element collects the sums
                of rows without multipliers.
            dots: row sums [height] of each band, or None for a band that adds nothing: its rows have neither a row
                multiplier nor a scalar, or this process has only copies of rows that another process already counts.
            factors: the multipliers in the effective weights for which G was computed. The gradient of a row
                multiplier is its row sum times the scalar. That of a scalar is the sum of row multiplier times row sum.
        """
        if all(dot is None for dot in dots):
            return
        nothing = sums.new_zeros(1)
        pairs = zip(dots, self._heights, strict=True)
        rows = torch.cat([nothing.expand(height) if dot is None else dot for dot, height in pairs])
        # Only the index of the last element of `sums` can occur more than once within one index_add_. Every other
        # element gets at most one addition from each call, so the order of its additions is fixed, even on a GPU.
        sums.index_add_(0, self._rows, rows * factors.scalar)
        if any(band.scalars is not None for band in self.bands):
            for band, dot in zip(self.bands, (rows * factors.row).split(self._heights), strict=True):
                if band.scalars is not None:
                    entries, members = band.scalars
                    sums.index_add_(0, entries, members @ dot)
