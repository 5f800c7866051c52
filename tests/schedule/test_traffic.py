"""Every layout, mask, piece count and backward route makes a schedule that passes the checker, with few calls."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqpar_ring import layout as layouts
from seqpar_ring import schedule
from seqpar_ring.geometry import Band, Tile, causal, full
from seqpar_ring.schedule import Block, Call, Move, Traffic, Use


def make(name: str, lengths: list[int], world: int, band: Band, pieces: int = 1) -> tuple[layouts.Layout, Traffic]:
    layout = layouts.make(name, lengths, world)
    wanted = schedule.needs(layout, band)
    return layout, schedule.choose("ring", wanted, layouts.tokens(layout), pieces)[0]


masks = st.one_of(st.just(full()), st.just(causal()), st.integers(1, 50).map(causal))


@given(
    name=st.sampled_from(sorted(layouts.LAYOUTS)),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    world=st.integers(1, 8),
    band=masks,
    pieces=st.integers(1, 3),
    node=st.sampled_from([1, 2, 8]),
)
def test_any_schedule_passes_the_checker_forward_and_backward(
    name: str, lengths: list[int], world: int, band: Band, pieces: int, node: int
) -> None:
    layout, forward = make(name, lengths, world, band, pieces)
    backward = schedule.transpose(forward, node)
    schedule.check(forward, layout, lengths, band)
    schedule.check(backward, layout, lengths, band)
    assert (backward.kv, backward.uses) == (forward.kv, forward.uses)


def test_a_ring_holds_two_received_blocks_whatever_its_size() -> None:
    for world in (4, 8, 16):
        layout, forward = make("zigzag", [320], world, causal())
        assert schedule.check(forward, layout, [320], causal())["kv"] == 2


def test_a_schedule_prints_as_itself() -> None:
    _, forward = make("zigzag", [13, 5], 3, causal())
    backward = schedule.transpose(forward, 3)
    names = {"Traffic": Traffic, "Use": Use, "Move": Move, "Block": Block}
    assert eval(repr(backward), names) == backward
    assert hash(backward) == hash(eval(repr(backward), names))


@pytest.mark.parametrize("name", sorted(layouts.LAYOUTS))
@pytest.mark.parametrize("lengths", [[97], [31, 1, 64, 7, 7, 50]])
def test_one_kernel_call_a_step_for_causal_layouts_however_many_documents(name: str, lengths: list[int]) -> None:
    layout, forward = make(name, lengths, 4, causal())
    for use in forward.uses:
        found = schedule.calls(layout[use.rank], layout[use.block.owner], use.block.rows, causal())
        assert len(found) == 1


def test_calls_are_slices_with_cumulative_lengths_and_empty_segments() -> None:
    (call,) = schedule.coalesce([Tile(1, 4, 0, 3, -3, 0), Tile(6, 9, 5, 8, -3, 0)])
    assert call == Call(1, 0, call.left, 0, (0, 3, 5, 5, 8), (0, 3, 3, 5, 8))
    assert (call.q1, call.k1, call.windowed) == (9, 8, False)


def test_documents_that_one_rank_holds_whole_are_never_sent() -> None:
    _, forward = make("contiguous", [10, 10, 10, 10], 4, causal())
    assert forward.kv == ()
    assert schedule.rows_sent(forward) == 0


def test_a_window_sends_only_the_rows_that_somebody_sees() -> None:
    _, forward = make("contiguous", [400], 4, causal(10))
    assert schedule.rows_sent(forward) == 3 * 9


def test_zigzag_in_two_pieces_sends_three_quarters_of_a_full_ring() -> None:
    _, forward = make("zigzag", [1600], 8, causal(), pieces=2)
    assert schedule.rows_sent(forward) / (7 * 1600) == pytest.approx(0.75, abs=0.04)


def test_every_use_away_from_home_returns_one_gradient() -> None:
    _, forward = make("striped", [50], 4, causal())
    away = [u for u in forward.uses if u.rank != u.block.owner]
    for node in (1, 2, 4):
        assert len(schedule.transpose(forward, node).dkv) == len(away)


def test_the_travelling_gradient_comes_home_once_and_the_direct_one_each_time() -> None:
    _, forward = make("striped", [48], 4, causal())
    home = {node: sum(m.dst == m.block.owner for m in schedule.transpose(forward, node).dkv) for node in (1, 4)}
    assert home[4] < home[1]
