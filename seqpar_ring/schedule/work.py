"""Work: what one rank computes at each step of a traffic: which blocks, laid side by side how, in which kernel calls.

It is `tiles` and `coalesce` of `calls` for all steps of a rank at once, as columns, because a thousand documents at 64
ranks would take Python seconds. Where a step's tiles do not form one call (some windows), that step goes to
`coalesce` itself. Blocks that arrive together are put in order of document and position, so that one call spans them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqpar_ring.geometry import (
    INF,
    Ints,
    Regions,
    RunColumns,
    Tile,
    TileColumns,
    join_equal,
    ramp,
    restrict,
    tiles_between,
    windows,
)
from seqpar_ring.layout import Layout, cut
from seqpar_ring.schedule.calls import Call, coalesce
from seqpar_ring.schedule.traffic import Block, Traffic

Slices = tuple[tuple[int, int, int], ...]
"""(which block, first row, end row) of the buffers that follow one another in a step's view."""


class Work(NamedTuple):
    """One step of one rank: its calls take the rank's own rows on one side and the view of these blocks on the other.

    `slices` puts the view together where it is of several blocks; it is empty for one block, whose buffer is the view.
    """

    blocks: tuple[Block, ...]
    slices: Slices
    calls: tuple[Call, ...]


class Sides(NamedTuple):
    """Where queries and keys lie, and which pairs of them the mask allows."""

    q: Layout
    k: Layout
    regions: Regions


def work(traffic: Traffic, rank: int, sides: Sides) -> dict[int, Work]:
    """The work of one rank by step; steps at which it computes nothing are left out.

    Args:
        traffic: of the whole group, forward or backward.
        rank: whose work.
        sides: layouts of queries and keys, and the mask.
    """
    by_step: dict[int, list[Block]] = {}
    for use in traffic.uses:
        if use.rank == rank:
            by_step.setdefault(use.step, []).append(use.block)
    groups = [tuple(by_step[step]) for step in sorted(by_step)]
    queries_travel = traffic.travels == "q"
    home, cargo = (sides.k, sides.q) if queries_travel else (sides.q, sides.k)
    runs, group, slices = _views(cargo, groups)
    tiles, group = _tiles(home.columns(rank), runs, group, sides.regions, queries_travel)
    calls = _calls(tiles, group, len(groups))
    return {
        step: Work(blocks, laid, found)
        for step, blocks, laid, found in zip(sorted(by_step), groups, slices, calls, strict=True)
    }


def view_runs(cargo: Layout, blocks: Sequence[Block]) -> RunColumns:
    """The runs of the view of some blocks that arrive together, with `at` the row in the view."""
    return _views(cargo, [tuple(blocks)])[0]


def _views(cargo: Layout, groups: list[tuple[Block, ...]]) -> tuple[RunColumns, Ints, list[Slices]]:
    """The runs in each group's view, the group of each, and how each view is put together."""
    ranges: list[tuple[int, int, int, int, int, int]] = []
    for g, blocks in enumerate(groups):
        for b, (owner, rows) in enumerate(blocks):
            row = 0
            for x, y in rows:
                ranges.append((g, b, owner, x, y, row))
                row += y - x
    columns = np.array(ranges, dtype=np.int64).reshape(-1, 6).T
    runs, which = cut(cargo, columns[2], columns[3], columns[4])
    runs = runs._replace(at=runs.at - columns[3][which] + columns[5][which])
    group = columns[0][which]
    if all(len(blocks) == 1 for blocks in groups):
        return runs, group, [()] * len(groups)
    order = np.lexsort((runs.start, runs.doc, group))
    runs, group, block = runs.take(order), group[order], columns[1][which][order]
    ends = runs.n.cumsum()
    first = np.searchsorted(group, np.arange(len(groups)))
    at = ends - runs.n
    slices = [
        () if len(blocks) == 1 else _slices(block[begin:end], runs.at[begin:end], runs.n[begin:end])
        for blocks, begin, end in zip(groups, first.tolist(), [*first.tolist()[1:], len(group)], strict=True)
    ]
    return runs._replace(at=at - np.r_[at, 0][first][group]), group, slices


def _slices(block: Ints, at: Ints, n: Ints) -> Slices:
    out: list[tuple[int, int, int]] = []
    for b, begin, count in zip(block.tolist(), at.tolist(), n.tolist(), strict=True):
        if out and out[-1][0] == b and out[-1][2] == begin:
            out[-1] = (b, out[-1][1], begin + count)
        else:
            out.append((b, begin, begin + count))
    return tuple(out)


