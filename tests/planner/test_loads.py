"""The work that the planner prices is what the executor does: pairs, rows and calls against `schedule.work`."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from seqpar_ring import layout as layouts
from seqpar_ring.config import Settings
from seqpar_ring.geometry import Mask, Tile, area
from seqpar_ring.planner.loads import Loads, loads
from seqpar_ring.schedule import Call, Route, Sides, work

LENGTHS = ((1,), (37,), (64, 1, 3), (5, 40, 2, 2, 29))
MASKS = (Mask(), Mask(causal=False), Mask(window=7), Mask(chunk=9), Mask(causal=False, window=(3, 2)))


def pairs(call: Call) -> int:
    """Pairs that a kernel computes in a call, segment by segment."""
    total = 0
    for q0, q1, k0, k1 in zip(call.cu_q, call.cu_q[1:], call.cu_k, call.cu_k[1:], strict=False):
        m, n = q1 - q0, k1 - k0
        if m and n:
            shift = n - m
            total += area(Tile(0, m, 0, n, max(shift - call.left, -m), min(shift + call.right, n)))
    return total


def both(
    lengths: tuple[int, ...], mask: Mask, travels: str, backward: bool = True, **settings: object
) -> tuple[Loads, Loads]:
    """What the planner counts, and what all ranks' calls hold."""
    chosen = Settings.parse(settings)
    side = layouts.make(chosen.layout, lengths, chosen.size)
    sides = Sides(side, side, mask.regions(lengths))
    route = Route.of(chosen, sides)
    counted = loads(route.flows(backward, travels), sides, route.cut(backward))
    traffic = route.backward(travels) if backward else route.forward(travels)[0]
    found = Loads(*(np.zeros_like(column) for column in counted))
    for rank in range(chosen.size):
        for step, done in work(traffic, rank, sides).items():
            found.pairs[step, rank] = sum(map(pairs, done.calls))
            found.calls[step, rank] = len(done.calls)
            if not done.calls:
                continue
            q = max(c.q1 for c in done.calls) - min(c.q0 for c in done.calls)
            k = max(c.k1 for c in done.calls) - min(c.k0 for c in done.calls)
            found.home[step, rank], found.cargo[step, rank] = (q, k) if travels == "kv" else (k, q)
    return counted, found


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("schedule", ["ring", "direct", "all_gather", "double_ring"])
def test_every_pair_is_priced_where_it_is_computed(mask: Mask, schedule: str) -> None:
    for lengths, world, layout, travels in product(LENGTHS, (1, 2, 3, 4, 8), layouts.LAYOUTS, ("kv", "q")):
        if (schedule == "double_ring" and world % 2) or (mask.window and layout == "striped" and world > 4):
            continue
        node = 2 if schedule == "double_ring" else None
        for block in ("auto", 3, 1000):
            counted, found = both(
                lengths, mask, travels, size=world, layout=layout, schedule=schedule, node=node, block_tokens=block
            )
            where = (lengths, world, layout, travels, block)
            assert (counted.pairs == found.pairs).all(), where
            assert (counted.home == found.home).all(), where


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("layout", sorted(layouts.LAYOUTS))
def test_forward_is_priced_too_whose_last_piece_goes_in_two_parts(mask: Mask, layout: str) -> None:
    for lengths, world, block in product(LENGTHS, (1, 2, 4), ("auto", 2, 3, 1000)):
        if mask.window and layout == "striped" and world > 2:
            continue
        counted, found = both(lengths, mask, "kv", backward=False, size=world, layout=layout, block_tokens=block)
        assert (counted.pairs == found.pairs).all(), (lengths, world, block)
        assert (counted.home == found.home).all(), (lengths, world, block)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "packed", "striped"])
def test_a_step_without_windows_is_priced_as_the_one_call_that_it_is(layout: str) -> None:
    for lengths, world in product(LENGTHS, (2, 4, 8)):
        counted, found = both(lengths, Mask(), "kv", size=world, layout=layout)
        assert (counted.calls == found.calls).all(), (lengths, world)
        assert (counted.cargo >= found.cargo).all()


def test_a_wrong_mask_would_show() -> None:
    counted, _ = both((37,), Mask(), "kv", size=4)
    _, other = both((37,), Mask(window=30), "kv", size=4)
    assert (counted.pairs != other.pairs).any()


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_even_pieces_of_a_causal_zigzag_are_equal_work_for_all_ranks_at_each_step(pieces: int) -> None:
    counted, held = both((3200,), Mask(), "kv", size=4, block_tokens=800 // pieces)
    busy = counted.pairs[counted.pairs.max(1) > 0]
    assert len(busy) == 3 * pieces + pieces // 2 + 1  # own rows before each pair and at the end
    assert (busy.max(1) <= 1.02 * busy.min(1)).all()
    assert np.array_equal(counted.pairs, held.pairs)
    uneven, _ = both((3200,), Mask(), "kv", size=4, block_tokens=800 // pieces, cut="halves")
    assert not (uneven.pairs.max(1) <= 1.02 * uneven.pairs.min(1)).all()
