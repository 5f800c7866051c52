"""Runs and tiles as columns of numbers: the geometry of `bands`, for all pairs of runs at once.

A thousand documents over 64 ranks are a hundred thousand runs and more tiles; one by one in Python they take seconds,
as columns milliseconds. The formulas are those of `bands.tile`, `bands.area` and `bands.join`, which are the oracle
that the tests hold these to. Only the form differs; nothing is decided here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqpar_ring.geometry.bands import INF
from seqpar_ring.geometry.masks import Ints, Regions

Flags = NDArray[np.bool_]

Bands = tuple[Ints | int, Ints | int]
"""lo and hi: of each pair, or of all."""


class RunColumns(NamedTuple):
    """Runs, one in each row. See `Run`."""

    doc: Ints
    start: Ints
    n: Ints
    step: Ints
    at: Ints

    def take(self, index: Ints | Flags | slice) -> RunColumns:
        """Some of the runs."""
        return RunColumns(*(column[index] for column in self))


class TileColumns(NamedTuple):
    """Tiles, one in each row. See `Tile`."""

    q0: Ints
    q1: Ints
    k0: Ints
    k1: Ints
    lo: Ints
    hi: Ints

    def take(self, index: Ints | Flags | slice) -> TileColumns:
        """Some of the tiles."""
        return TileColumns(*(column[index] for column in self))


def ramp(counts: Ints) -> Ints:
    """0 .. counts[0] - 1, 0 .. counts[1] - 1, and so on, in one column."""
    ends = counts.cumsum()
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def restrict(runs: RunColumns, regions: Regions, keys: bool) -> tuple[RunColumns, Ints]:
    """The runs cut to the regions they meet, with the region's number for the document's, and where each came from.

    Args:
        runs: ordered by document, or not.
        regions: of the mask.
        keys: whether the runs are keys, or queries.
    """
    if regions.plain:
        return runs, np.arange(len(runs.n))
    first = np.searchsorted(regions.doc, runs.doc, "left")
    counts = np.searchsorted(regions.doc, runs.doc, "right") - first
    source = np.repeat(np.arange(len(counts)), counts)
    region = np.repeat(first, counts) + ramp(counts)
    run = runs.take(source)
    low, high = (regions.k0, regions.k1) if keys else (regions.q0, regions.q1)
    begin = np.maximum(0, -((run.start - low[region]) // run.step))
    end = np.minimum(run.n, -((run.start - high[region]) // run.step))
    cut = RunColumns(region, run.start + begin * run.step, end - begin, run.step, run.at + begin)
    there = end > begin
    return cut.take(there), source[there]


def tiles_between(q: RunColumns, k: RunColumns, pairs: tuple[Ints, Ints], band: Bands) -> tuple[TileColumns, Ints]:
    """The band between pairs of a q run and a k run, trimmed; and which of the pairs hold anything.

    Args:
        q, k: runs.
        pairs: the numbers of the q run and of the k run of each pair.
        band: lo and hi of each pair, or one for all.
    """
    which, (i, j) = np.arange(len(pairs[0])), pairs
    lo, hi = band
    offset = k.start[j] - q.start[i]
    if max(q.step.max(initial=1), k.step.max(initial=1)) > 1:
        step = np.where(q.n[i] > 1, q.step[i], k.step[j])
        lo, hi = -((offset - lo) // step), (hi - offset) // step
    else:
        lo, hi = lo - offset, hi - offset
    m, n = q.n[i], k.n[j]
    some = np.flatnonzero((lo <= hi) & (hi > -m) & (lo < n))  # many pairs have nothing to do with each other
    if len(some) < len(which):
        which, i, j, m, n, lo, hi = (x[some] for x in (which, i, j, m, n, lo, hi))
    q0, q1 = np.maximum(0, -hi), np.minimum(m - 1, n - 1 - lo)
    k0, k1 = np.maximum(0, lo), np.minimum(n - 1, m - 1 + hi)
    shift, q_at, k_at = k0 - q0, q.at[i], k.at[j]
    lo, hi = np.maximum(lo - shift, q0 - q1), np.minimum(hi - shift, k1 - k0)
    return TileColumns(q_at + q0, q_at + q1 + 1, k_at + k0, k_at + k1 + 1, lo, hi), which


def areas(t: TileColumns) -> Ints:
    """Pairs that each tile allows."""
    m, n = t.q1 - t.q0, t.k1 - t.k0
    return _below(m, n, np.minimum(t.hi, n)) - _below(m, n, np.maximum(t.lo, -m) - 1)


def _below(m: Ints, n: Ints, h: Ints) -> Ints:
    """Cells of an m x n rectangle with `j - i <= h`."""

    def sum_to(x: Ints) -> Ints:
        x = np.maximum(x, 0)
        inside = np.minimum(x, n)
        total: Ints = inside * (inside + 1) // 2 + (x - inside) * n
        return total

    return sum_to(m + h) - sum_to(h)


def join_equal(t: TileColumns, key: Ints) -> tuple[TileColumns, Ints]:
    """Tiles of one key, which lie together, as one tile where the band around them holds not one pair more.

    Returns:
        The tiles, and for each the number of the tile (the first of those joined) that stood in its place.
    """
    first = np.flatnonzero(np.r_[True, key[1:] != key[:-1]]) if len(key) else np.zeros(0, np.int64)
    counts = np.diff(np.r_[first, len(key)])
    if not (counts > 1).any():
        return t, np.arange(len(key))
    q0, k0 = np.minimum.reduceat(t.q0, first), np.minimum.reduceat(t.k0, first)
    shift = (t.k0 - t.q0) - np.repeat(k0 - q0, counts)
    around = TileColumns(
        q0,
        np.maximum.reduceat(t.q1, first),
        k0,
        np.maximum.reduceat(t.k1, first),
        np.minimum.reduceat(t.lo + shift, first),
        np.maximum.reduceat(t.hi + shift, first),
    )
    exact = areas(around) == np.add.reduceat(areas(t), first)
    alone = ~np.repeat(exact, counts)
    alone[first] = True
    kept = np.flatnonzero(alone)
    joined = t.take(kept)
    place = np.searchsorted(kept, first[exact])
    for column, new in zip(joined, around, strict=True):
        column[place] = new[exact]
    return joined, kept


def windows(t: TileColumns) -> tuple[Ints, Ints]:
    """(left, right) of each trimmed tile in flash-attention's way. See `bands.window`."""
    m, n = t.q1 - t.q0, t.k1 - t.k0
    return np.where(t.lo <= 1 - m, INF, n - m - t.lo), np.where(t.hi >= n - 1, INF, t.hi - n + m)
