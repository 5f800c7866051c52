"""The timetable of pieces: every piece once, two computations for each transfer, own rows at both ends."""

from __future__ import annotations

import pytest

from seqpar_ring.schedule.timetable import AHEAD, Timetable, timetable


def steps_of(table: Timetable, visits: int) -> list[int]:
    """The steps at which something is computed with: own rows, and each visit of each piece."""
    visited = [table.step(p, s) for p in range(len(table.first)) for s in range(1, visits + 1)]
    return sorted([own.step for own in table.own] + visited)


@pytest.mark.parametrize("returning", [None, "kv", "q"])
@pytest.mark.parametrize("visits", [1, 2, 3, 7])
@pytest.mark.parametrize("pieces", [1, 2, 3, 4, 5, 6, 7, 8, 13])
def test_every_step_has_one_computation_and_own_pieces_come_once(
    pieces: int, visits: int, returning: str | None
) -> None:
    table = timetable(pieces, visits, returning)
    found = steps_of(table, visits)
    assert found == list(range(len(found)))
    own = [range(own.first, own.end) for own in table.own]
    assert all(own)
    assert sorted(p for pieces_ in own for p in pieces_) == list(range(pieces))
    assert len(own) == (1 if pieces == 1 else -(-pieces // 2) + (returning is not None))


@pytest.mark.parametrize("returning", [None, "kv", "q"])
@pytest.mark.parametrize("visits", [1, 3, 7])
@pytest.mark.parametrize("pieces", [2, 4, 6, 8])
def test_pieces_in_pairs_have_two_computations_for_each_transfer(
    pieces: int, visits: int, returning: str | None
) -> None:
    table = timetable(pieces, visits, returning)
    for p in range(pieces):
        hops = [table.step(p, s + 1) - table.step(p, s) for s in range(visits)]
        assert all(hop == AHEAD for hop in hops[1:])
        assert hops[0] == min(AHEAD, table.step(p, 1))


FORWARD = [(0, 0, 2), (3, 2, 4), (6, 4, 6), (9, 6, 8)]
KEYS = [(0, 6, 8), (3, 4, 6), (6, 2, 4), (9, 1, 2), (12, 0, 1)]
QUERIES = [(0, 0, 2), (3, 2, 4), (6, 4, 6), (9, 6, 7), (12, 7, 8)]


@pytest.mark.parametrize(("returning", "own"), [(None, FORWARD), ("kv", KEYS), ("q", QUERIES)])
def test_own_rows_come_before_each_pair_and_at_the_end_where_gradients_return(
    returning: str | None, own: list[tuple[int, int, int]]
) -> None:
    """At the end is the piece that under a causal mask has the most work: the first keys, the last queries."""
    table = timetable(8, 1, returning)
    assert list(table.own) == own
    assert table.first == (1, 2, 4, 5, 7, 8, 10, 11)


def test_a_whole_block_goes_one_step_after_the_other() -> None:
    table = timetable(1, visits=3)
    assert table == Timetable(((0, 0, 1),), (1,), (1,), 1)  # type: ignore[arg-type]
    assert [table.step(0, s) for s in range(4)] == [0, 1, 2, 3]
