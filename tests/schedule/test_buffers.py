"""Planned memory: no two things that are held in one step share a row, and hardly any row is held for nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_cases import Drawn, plain, problems

from seqpar_ring.geometry import count
from seqpar_ring.schedule import Block, Traffic, buffers, lives, transpose, work
from seqpar_ring.schedule.buffers import Life, Places, places


def block(number: int, rows: int) -> Block:
    return Block(number, ((0, rows),))


@st.composite
def some_lives(draw: st.DrawFn, sizes: st.SearchStrategy[int]) -> list[Life]:
    found = []
    for number in range(draw(st.integers(0, 30))):
        first, rows = draw(st.integers(0, 12)), draw(sizes)
        found.append(Life(first, first + draw(st.integers(0, 5)), rows, block(number, rows)))
    return found


def at_once(things: list[Life]) -> int:
    """Rows held in the step in which most are."""
    return max((sum(x.rows for x in things if x.first <= step <= x.last) for step in range(20)), default=0)


def shared(things: list[Life], found: Places) -> list[tuple[Life, Life]]:
    """Pairs that are held in one step and lie in one row."""
    def clash(x: Life, y: Life) -> bool:
        a, b = found.of[x.thing].first, found.of[y.thing].first
        together = x.first <= y.last and y.first <= x.last and x.rows > 0 and y.rows > 0
        return together and a < b + y.rows and b < a + x.rows

    return [(x, y) for i, x in enumerate(things) for y in things[:i] if clash(x, y)]


@given(some_lives(st.integers(0, 9)))
def test_no_two_things_that_are_held_at_once_share_a_row(things: list[Life]) -> None:
    found = places(things)
    assert shared(things, found) == []
    assert all(found.of[x.thing].first + x.rows <= found.rows for x in things)
    assert found.rows >= at_once(things)


@given(some_lives(st.just(7)))
def test_things_of_one_size_need_no_more_rows_than_are_held_at_once(things: list[Life]) -> None:
    assert places(things).rows == at_once(things)


@pytest.mark.parametrize("world", [2, 3, 4, 5, 8, 9, 16])
@pytest.mark.parametrize("pieces", [1, 4])
def test_a_causal_zigzag_holds_no_more_than_two_blocks_of_others(world: int, pieces: int) -> None:
    """Rank 0's block goes round as a half: it must not leave the whole ones that follow without a place."""
    drawn = plain("zigzag", [64 * world], world, block_tokens=64 // pieces)
    traffic = drawn.traffic()
    for rank in range(world):
        assert buffers(traffic, rank, work(traffic, rank, drawn.sides)).rows.rows <= 2 * 64


@settings(max_examples=30)
@given(some_lives(st.just(3)).filter(lambda things: any(x.last < y.first for x in things for y in things)))
def test_a_life_planned_too_short_shows(things: list[Life]) -> None:
    """The seeded fault: a buffer that is given away while it is still read."""
    early = [x._replace(last=x.first) for x in things]
    if at_once(early) < at_once(things):
        assert shared(things, places(early))


def passes(drawn: Drawn, node: int) -> list[tuple[Traffic, bool]]:
    keys, queries = (transpose(drawn.traffic(travels, returns=True), node) for travels in ("kv", "q"))
    return [(drawn.traffic(), False), (keys, False), (queries, True)]


@given(problems(), st.sampled_from([1, 2, 4]))
def test_everything_a_pass_holds_has_a_place_and_views_hold_whole_blocks(drawn: Drawn, node: int) -> None:
    node = node if drawn.fabric.world % node == 0 else 1
    for traffic, _ in passes(drawn, node):
        for rank in range(traffic.world):
            alive, steps = lives(traffic, rank), work(traffic, rank, drawn.sides)
            found = buffers(traffic, rank, steps)
            for places_, own in ((found.rows, 2), (found.rows_and_copies, 1)):
                sent = {m.block for m in traffic.kv if m.src == rank == m.block.owner and len(m.block.rows) >= own}
                assert set(places_.of) == sent | {m for m in traffic.kv if m.dst == rank}
            returned = {m for m in traffic.dkv if m.dst == rank}
            assert set(found.sums.of) == {one for _, _, one in alive["made"]}
            assert set(found.sums_and_returned.of) == set(found.sums.of) | returned
            assert set(found.narrow.of) == returned | {m for m in traffic.dkv if m.src == rank}
            for step in steps.values():
                laid: dict[int, list[int]] = {}
                for b, first, end in step.slices:
                    laid.setdefault(b, []).extend(range(first, end))
                assert all(sorted(rows) == list(range(count(step.blocks[b].rows))) for b, rows in laid.items())
                assert not step.slices or sum(map(len, laid.values())) <= found.view <= found.largest


@settings(max_examples=60)
@given(problems())
def test_blocks_of_different_sizes_need_at_most_half_as_much_again(drawn: Drawn) -> None:
    traffic = transpose(drawn.traffic(returns=True), 1)
    for rank in range(traffic.world):
        alive, found = lives(traffic, rank), buffers(traffic, rank, {})
        for kinds, rows in ((["made"], found.sums.rows), (["made", "got"], found.sums_and_returned.rows)):
            held = [x for kind in kinds for x in alive[kind]]
            most = max(sum(count(b.rows) for a, z, b in held if a <= t <= z) for t in range(traffic.steps + 2))
            assert most <= rows <= 1.5 * most + 4
