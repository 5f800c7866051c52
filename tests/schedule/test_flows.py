"""Traffic as columns is traffic as tuples, move for move, for all schedules, layouts, masks and settings."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from schedule_cases import Drawn, plain, problems

from seqpar_ring.geometry import Mask, count
from seqpar_ring.layout import LAYOUTS
from seqpar_ring.schedule import (
    BUILDERS,
    Block,
    Flows,
    Move,
    MoveColumns,
    Needs,
    Traffic,
    choose,
    flows,
    return_flows,
    rows_sent,
    transpose,
)

Table = list[tuple[int, ...]]
DOCUMENTS = ([40], [3, 1], [17, 1, 30, 5], [8, 8, 8])
MASKS = (Mask(), Mask(causal=False), Mask(window=7), Mask(causal=False, window=(3, 0)), Mask(chunk=9))


class Told(NamedTuple):
    """A traffic as plain numbers, whichever form it had."""

    world: int
    steps: int
    travels: str
    uses: Table
    kv: Table
    dkv: Table


def of_flows(found: Flows, needs: Needs) -> Told:
    """Columns, row by row; a rank's own rows by their numbers. Blocks are told as in `of_traffic`."""
    uses, kv, dkv = (np.stack(columns, axis=1).tolist() for columns in (found.uses, found.kv, found.dkv))

    def used(rank: int, owner: int, first: int, end: int) -> tuple[int, ...]:
        return (needs.own[owner][first], needs.own[owner][end]) if rank == owner else tuple(range(first, end))

    told = [(step, rank, owner, *used(rank, owner, first, end)) for step, rank, owner, first, end in uses]
    first: dict[tuple[int, ...], int] = {}
    for _, _, _, dst, owner, piece, _, alike in kv:
        first[owner, piece, alike] = min(dst, first.get((owner, piece, alike), dst))
    tables = ([(*move[:7], first[move[4], move[5], move[7]]) for move in table] for table in (kv, dkv))
    return Told(found.world, found.steps, found.travels, told, *tables)


def of_traffic(traffic: Traffic, needs: Needs) -> Told:
    """Tuples, with a block told by its owner, its piece, its number of rows and the first rank that it goes to."""

    def piece(owner: int, first: int) -> int:
        return next(p for p, part in enumerate(needs.parts[owner]) if any(a <= first < b for a, b in part))

    def used(rank: int, block: Block) -> tuple[int, ...]:
        if rank == block.owner:
            [rows] = block.rows
            return rows
        [found] = {piece(block.owner, row) for a, b in block.rows for row in range(a, b)}
        return (found,)

    uses = [(step, rank, block.owner, *used(rank, block)) for step, rank, block in traffic.uses]
    first = {block: min(m.dst for m in traffic.kv if m.block == block) for block in {m.block for m in traffic.kv}}

    def told(move: Move) -> tuple[int, ...]:
        owner, rows = move.block
        return (*move[:4], owner, piece(owner, rows[0][0]), count(rows), first[move.block])

    kv, dkv = (list(map(told, moves)) for moves in (traffic.kv, traffic.dkv))
    return Told(traffic.world, traffic.steps, traffic.travels, uses, kv, dkv)


def both(drawn: Drawn, node: int | None = None, travels: str = "kv") -> tuple[tuple[Told, Told], tuple[Told, Told]]:
    """Forward and backward traffic of a problem, each as columns and as tuples."""
    q, k, regions = drawn.sides
    home, cargo, mask = (q, k, regions) if travels == "kv" else (k, q, regions.transposed())
    needs = Needs(home, cargo, mask, drawn.pieces)
    node = drawn.fabric.node if node is None else node
    flight = 1 if drawn.pieces.number == 1 else 2
    (traffic, found), (outward, found_outward) = (
        (
            choose(drawn.name, needs, drawn.fabric, travels, returns)[0],
            flows(drawn.name, needs, drawn.fabric, travels, returns),
        )
        for returns in (False, True)
    )
    back, found_back = transpose(outward, node, flight), return_flows(found_outward, node, flight)
    assert found.rows_sent == rows_sent(traffic) == rows_sent(back)
    assert found_back.kv is found_outward.kv
    told = of_flows(found, needs), of_traffic(traffic, needs)
    return told, (of_flows(found_back, needs), of_traffic(back, needs))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("how", sorted(BUILDERS))
