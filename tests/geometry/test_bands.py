"""Bands and tiles against brute force: every claim of the geometry, cell by cell."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqpar_ring.geometry import INF, Band, Part, Run, Tile, area, causal, full, join, split, tile, window

edges = st.one_of(st.just(-INF), st.integers(-12, 12))


def cells(q: Run, k: Run, band: Band) -> set[tuple[int, int]]:
    """Memory rows (q, k) of the pairs that the band allows."""
    return {
        (q.at + i, k.at + j)
        for i in range(q.n)
        for j in range(k.n)
        if band.lo <= (k.start + j * k.step) - (q.start + i * q.step) <= band.hi
    }


def cells_of(t: Tile) -> set[tuple[int, int]]:
    return {(i, j) for i in range(t.q0, t.q1) for j in range(t.k0, t.k1) if t.lo <= (j - t.k0) - (i - t.q0) <= t.hi}


@st.composite
def runs_of_one_step(draw: st.DrawFn) -> tuple[Run, Run]:
    step = draw(st.integers(1, 4))

    def run() -> Run:
        return Run(0, draw(st.integers(0, 20)), draw(st.integers(1, 9)), step, draw(st.integers(0, 5)))

    return run(), run()


@st.composite
def bands(draw: st.DrawFn) -> Band:
    return Band(draw(edges), draw(st.one_of(st.just(INF), st.integers(-12, 12))))


@given(runs_of_one_step(), bands())
def test_a_tile_holds_exactly_the_allowed_pairs_and_no_empty_row_or_column(runs: tuple[Run, Run], band: Band) -> None:
    q, k = runs
    found = tile(q, k, band)
    truth = cells(q, k, band)
    assert (set() if found is None else cells_of(found)) == truth
    if found is not None:
        assert {i for i, _ in truth} == set(range(found.q0, found.q1))
        assert {j for _, j in truth} == set(range(found.k0, found.k1))
        assert area(found) == len(truth)


@given(runs_of_one_step(), bands())
def test_a_trimmed_tile_is_one_bottom_right_window_with_no_negative_side(runs: tuple[Run, Run], band: Band) -> None:
    found = tile(*runs, band)
    if found is None:
        return
    left, right = window(found)
    m, n = found.q1 - found.q0, found.k1 - found.k0
    allowed = {
        (i + found.q0, j + found.k0) for i in range(m) for j in range(n) if -left <= (j - i) - (n - m) <= right
    }
    assert left >= 0
    assert right >= 0
    assert allowed == cells_of(found)


sides = st.integers(0, 9)


@given(sides, sides, st.one_of(st.just(INF), sides), sides, st.integers(1, 4), st.booleans())
def test_split_cuts_a_segment_into_disjoint_parts_that_cover_it(
    m: int, n: int, left: int, right: int, rows: int, tall: bool
) -> None:
    truth = [(i, j) for i in range(m) for j in range(n) if -left <= (j - i) - (n - m) <= right]
    got = [
        (i, j)
        for p in split(m, n, left, right, rows, tall)
        for i in range(p.q0, p.q1)
        for j in range(p.k0, p.k1)
        if p.lo <= (j - p.k0) - (i - p.q0) <= p.hi
    ]
    assert sorted(got) == truth


def test_split_gives_a_square_causal_segment_as_one_part() -> None:
    (part,) = split(7, 7, INF, 0)
    assert (part.kind, part.q1, part.k1) == ("causal", 7, 7)


def test_split_gives_a_causal_segment_of_more_rows_than_keys_as_one_part_where_that_is_taken() -> None:
    (part,) = split(9, 4, INF, 5, tall=True)
    assert part == Part(0, 9, 0, 4, "causal", -INF, 0)
    assert [(p.kind, p.q0, p.q1) for p in split(9, 4, INF, 5)] == [("causal", 0, 4), ("full", 4, 9)]


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("right", [0, 3])
def test_split_gives_parts_that_their_kind_describes(tall: bool, right: int) -> None:
    for m in range(1, 9):
        for n in range(1, 9):
            for part in split(m, n, INF, right, tall=tall):
                rows, keys = part.q1 - part.q0, part.k1 - part.k0
                assert part.kind in ("full", "causal")
                assert (part.lo, part.hi) == ((-INF, INF) if part.kind == "full" else (-INF, 0))
                assert part.kind == "full" or rows == keys or (tall and rows > keys)


def test_join_makes_zigzags_diagonal_one_causal_tile() -> None:
    early, late = Run(0, 10, 5, 1, 0), Run(0, 70, 6, 1, 5)
    tiles = [t for k in (early, late) for q in (early, late) if (t := tile(q, k, causal()))]
    assert len(tiles) == 3
    (joined,) = join(tiles)
    assert (joined.q0, joined.q1, joined.k0, joined.k1, joined.hi) == (0, 11, 0, 11, 0)


def test_join_leaves_tiles_that_would_gain_a_pair() -> None:
    tiles = [Tile(0, 2, 0, 2, -INF, 0), Tile(4, 6, 4, 6, -INF, 0)]
    assert join(tiles) == tiles


def test_runs_of_different_steps_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="different steps"):
        tile(Run(0, 0, 3, 2, 0), Run(0, 0, 3, 3, 0), full())


def test_a_window_of_one_sees_only_itself() -> None:
    whole = Run(0, 0, 5, 1, 0)
    found = tile(whole, whole, causal(1))
    assert found is not None
    assert cells_of(found) == {(i, i) for i in range(5)}
