"""The columns against the formulas one by one: tiles, areas, windows, joins, and runs cut to regions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqpar_ring.errors import PlanError
from seqpar_ring.geometry import (
    INF,
    Band,
    Mask,
    Run,
    RunColumns,
    Tile,
    TileColumns,
    area,
    areas,
    join,
    join_equal,
    ramp,
    region_area,
    restrict,
    tile,
    tiles_between,
    window,
    windows,
    within,
)

edges = st.integers(-40, 40) | st.sampled_from([-INF, INF])
bands = st.tuples(edges, edges).filter(lambda b: b[0] <= b[1] and b[0] < INF and b[1] > -INF)
steps = st.sampled_from([1, 1, 3])


@st.composite
def pairs(draw: st.DrawFn) -> list[tuple[Run, Run, Band]]:
    found = []
    for _ in range(draw(st.integers(1, 6))):
        step = draw(steps)
        q, k = (
            Run(0, draw(st.integers(0, 30)), draw(st.integers(1, 12)), step, draw(st.integers(0, 9))) for _ in range(2)
        )
        found.append((q, k, Band(*draw(bands))))
    return found


def columns_of(runs: list[Run]) -> RunColumns:
    return RunColumns(*np.array(runs, dtype=np.int64).reshape(-1, 5).T)


@given(pairs())
def test_tiles_their_areas_and_windows_are_those_of_the_single_forms(problem: list[tuple[Run, Run, Band]]) -> None:
    q, k, drawn = zip(*problem, strict=True)
    lo, hi = np.array(drawn, dtype=np.int64).T
    each = np.arange(len(problem))
    found, some = tiles_between(columns_of(list(q)), columns_of(list(k)), (each, each), (lo, hi))
    expected = [tile(*one) for one in problem]
    assert some.tolist() == [i for i, t in enumerate(expected) if t is not None]
    there = [t for t in expected if t is not None]
    assert [Tile(*row) for row in zip(*(column.tolist() for column in found), strict=True)] == there
    assert areas(found).tolist() == [area(t) for t in there]
    assert list(zip(*(x.tolist() for x in windows(found)), strict=True)) == [window(t) for t in there]


@given(st.lists(pairs(), min_size=1, max_size=4))
def test_tiles_of_one_key_are_joined_as_one_list_would_be(groups: list[list[tuple[Run, Run, Band]]]) -> None:
    tiles = [[t for one in group if (t := tile(*one))] for group in groups]
    rows = np.array([t for group in tiles for t in group], dtype=np.int64).reshape(-1, 6)
    key = np.repeat(np.arange(len(tiles)), [len(group) for group in tiles])
    joined, kept = join_equal(TileColumns(*rows.T), key)
    keys = key[kept]
    found = [Tile(*row) for row in zip(*(column.tolist() for column in joined), strict=True)]
    expected = [(i, t) for i, group in enumerate(tiles) for t in join(group)]
    assert list(zip(keys.tolist(), found, strict=True)) == expected


@given(
    runs=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 20), st.integers(1, 15), steps), max_size=5),
    chunk=st.integers(1, 40),
    keys=st.booleans(),
)
def test_runs_are_cut_to_the_regions_they_meet(
    runs: list[tuple[int, int, int, int]], chunk: int, keys: bool
) -> None:
    regions = Mask(chunk=chunk).regions([60, 7, 50])
    mine = sorted(Run(*run, at=3) for run in runs)
    found, source = restrict(columns_of(mine), regions, keys)
    expected = [
        (part._replace(doc=number), i)
        for i, run in enumerate(mine)
        for number, region in regions.by_document[run.doc]
        if (part := within(run, region.k0 if keys else region.q0, region.k1 if keys else region.q1))
    ]
    rows = [Run(*row) for row in zip(*(column.tolist() for column in found), strict=True)]
    assert list(zip(rows, source.tolist(), strict=True)) == expected


def test_a_ramp_counts_up_in_each_place() -> None:
    assert ramp(np.array([3, 0, 2])).tolist() == [0, 1, 2, 0, 1]
    assert ramp(np.array([], dtype=np.int64)).tolist() == []


@given(
    length=st.integers(1, 40),
    mask=st.one_of(
        st.just(Mask()),
        st.just(Mask(causal=False)),
        st.integers(1, 50).map(lambda w: Mask(window=w)),
        st.integers(1, 50).map(lambda c: Mask(chunk=c, window=3)),
        st.integers(0, 1).map(lambda p: Mask(prefix=p)),
        st.tuples(st.integers(0, 50), st.integers(0, 50)).map(lambda w: Mask(causal=False, window=w)),
    ),
)
def test_regions_hold_the_pairs_of_the_definition_and_none_twice(length: int, mask: Mask) -> None:
    import torch

    from seqpar_ring.testing.dense import visible

    regions = list(mask.regions([length]))
    ahead = torch.arange(length)[None] - torch.arange(length)[:, None]
    seen = torch.zeros(length, length, dtype=torch.int64)
    for r in regions:
        inside = torch.zeros_like(seen)
        inside[r.q0 : r.q1, r.k0 : r.k1] = 1
        seen += inside * ((ahead >= r.lo) & (ahead <= r.hi))
    assert (seen == visible(mask, 0, ahead).long()).all()
    assert mask.regions([length]).pairs() == sum(map(region_area, regions)) == int(seen.sum())


@pytest.mark.parametrize("causal", ["no", 0, None])
def test_causal_that_is_no_yes_or_no_is_refused(causal: Any) -> None:
    with pytest.raises(PlanError, match="neither True nor False"):
        Mask.make(causal)


def test_a_mask_says_what_it_is() -> None:
    assert str(Mask()) == "causal"
    assert str(Mask(causal=False)) == "full"
    assert str(Mask(window=4, chunk=9)) == "causal with a window of 4 and chunks of 9"
    assert str(Mask(prefix=(3, 4))) == "causal with a prefix of by document"