def test_columns_are_the_tuples_for_every_setting(how: str, layout: str, world: int) -> None:
    nodes = [n for n in (1, 2, 4, 8) if world % n == 0] if how == "double_ring" else [1, world]
    cases = 0
    for lengths, mask, node, block_tokens in itertools.product(DOCUMENTS, MASKS, nodes, (None, 3, 13, 40)):
        options = {"node": node} if block_tokens is None else {"node": node, "block_tokens": block_tokens}
        for columns, tuples in both(plain(layout, lengths, world, mask, how, **options)):
            assert columns == tuples, (lengths, mask, node, block_tokens)
            cases += len(columns.uses)
    assert cases, "nothing was compared"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems())
def test_columns_are_the_tuples_for_whatever_is_drawn(drawn: Drawn) -> None:
    for travels in ("kv", "q"):
        for node in {1, drawn.fabric.node, drawn.fabric.world}:
            for columns, tuples in both(drawn, node, travels):
                assert columns == tuples


def test_ranks_without_tokens_send_nothing_and_use_nothing() -> None:
    drawn = plain("contiguous", [3], 8)
    (columns, tuples), (back, tuples_back) = both(drawn)
    assert columns == tuples
    assert back == tuples_back
    assert {use[1] for use in columns.uses} == {rank for rank, n in enumerate(drawn.sides.q.sizes) if n}
    assert 0 < len({use[1] for use in columns.uses}) < 8


def test_a_ring_of_a_thousand_ranks_is_built_as_columns() -> None:
    drawn = plain("zigzag", [1024 * 64], 1024)
    q, k, regions = drawn.sides
    found = return_flows(flows("ring", Needs(q, k, regions), drawn.fabric), 1024)
    # Zigzag, causal: all ranks meet all blocks, and every gradient that is made away from home travels once.
    assert len(found.uses.step) == 1024**2
    assert len(found.kv.post) == 1024 * 1023
    assert len(found.dkv.post) == 1024 * 1023
    assert (found.kv.due == found.kv.post + 1).all()
    assert ((found.kv.dst - found.kv.src) % 1024 == 1).all() or ((found.kv.src - found.kv.dst) % 1024 == 1).all()


def one_step_late(moves: MoveColumns) -> MoveColumns:
    return moves._replace(due=moves.due + (np.arange(len(moves.due)) == 1))


def one_move_lost(moves: MoveColumns) -> MoveColumns:
    return moves.take(slice(1, None))


def one_row_more(moves: MoveColumns) -> MoveColumns:
    return moves._replace(rows=moves.rows + (np.arange(len(moves.rows)) == 0))


def sent_elsewhere(moves: MoveColumns) -> MoveColumns:
    return moves._replace(dst=np.where(np.arange(len(moves.dst)) == 2, (moves.dst + 1) % 4, moves.dst))


@pytest.mark.parametrize("side", ["kv", "dkv"])
@pytest.mark.parametrize("fault", [one_step_late, one_move_lost, one_row_more, sent_elsewhere])
def test_a_seeded_fault_is_seen(fault: Callable[[MoveColumns], MoveColumns], side: str) -> None:
    drawn = plain("zigzag", [40], 4)
    q, k, regions = drawn.sides
    needs = Needs(q, k, regions)
    right = return_flows(flows("ring", needs, drawn.fabric), 4)
    expected = of_traffic(transpose(choose("ring", needs, drawn.fabric)[0], 4), needs)
    assert of_flows(right, needs) == expected
    assert of_flows(right._replace(**{side: fault(getattr(right, side))}), needs) != expected


def test_the_rule_of_the_way_home_is_seen_to_matter() -> None:
    drawn = plain("zigzag", [80], 8)
    q, k, regions = drawn.sides
    needs = Needs(q, k, regions)
    found = flows("ring", needs, drawn.fabric)
    homes = {node: of_flows(return_flows(found, node), needs).dkv for node in (1, 4, 8)}
    assert all(dst == owner for _, _, _, dst, owner, *_ in homes[1]), "nodes of one: all straight home"
    assert len({str(home) for home in homes.values()}) == 3
