"""Buffers: where in a rank's memory the rows lie that a pass holds beside the rank's own, planned before it runs.

Every block that arrives, every partial gradient and every copy that is made to be sent has a first and a last step
(`program.lives`); here each also gets a place, so that the executor takes its memory once, when a pass begins, and a
step takes none. Places are counted in rows, one numbering for each kind of content, because how many bytes a row has is
known only with the tensors. A place is free again in the step after its last. No torch, no bytes.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from seqpar_ring.geometry import count
from seqpar_ring.schedule.program import lives
from seqpar_ring.schedule.traffic import Block, Move, Traffic
from seqpar_ring.schedule.work import Work

Thing = Move | Block
"""What has a place: a block, or what a transfer brings or takes."""


class Life(NamedTuple):
    """Something of so many rows that is held from the first of these steps to the last."""

    first: int
    last: int
    rows: int
    thing: Thing


class Place(NamedTuple):
    """The row at which a thing begins, and how many it has."""

    first: int
    rows: int


class Places(NamedTuple):
    """Memory of so many rows, and where in it each thing lies."""

    rows: int
    of: Mapping[Thing, Place]


class Buffers(NamedTuple):
    """The memory of one rank for one pass. What has the same form shares memory, one after the other.

    Attributes:
        rows: keys and values of others (or queries, where they travel), by the transfer that brings them, and copies of
            own blocks whose rows do not lie together, which all transfers of the block share.
        rows_and_copies: the same where all own rows must be copied to be sent.
        sums: partial gradients of others' rows, by block.
        sums_and_returned: the same, and gradients that come in, by transfer.
        narrow: gradients that come in and go out, where they travel in another dtype than they are summed in.
        view: rows of the largest step whose blocks do not lie together.
        largest: rows of the largest step with blocks of others.
    """

    rows: Places
    rows_and_copies: Places
    sums: Places
    sums_and_returned: Places
    narrow: Places
    view: int
    largest: int


def buffers(traffic: Traffic, rank: int, work: Mapping[int, Work]) -> Buffers:
    """The places of everything that a rank holds during a pass, beside its own k, v, dk and dv (or q, dq).

    Args:
        traffic: of the whole group, forward or backward.
        rank: whose memory.
        work: what it computes at each step.
    """
    alive = lives(traffic, rank)
    bringing = {move.block: move for move in traffic.kv if move.dst == rank}
    received = [Life(a, b, count(block.rows), bringing[block]) for a, b, block in alive["kv"]]
    made = [Life(a, b, count(block.rows), block) for a, b, block in alive["made"]]
    returned, sent = ([_on_its_way(m) for m in traffic.dkv if rank == end(m)] for end in (_to, _from))
    copied = _sent(move for move in traffic.kv if move.src == rank == move.block.owner)
    scattered = [life for life in copied if isinstance(life.thing, Block) and len(life.thing.rows) > 1]
    sizes = [(bool(step.slices), _rows(step)) for step in work.values() if step.blocks[0].owner != rank]
    return Buffers(
        rows=places(received + scattered),
        rows_and_copies=places(received + copied),
        sums=places(made),
        sums_and_returned=places(made + returned),
        narrow=places(returned + sent),
        view=max((rows for together, rows in sizes if together), default=0),
        largest=max((rows for _, rows in sizes), default=0),
    )


def places(things: Iterable[Life]) -> Places:
    """A place for each thing, none shared by two that are alive in one step.

    Placed in the order in which they come, things of one size need no more rows than are alive at once. Of different
    sizes they may: a small one leaves a gap that a larger one does not fit. So they are also placed as if all were as
    large as the largest, and whichever needs fewer rows is taken.
    """
    things = list(things)
    largest = max((life.rows for life in things), default=0)
    of_one_size = [life._replace(rows=largest) for life in things]
    end, first = min(_as_they_come(things), _as_they_come(of_one_size), key=lambda found: found[0])
    return Places(end, {life.thing: Place(first[life.thing], life.rows) for life in things})


def _as_they_come(things: Iterable[Life]) -> tuple[int, dict[Thing, int]]:
    """In order of their first steps each gets the smallest gap that holds it, the lowest of equal ones.

    Returns: how many rows that takes, and the first of each.
    """
    end = 0
    of: dict[Thing, int] = {}
    gaps: list[tuple[int, int]] = []  # (first row, end row), ascending, none next to another
    held: list[tuple[int, int, int]] = []  # (last step, first row, rows), ascending
    for first, last, rows, thing in sorted(things, key=lambda life: life[:2]):
        while held and held[0][0] < first:
            _, start, length = held.pop(0)
            gaps = _with_gap(gaps, start, start + length)
        fitting = [(b - a, a) for a, b in gaps if b - a >= rows]
        if fitting:
            size, start = min(fitting)
            gaps.remove((start, start + size))
            if size > rows:
                insort(gaps, (start + rows, start + size))
        else:
            start = gaps.pop()[0] if gaps and gaps[-1][1] == end else end  # the last gap, made larger
            end = start + rows
        of[thing] = start
        insort(held, (last, start, rows))
    return end, of


def _with_gap(gaps: list[tuple[int, int]], a: int, b: int) -> list[tuple[int, int]]:
    """The gaps and one more, joined with those it touches."""
    touching = [gap for gap in gaps if gap[1] == a or gap[0] == b]
    joined = min([a, *(gap[0] for gap in touching)]), max([b, *(gap[1] for gap in touching)])
    return sorted([*(gap for gap in gaps if gap not in touching), joined])


def _from(move: Move) -> int:
    return move.src


def _to(move: Move) -> int:
    return move.dst


def _sent(moves: Iterable[Move]) -> list[Life]:
    """Own blocks from when they first leave until they last have arrived."""
    spans: dict[Block, tuple[int, int]] = {}
    for move in moves:
        first, last = spans.get(move.block, (move.post, move.due - 1))
        spans[move.block] = min(first, move.post), max(last, move.due - 1)
    return [Life(first, last, count(block.rows), block) for block, (first, last) in spans.items()]


def _on_its_way(move: Move) -> Life:
    return Life(move.post, move.due - 1, count(move.block.rows), move)


def _rows(work: Work) -> int:
    return sum(b - a for _, a, b in work.slices) if work.slices else count(work.blocks[0].rows)
