"""Row ranges and views of buffers, against lists of row numbers."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from seqpar_ring.geometry import Run, clip, count, union, view

ranges = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)).map(lambda x: (x[0], x[0] + x[1])), max_size=6)


def rows_of(found: tuple[tuple[int, int], ...]) -> list[int]:
    return [i for a, b in found for i in range(a, b)]


@given(ranges)
def test_union_is_ascending_disjoint_and_holds_the_same_rows(given_ranges: list[tuple[int, int]]) -> None:
    found = union(given_ranges)
    assert rows_of(found) == sorted({i for a, b in given_ranges for i in range(a, b)})
    assert all(a[1] < b[0] for a, b in itertools.pairwise(found))
    assert count(found) == len(rows_of(found))


@given(ranges, st.integers(0, 30), st.integers(0, 30))
def test_clip_keeps_the_rows_between(given_ranges: list[tuple[int, int]], lo: int, hi: int) -> None:
    found = union(given_ranges)
    assert rows_of(clip(found, lo, hi)) == [i for i in rows_of(found) if lo <= i < hi]


@given(ranges)
def test_a_view_holds_the_positions_of_the_rows_it_was_made_from(given_ranges: list[tuple[int, int]]) -> None:
    runs = (Run(0, 3, 10, 2, 0), Run(1, 0, 1, 2, 10), Run(4, 7, 20, 2, 11))
    memory = [(run.doc, run.start + i * run.step) for run in runs for i in range(run.n)]
    rows = clip(union(given_ranges), 0, len(memory))
    seen = view(runs, rows)
    assert [(r.doc, r.start + i * r.step) for r in seen for i in range(r.n)] == [memory[i] for i in rows_of(rows)]
    assert [r.at for r in seen] == [sum(x.n for x in seen[:i]) for i in range(len(seen))]