def _tiles(
    mine: RunColumns, theirs: RunColumns, group: Ints, regions: Regions, queries_travel: bool
) -> tuple[TileColumns, Ints]:
    """All tiles between a rank's own runs and the views, joined, by group."""
    mine, _ = restrict(mine, regions, keys=queries_travel)
    theirs, source = restrict(theirs, regions, keys=not queries_travel)
    group = group[source]
    if not regions.plain:
        mine = mine.take(np.argsort(mine.doc, kind="stable"))
    first = np.searchsorted(mine.doc, theirs.doc, "left")
    counts = np.searchsorted(mine.doc, theirs.doc, "right") - first
    t = np.repeat(np.arange(len(counts)), counts)
    m = np.repeat(first, counts) + ramp(counts)
    bands = regions.bands(mine.doc[m])
    if queries_travel:
        tiles, some = tiles_between(theirs, mine, (t, m), bands)
    else:
        tiles, some = tiles_between(mine, theirs, (m, t), bands)
    group, run = group[t[some]], m[some]
    region = mine.doc[run]
    by_region = group * len(regions) + region
    if (by_region[1:] < by_region[:-1]).any():
        order = np.argsort(by_region, kind="stable")
        tiles, by_region, run = tiles.take(order), by_region[order], run[order]
    tiles, kept = join_equal(tiles, by_region)
    by_region, run = by_region[kept], run[kept]
    if (by_region[1:] == by_region[:-1]).any():  # what is not one tile as a whole may still be one for each own run
        order = np.lexsort((run, by_region))
        tiles, by_region, run = tiles.take(order), by_region[order], run[order]
        tiles, kept = join_equal(tiles, by_region * len(mine.n) + run)
        by_region = by_region[kept]
    return tiles, by_region // max(1, len(regions))


def _calls(t: TileColumns, group: Ints, groups: int) -> list[tuple[Call, ...]]:
    """The calls of each group of tiles: one where all fit one window and ascend, else what `coalesce` finds."""
    out: list[tuple[Call, ...]] = [()] * groups
    if not len(group):
        return out
    first = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
    bounds = [*first.tolist(), len(group)]
    (left, right), fits = _one_window(t, group, first)
    cu_q, cu_k, begins = _cumulative(t, first)
    q0, k0 = t.q0[first].tolist(), t.k0[first].tolist()
    for i, g in enumerate(group[first].tolist()):
        if fits[i]:
            a, b = begins[i], begins[i + 1]
            out[g] = (Call(q0[i], k0[i], left[i], right[i], tuple(cu_q[a:b]), tuple(cu_k[a:b])),)
        else:
            some = t.take(slice(bounds[i], bounds[i + 1]))
            out[g] = tuple(coalesce([Tile(*row) for row in np.stack(some, 1).tolist()]))
    return out


def _one_window(
    t: TileColumns, group: Ints, first: Ints
) -> tuple[tuple[list[int], list[int]], NDArray[np.bool_]]:
    """For each group the window of its tiles of more than one row, and whether all its tiles fit one call with it."""
    left, right = windows(t)
    many = t.q1 - t.q0 > 1
    counts = np.diff(np.r_[first, len(group)])
    some = np.logical_or.reduceat(many, first)
    lefts, rights = (np.where(some, np.maximum.reduceat(np.where(many, x, -1), first), INF) for x in (left, right))
    left_of, right_of = np.repeat(lefts, counts), np.repeat(rights, counts)
    same = np.where(many, (left == left_of) & (right == right_of), left_of >= t.k1 - t.k0 - 1)
    ascends = np.ones(len(group), dtype=bool)
    ascends[1:] = (t.q0[1:] >= t.q1[:-1]) & (t.k0[1:] >= t.k1[:-1])
    ascends[first] = True
    return (lefts.tolist(), rights.tolist()), np.logical_and.reduceat(same & ascends, first)


def _cumulative(t: TileColumns, first: Ints) -> tuple[list[int], list[int], list[int]]:
    """cu_q and cu_k of one call for each group, one after the other, with the empty segments between tiles."""
    before_q, before_k = (np.r_[0, end[:-1]] for end in (t.q1, t.k1))
    begins_group = np.zeros(len(t.q0), dtype=bool)
    begins_group[first] = True
    before_q[first], before_k[first] = t.q0[first], t.k0[first]
    counts = np.diff(np.r_[first, len(t.q0)])
    base_q, base_k = np.repeat(t.q0[first], counts), np.repeat(t.k0[first], counts)
    # Before each tile: (the group's zero), queries that see nothing, keys that nobody looks at, and then the tile.
    cu_q = np.stack([base_q, t.q0, t.q0, t.q1], 1) - base_q[:, None]
    cu_k = np.stack([base_k, before_k, t.k0, t.k1], 1) - base_k[:, None]
    keep = np.stack([begins_group, t.q0 > before_q, t.k0 > before_k, np.ones_like(begins_group)], 1)
    begins = np.r_[0, keep.sum(1).cumsum()][np.r_[first, len(t.q0)]].tolist()
    return cu_q[keep].tolist(), cu_k[keep].tolist(), begins
