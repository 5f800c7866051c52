"""The fast forms of planning against the plain ones: which rows travel, and which kernel calls a rank makes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from schedule_cases import Drawn, plain, problems

from seqpar_ring import layout as layouts
from seqpar_ring import schedule
from seqpar_ring.geometry import Band, Mask, Rows, by_document, clip, tile, union, view, within
from seqpar_ring.schedule import Block, Call, Needs

Token = tuple[int, int]
"""(document, position)."""


def rows_needed(problem: Drawn, travels: str, rank: int, owner: int, piece: int) -> Rows:
    """What `Needs` works out as columns, one run at a time."""
    q, k, regions = problem.sides
    home, cargo = (q, k) if travels == "kv" else (k, q)
    found = []
    for region in regions if travels == "kv" else regions.transposed():
        mine = [part for run in home[rank] if run.doc == region.doc and (part := within(run, region.q0, region.q1))]
        for run in by_document(cargo[owner]).get(region.doc, ()):
            theirs = within(run, region.k0, region.k1)
            tiles = [t for m in mine if theirs and (t := tile(m, theirs, Band(region.lo, region.hi)))]
            found += [(t.k0, t.k1) for t in tiles]
    whole = union(found)
    return union(part for a, b in problem.pieces.of(cargo.sizes[owner])[piece] for part in clip(whole, a, b))


@settings(max_examples=200, deadline=None)
@given(problems())
def test_needs_are_those_of_every_pair_of_runs(problem: Drawn) -> None:
    q, k, regions = problem.sides
    for travels in ("kv", "q"):
        home, cargo, mask = (q, k, regions) if travels == "kv" else (k, q, regions.transposed())
        needs, world = Needs(home, cargo, mask, problem.pieces), len(q)
        for owner in range(world):
            for piece in range(problem.pieces.number):
                expected = {r: rows_needed(problem, travels, r, owner, piece) for r in range(world) if r != owner}
                assert needs.by_rank(owner, piece) == {r: rows for r, rows in expected.items() if rows}
                assert all(bool(needs.wanted[r, owner, piece]) == (rows != ()) for r, rows in expected.items())
                assert not needs.wanted[owner, owner, piece]
                assert needs.anybody(owner, piece) == union(part for rows in expected.values() for part in rows)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_the_calls_of_all_steps_hold_the_tiles_of_each_use(problem: Drawn) -> None:
    """Cell by cell: what a rank's calls compute is what the mask allows between its rows and the blocks it uses."""
    q, k, _ = problem.sides
    for travels in ("kv", "q"):
        traffic = problem.traffic(travels)
        for rank in range(len(q)):
            for step, work in schedule.work(traffic, rank, problem.sides).items():
                assert list(work.blocks) == [u.block for u in traffic.uses if (u.rank, u.step) == (rank, step)]
                own = tokens_of((q if travels == "kv" else k)[rank])
                buffers = [tokens_of(view((k if travels == "kv" else q)[b.owner], b.rows)) for b in work.blocks]
                seen = [x for b, i, j in work.slices for x in buffers[b][i:j]] if work.slices else buffers[0]
                rows = (own, seen) if travels == "kv" else (seen, own)
                assert sorted(cells(work.calls, *rows)) == sorted(allowed(problem, *rows))


def tokens_of(runs: Sequence[layouts.Run]) -> list[Token]:
    return [(run.doc, run.start + i * run.step) for run in runs for i in range(run.n)]


def cells(calls: Sequence[Call], queries: list[Token], keys: list[Token]) -> Iterator[tuple[Token, Token]]:
    """What the kernel computes, by the definition of a call."""
    for call in calls:
        for a, b, c, d in zip(call.cu_q, call.cu_q[1:], call.cu_k, call.cu_k[1:], strict=False):
            for i in range(b - a):
                for j in range(d - c):
                    if -call.left <= (j - i) - (d - c - b + a) <= call.right:
                        yield queries[call.q0 + a + i], keys[call.k0 + c + j]


def allowed(problem: Drawn, queries: list[Token], keys: list[Token]) -> Iterator[tuple[Token, Token]]:
    """What the mask says, pair by pair."""
    for region in problem.sides.regions:
        for q in queries:
            for k in keys:
                inside = region.doc == q[0] == k[0] and region.q0 <= q[1] < region.q1 and region.k0 <= k[1] < region.k1
                if inside and region.lo <= k[1] - q[1] <= region.hi:
                    yield q, k


@pytest.mark.parametrize("name", sorted(layouts.LAYOUTS))
@pytest.mark.parametrize("how", sorted(schedule.BUILDERS))
@pytest.mark.parametrize("lengths", [[97], [31, 1, 64, 7, 7, 50]])
def test_one_kernel_call_a_step_for_causal_layouts_however_many_documents(
    name: str, how: str, lengths: list[int]
) -> None:
    problem = plain(name, lengths, 4, how=how, node=2)
    for rank in range(4):
        for work in schedule.work(problem.traffic(), rank, problem.sides).values():
            assert len(work.calls) == 1


def test_three_blocks_that_arrive_together_are_one_view_in_order_and_two_calls_at_most() -> None:
    """A rank's two chunks of zigzag see the first so many of the keys that came, and those overlap."""
    problem = plain("zigzag", [800, 40], 8, block_tokens=330)
    assert problem.fabric.hops == 3
    works = [schedule.work(problem.traffic(), rank, problem.sides) for rank in range(8)]
    assert {len(work) for work in works} == {4}  # its own, two neighbours, then three, then the last two
    assert max(len(step.calls) for work in works for step in work.values()) == 2


def test_a_window_or_a_chunk_needs_few_calls_on_one_long_document() -> None:
    for mask in (Mask(window=30), Mask(chunk=64)):
        problem = plain("zigzag", [1024], 4, mask)
        calls = [w.calls for rank in range(4) for w in schedule.work(problem.traffic(), rank, problem.sides).values()]
        assert max(map(len, calls)) <= 2


def test_a_view_names_the_block_of_each_slice() -> None:
    layout = layouts.make("zigzag", [16], 2)
    blocks = tuple(Block(owner, ((0, 8),)) for owner in range(2))
    assert schedule.view_runs(layout, blocks).start.tolist() == [0, 4, 8, 12]
    traffic = schedule.Traffic(2, 1, tuple(schedule.Use(0, 0, block) for block in blocks), ())
    (work,) = schedule.work(traffic, 0, schedule.Sides(layout, layout, Mask().regions([16]))).values()
    assert work.slices == ((0, 0, 4), (1, 0, 8), (0, 4, 8))
