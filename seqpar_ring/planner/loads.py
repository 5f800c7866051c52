"""Loads: what each rank computes at each step of a traffic, as columns: pairs, rows, kernel calls.

The pairs are counted from layouts and mask exactly as `schedule.work` finds a rank's tiles, for all ranks at once;
`work` is the oracle that the tests hold this to. No seconds here: those depend on the machine.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqpar_ring.geometry import (
    INF,
    Ints,
    Regions,
    RunColumns,
    TileColumns,
    areas,
    join_equal,
    ramp,
    restrict,
    tiles_between,
    windows,
)
from seqpar_ring.layout import Layout, cut
from seqpar_ring.schedule import Flows, Sides, UseColumns
from seqpar_ring.schedule.pieces import Pieces

Floats = NDArray[np.float64]

AT_ONCE = 1 << 19
"""Pairs of runs that are looked at together: bounds the memory of pricing."""


class Loads(NamedTuple):
    """Work by step and rank, arrays of (steps, world).

    Attributes:
        pairs: of a query and a key that the kernel computes.
        home: rows of the rank's own side that its calls span: of queries, or of keys where queries travel.
        cargo: rows of the blocks that its calls span.
        calls: kernel calls.
    """

    pairs: Floats
    home: Floats
    cargo: Floats
    calls: Floats


def loads(flows: Flows, sides: Sides, pieces: Pieces) -> Loads:
    """The work of a traffic whose blocks are cut like this."""
    queries_travel = flows.travels == "q"
    home, cargo = (sides.k, sides.q) if queries_travel else (sides.q, sides.k)
    steps, uses = flows.steps + 1, flows.uses
    found = Loads(*(np.zeros((steps, flows.world)) for _ in Loads._fields))
    if not len(uses.step):
        return found
    mine, rank = restrict(home.runs, sides.regions, keys=queries_travel)
    rank = home.rank[rank]
    key = rank * len(sides.regions) + mine.doc
    order = np.argsort(key, kind="stable")
    mine, key = mine.take(order), key[order]
    which, rows = _ranges(uses, pieces, cargo.sizes)
    # Uses are looked at in slices of about AT_ONCE pairs of runs.
    runs_of_rank = int(np.diff(home.bounds).max()) * max(1, int(np.diff(cargo.bounds).max()))
    stride = max(1, AT_ONCE // max(1, runs_of_rank))
    first = np.full(found.home.shape, np.inf)
    seen = _Seen(mine, key, cargo, sides.regions, queries_travel, first)
    for a in range(0, len(which), stride):
        use, some = which[a : a + stride], slice(a, a + stride)
        seen.add(found, uses.step[use], uses.rank[use], (uses.owner[use], rows[0][some], rows[1][some]))
    found.home[...] -= np.where(found.home > 0, first, 0)
    if not sides.regions.lower_edge:
        # Without windows the tiles of a step are one call, or a few for blocks that arrive together; priced as one.
        found.calls[...] = found.pairs > 0
    return found


def _ranges(uses: UseColumns, pieces: Pieces, sizes: tuple[int, ...]) -> tuple[Ints, tuple[Ints, Ints]]:
    """For each range of rows that each use is of: which use, first and end row."""
    owner, piece, begin, end = pieces.columns(sizes)
    key = owner * pieces.number + piece  # ascending
    block = uses.owner * pieces.number + uses.piece
    own = uses.owner == uses.rank
    first = np.searchsorted(key, block, "left")
    counts = np.where(own, 1, np.searchsorted(key, block, "right") - first)
    which = np.repeat(np.arange(len(first)), counts)
    at = np.repeat(first, counts) + ramp(counts)
    cuts = np.array([pieces.own(n) for n in sizes])
    mine, at = own[which], np.minimum(at, len(key) - 1)  # an own part may be of pieces that are empty
    a = np.where(mine, cuts[uses.owner, uses.piece][which], begin[at])
    b = np.where(mine, cuts[uses.owner, uses.end][which], end[at])
    return which, (a, b)


class _Seen(NamedTuple):
    """The runs of all ranks, ordered by rank and region, and the blocks that visit them; `first`: of the rows met."""

    mine: RunColumns
    key: Ints
    cargo: Layout
    regions: Regions
    queries_travel: bool
    first: Floats

    def add(self, found: Loads, step: Ints, rank: Ints, rows: tuple[Ints, Ints, Ints]) -> None:
        """Count the work of some uses."""
        theirs, use = cut(self.cargo, *rows)
        theirs, source = restrict(theirs, self.regions, keys=not self.queries_travel)
        use = use[source]
        key = rank[use] * len(self.regions) + theirs.doc
        first = np.searchsorted(self.key, key, "left")
        counts = np.searchsorted(self.key, key, "right") - first
        t = np.repeat(np.arange(len(counts)), counts)
        m = np.repeat(first, counts) + ramp(counts)
        bands = self.regions.bands(self.mine.doc[m])
        if self.queries_travel:
            tiles, some = tiles_between(theirs, self.mine, (t, m), bands)
        else:
            tiles, some = tiles_between(self.mine, theirs, (m, t), bands)
        if not len(some):
            return
        of_use = use[t[some]]
        q, k = (tiles.q0, tiles.q1), (tiles.k0, tiles.k1)
        home, cargo = (k, q) if self.queries_travel else (q, k)
        np.add.at(found.pairs, (step[of_use], rank[of_use]), areas(tiles))
        # Blocks that arrive together meet the same rows of the rank's own, and each brings rows of its own.
        at = (step[of_use], rank[of_use])
        np.minimum.at(self.first, at, home[0])
        np.maximum.at(found.home, at, home[1])
        low, high = np.full(len(step), INF), np.zeros(len(step), dtype=np.int64)
        np.minimum.at(low, of_use, cargo[0])
        np.maximum.at(high, of_use, cargo[1])
        np.add.at(found.cargo, (step, rank), np.where(high > 0, high - low, 0))
        if self.regions.lower_edge:
            np.add.at(found.calls, *_windows(tiles, of_use, self.mine.doc[m[some]], (step, rank)))


def _windows(tiles: TileColumns, use: Ints, region: Ints, at: tuple[Ints, Ints]) -> tuple[tuple[Ints, Ints], int]:
    """Where to count a kernel call: one for each use and each window that its tiles have."""
    order = np.lexsort((region, use))
    key = (use * (int(region.max()) + 1) + region)[order]
    joined, kept = join_equal(tiles.take(order), key)
    of_use = use[order][kept]
    left, right = windows(joined)
    many = joined.q1 - joined.q0 > 1  # a tile of one row fits any window that is wide enough
    distinct = np.unique(np.stack([of_use, np.where(many, left, INF), np.where(many, right, INF)]), axis=1)[0]
    return (at[0][distinct], at[1][distinct]), 1
