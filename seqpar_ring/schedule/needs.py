"""Needs: which rows of a travelling block some other rank must meet.

The masks' whole influence on traffic is here. In forward, keys travel and queries stay at home; where the backward pass
lets queries travel, the same code runs on the transposed mask. Rows are worked out as columns for all pairs of ranks at
once. A builder that relays blocks asks who needs anything of a piece, and for the rows that anybody needs; one that
sends directly asks for each pair's own rows, which is more work, and only done then.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from seqpar_ring.geometry import Ints, Regions, Rows, RunColumns, ramp, restrict, tiles_between
from seqpar_ring.layout import Layout, cut
from seqpar_ring.schedule.pieces import Pieces

ABSENT = 1 << 62
"""Beyond every position, and far enough beyond INF that adding one to the other stays beyond."""

WHOLE = Pieces()
"""Blocks that travel in one."""

AT_ONCE = 1 << 20
"""Pairs of runs that are looked at together: bounds the memory of planning."""


class Needs:
    """What every rank needs of every other.

    Args:
        home: where the stationary side lies (queries, in forward).
        cargo: where the travelling side lies (keys and values, in forward).
        regions: the mask, with the stationary side as its queries.
        pieces: how each rank's rows are cut into what travels on its own.
    """

    def __init__(self, home: Layout, cargo: Layout, regions: Regions, pieces: Pieces = WHOLE) -> None:
        self.world, self.pieces, self.sizes = len(cargo), pieces.number, cargo.sizes
        self._regions = regions
        self.parts = [pieces.of(n) for n in self.sizes]
        self.own = [pieces.own(n) for n in self.sizes]
        owner, piece, begin, end = pieces.columns(self.sizes)
        shared = _shared(home, cargo)
        mine, self._rank = _of_shared(home.runs, home.rank, shared)
        theirs, which = cut(cargo, owner, begin, end)
        theirs, self._piece = _of_shared(theirs, (owner * self.pieces + piece)[which], shared)
        self._home, source = restrict(mine, regions, keys=False)
        self._rank = self._rank[source]
        self._cargo, source = restrict(theirs, regions, keys=True)
        self._piece = self._piece[source]

    @cached_property
    def wanted(self) -> NDArray[np.bool_]:
        """`wanted[rank, owner, piece]`: whether the rank needs anything of the owner's piece; never its own."""
        found: NDArray[np.bool_]
        if self._regions.lower_edge:
            found = np.zeros((self.world, self.world * self.pieces), dtype=bool)
            found[self._pairs[0], self._pairs[1]] = True
        else:
            found = self._reached()
        found = found.reshape(self.world, self.world, self.pieces)
        found[np.arange(self.world), np.arange(self.world)] = False
        return found

    def by_rank(self, owner: int, piece: int) -> dict[int, Rows]:
        """The rows of the owner's piece that each rank needs, for those that need any."""
        return self._exact.get(owner * self.pieces + piece, {})

    def anybody(self, owner: int, piece: int) -> Rows:
        """The rows of the owner's piece that any other rank needs."""
        return self._union.get(owner * self.pieces + piece, ())

    def _reached(self) -> NDArray[np.bool_]:
        """`wanted` without lower edges: a rank needs a piece if its last query reaches the piece's first key."""
        last = self._last_query()
        first = np.full((len(self._regions), self.world * self.pieces), ABSENT)
        np.minimum.at(first, (self._cargo.doc, self._piece), self._cargo.start)
        found = np.zeros((self.world, self.world * self.pieces), dtype=bool)
        apart = np.repeat(~np.eye(self.world, dtype=bool), self.pieces, axis=1)
        some = np.flatnonzero((first < ABSENT).any(1))
        for at in range(0, len(some), 64):
            regions = some[at : at + 64]
            reach = last[regions] + self._regions.hi[regions, None]
            found |= (first[regions, None, :] <= reach[:, :, None]).any(0)
            if (found | ~apart).all():
                break
        return found

    def _last_query(self) -> Ints:
        """Position of each rank's last query in each region, (regions, world); far below all where it has none."""
        last = np.full((len(self._regions), self.world), -ABSENT)
        end = self._home.start + (self._home.n - 1) * self._home.step
        np.maximum.at(last, (self._home.doc, self._rank), end)
        return last

    @cached_property
    def _union(self) -> dict[int, Rows]:
        if self._regions.lower_edge:
            _, piece, begin, end = self._pairs
            return _grouped(np.zeros_like(piece), piece, begin, end).get(0, {})
        # The last query of any other rank: the last of all, or where that is the owner's own the second last.
        last = self._last_query()
        lone = np.full((len(last), 1), -ABSENT)
        holder = last.argmax(1)
        top = np.sort(np.hstack([lone, last]), axis=1)[:, -2:]
        region, owner = self._cargo.doc, self._piece // self.pieces
        reach = np.where(holder[region] == owner, top[region, 0], top[region, 1]) + self._regions.hi[region]
        count = np.clip((reach - self._cargo.start) // self._cargo.step + 1, 0, self._cargo.n)
        begin = self._cargo.at[count > 0]
        piece = self._piece[count > 0]
        return _grouped(np.zeros_like(piece), piece, begin, begin + count[count > 0]).get(0, {})

    @cached_property
    def _exact(self) -> dict[int, dict[int, Rows]]:
        rank, piece, begin, end = self._pairs
        return _grouped(piece, rank, begin, end)

    @cached_property
    def _pairs(self) -> tuple[Ints, Ints, Ints, Ints]:
        """(rank, piece, first row, end row) of what each run of one rank needs of each run of another."""
        home, rank = self._home, self._rank
        if not self._regions.lower_edge:  # then the last query of each rank needs all that its others do
            last = self._last_query()
            region, rank = np.nonzero(last > -ABSENT)
            one = np.ones_like(region)
            home = RunColumns(region, last[region, rank], one, one, np.zeros_like(region))
        order = np.argsort(home.doc, kind="stable")
        home, rank = home.take(order), rank[order]
        first = np.searchsorted(home.doc, self._cargo.doc, "left")
        counts = np.searchsorted(home.doc, self._cargo.doc, "right") - first
        found = [np.zeros((4, 0), dtype=np.int64)]
        borders = [*np.unique(counts.cumsum() // AT_ONCE, return_index=True)[1].tolist(), len(counts)]
        for a, b in pairwise(borders):
            of_part = counts[a:b]
            k = np.repeat(np.arange(a, b), of_part)
            q = np.repeat(first[a:b], of_part) + ramp(of_part)
            apart = rank[q] != self._piece[k] // self.pieces
            k, q = k[apart], q[apart]
            tiles, some = tiles_between(home, self._cargo, (q, k), self._regions.bands(home.doc[q]))
            found.append(np.stack([rank[q[some]], self._piece[k[some]], tiles.k0, tiles.k1]))
        rank, piece, begin, end = np.concatenate(found, axis=1)
        return rank, piece, begin, end


def _shared(home: Layout, cargo: Layout) -> NDArray[np.bool_]:
    """Documents that do not lie, queries and keys together, on one rank alone: all that traffic can be about."""
    doc, rank = np.r_[home.runs.doc, cargo.runs.doc], np.r_[home.rank, cargo.rank]
    first = np.full(int(doc.max(initial=-1)) + 1, -1)
    first[doc] = rank
    shared = np.zeros(len(first), dtype=bool)
    shared[doc[first[doc] != rank]] = True
    return shared


def _of_shared(runs: RunColumns, which: Ints, shared: NDArray[np.bool_]) -> tuple[RunColumns, Ints]:
    keep = shared[runs.doc]
    return (runs, which) if keep.all() else (runs.take(keep), which[keep])


def _grouped(first: Ints, second: Ints, begin: Ints, end: Ints) -> dict[int, dict[int, Rows]]:
    """Ranges by two numbers, ascending and disjoint, as plain tuples."""
    if not len(begin):
        return {}
    high = int(end.max()) + 1
    key = (first * (int(second.max()) + 1) + second) * high
    order = np.argsort(key + begin, kind="stable")
    low, up = (key + begin)[order], (key + end)[order]
    reach = np.maximum.accumulate(up)
    fresh = np.flatnonzero(np.r_[True, (low[1:] > reach[:-1]) | (low[1:] // high != low[:-1] // high)])
    last = np.r_[fresh[1:], len(low)] - 1
    ranges = list(zip((low[fresh] % high).tolist(), (reach[last] % high).tolist(), strict=True))
    a, b = first[order][fresh], second[order][fresh]
    begins = np.flatnonzero(np.r_[True, (a[1:] != a[:-1]) | (b[1:] != b[:-1])])
    bounds = [*begins.tolist(), len(ranges)]
    out: dict[int, dict[int, Rows]] = {}
    for i, (x, y) in enumerate(zip(a[begins].tolist(), b[begins].tolist(), strict=True)):
        out.setdefault(x, {})[y] = tuple(ranges[bounds[i] : bounds[i + 1]])
    return out
