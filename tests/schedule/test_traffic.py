"""Every layout, mask, schedule, piece count and backward route makes a traffic that passes the checker."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_cases import Drawn, plain, problems

from seqpar_ring import layout as layouts
from seqpar_ring import schedule
from seqpar_ring.geometry import Mask, Tile, count
from seqpar_ring.schedule import CUTS, Block, Granularity, Move, Pieces, Traffic, Use, rows_sent

LAYOUTS, SCHEDULES = sorted(layouts.LAYOUTS), sorted(schedule.BUILDERS)


@settings(max_examples=300, deadline=None)
@given(problem=problems(), travels=st.sampled_from(["kv", "q"]))
def test_any_schedule_passes_the_checker_forward_and_backward(problem: Drawn, travels: str) -> None:
    outward = problem.traffic(travels, returns=True)
    backward = schedule.transpose(outward, problem.fabric.node)
    schedule.check(problem.traffic(travels), problem.sides)
    schedule.check(backward, problem.sides)
    assert (backward.kv, backward.uses) == (outward.kv, outward.uses)


@pytest.mark.parametrize("world", [4, 8, 16])
def test_a_ring_holds_two_received_blocks_whatever_its_size(world: int) -> None:
    problem = plain("zigzag", [320], world)
    assert schedule.check(problem.traffic(), problem.sides)["kv"] == 2


def test_an_all_gather_holds_all_blocks_and_direct_two() -> None:
    problems_by_name = {how: plain("striped", [320], 8, how=how) for how in SCHEDULES}
    held = {how: schedule.check(p.traffic(), p.sides)["kv"] for how, p in problems_by_name.items()}
    assert held == {"all_gather": 7, "direct": 2, "double_ring": 2, "ring": 2}


def test_a_double_ring_sends_between_nodes_from_every_rank_and_a_round_ahead() -> None:
    problem = plain("striped", [320], 8, how="double_ring", node=4)
    far = [move for move in problem.traffic().kv if move.src // 4 != move.dst // 4]
    assert sorted(move.src for move in far) == list(range(8))
    assert {(move.post, move.due) for move in far} == {(0, 4)}
    assert {move.src % 4 - move.dst % 4 for move in far} == {0}


def test_a_double_ring_returns_one_sum_from_each_node() -> None:
    def between_nodes(backward: Traffic) -> int:
        return sum(count(m.block.rows) for m in backward.dkv if m.src // 4 != m.dst // 4)

    forward = plain("striped", [320], 8, how="double_ring", node=4).traffic()
    assert between_nodes(schedule.transpose(forward, 4)) * 4 == between_nodes(schedule.transpose(forward, 1))


def test_a_schedule_prints_as_itself() -> None:
    backward = schedule.transpose(plain("zigzag", [13, 5], 3).traffic(), 3)
    names = {"Traffic": Traffic, "Use": Use, "Move": Move, "Block": Block}
    assert eval(repr(backward), names) == backward
    assert hash(backward) == hash(eval(repr(backward), names))


def test_calls_are_slices_with_cumulative_lengths_and_empty_segments() -> None:
    (call,) = schedule.coalesce([Tile(1, 4, 0, 3, -3, 0), Tile(6, 9, 5, 8, -3, 0)])
    assert call == schedule.Call(1, 0, call.left, 0, (0, 3, 5, 5, 8), (0, 3, 3, 5, 8))
    assert (call.q1, call.k1, call.windowed) == (9, 8, False)


def test_documents_that_one_rank_holds_whole_are_never_sent() -> None:
    assert plain("contiguous", [10, 10, 10, 10], 4).traffic().kv == ()
    assert plain("packed", [10] * 40, 4).traffic().kv == ()


def test_a_window_sends_only_the_rows_that_somebody_sees() -> None:
    assert rows_sent(plain("contiguous", [400], 4, Mask(window=10)).traffic()) == 3 * 9


def test_chunks_send_nothing_where_they_lie_on_one_rank_and_a_prefix_only_itself() -> None:
    assert plain("contiguous", [400], 4, Mask(chunk=50)).traffic().kv == ()
    causal = plain("striped", [400], 4, how="direct").traffic()
    assert rows_sent(plain("striped", [400], 4, Mask(prefix=400), how="direct").traffic()) > rows_sent(causal)


def test_zigzag_in_two_pieces_sends_three_quarters_of_a_full_ring() -> None:
    problem = plain("zigzag", [1600], 8, cut="halves", block_tokens=100)
    assert problem.pieces.number == 2
    assert rows_sent(problem.traffic()) / (7 * 1600) == pytest.approx(0.75, abs=0.04)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 64])
@pytest.mark.parametrize("number", [1, 2, 3, 8])
def test_pieces_hold_every_row_once(number: int, rows: int, cut: str) -> None:
    for pieces in (Pieces(number, cut), Pieces(number, cut).with_taper()):
        parts = pieces.of(rows)
        assert len(parts) == pieces.number
        assert sorted(row for part in parts for a, b in part for row in range(a, b)) == list(range(rows))
        own = pieces.own(rows)
        assert (len(own), own[0], own[-1]) == (pieces.number + 1, 0, rows)
        assert own == sorted(own)


def test_a_taper_cuts_the_last_piece_in_two() -> None:
    assert Pieces(2).with_taper().of(16) == [((0, 4), (8, 12)), ((4, 6), (12, 14)), ((6, 8), (14, 16))]
    assert Pieces(2, "halves").with_taper().of(8) == [((0, 4),), ((4, 6),), ((6, 8),)]
    assert Pieces(1).with_taper() == Pieces(1)


def test_even_pieces_take_from_both_halves_and_halves_one_after_the_other() -> None:
    assert Pieces(2).of(8) == [((0, 2), (4, 6)), ((2, 4), (6, 8))]
    assert Pieces(2, "halves").of(8) == [((0, 4),), ((4, 8),)]
    assert Pieces(1).of(8) == [((0, 8),)]


@pytest.mark.parametrize("how", SCHEDULES)
def test_every_use_away_from_home_returns_one_gradient(how: str) -> None:
    forward = plain("striped", [50], 4, how=how, node=2).traffic()
    away = [u for u in forward.uses if u.rank != u.block.owner]
    for node in (1, 2, 4):
        assert len(schedule.transpose(forward, node).dkv) == len(away)


def test_the_travelling_gradient_comes_home_once_and_the_direct_one_each_time() -> None:
    forward = plain("striped", [48], 4).traffic()
    home = {node: sum(m.dst == m.block.owner for m in schedule.transpose(forward, node).dkv) for node in (1, 4)}
    assert home == {1: 12, 4: 4}


def test_blocks_that_arrive_together_come_in_jumps_and_return_as_travelling_sums() -> None:
    forward = plain("striped", [640], 8, block_tokens=240).traffic()
    assert forward.steps == 4
    assert {(m.dst - m.src) % 8 for m in forward.kv if m.post} == {3}
    home = [m for m in schedule.transpose(forward, 8).dkv if m.dst == m.block.owner]
    assert len(home) == 3 * 8  # one sum of each of the three chains that a block goes in


@pytest.mark.parametrize(
    ("asked", "found"),
    [(None, (1, 1)), (100, (1, 1)), (99, (2, 1)), (25, (4, 1)), (250, (1, 2)), (10**6, (1, 7))],
)
def test_block_tokens_come_to_pieces_or_hops(asked: int | None, found: tuple[int, int]) -> None:
    assert Granularity.of(asked, largest=100, world=8) == found
