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


class Places(NamedTuple):
    """Memory of so many rows, and the row of it at which each thing begins."""

    rows: int
    of: Mapping[Thing, int]


class Buffers(NamedTuple):
    """The memory of one rank for one pass, by content.

    Attributes:
        received: keys and values of others (or queries, where they travel), by the transfer they come with.
        returned: gradients that come in, by transfer.
        made: partial gradients of others' rows, by block.
        narrowed: gradients that go out in another dtype than they are summed in, by transfer.
        copied: own rows that go out in another form than they lie in memory, by transfer.
        scattered: of those, the ones whose rows do not lie together.
        view: rows of the largest step whose blocks do not lie together.
        coded: rows of the largest step, whatever its blocks.
    """

    received: Places
    returned: Places
    made: Places
    narrowed: Places
    copied: Places
    scattered: Places
    view: int
    coded: int


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
    returned = [_on_its_way(move) for move in traffic.dkv if move.dst == rank]
    narrowed = [_on_its_way(move) for move in traffic.dkv if move.src == rank]
    own = [move for move in traffic.kv if move.src == rank == move.block.owner]
    copied, scattered = ([_on_its_way(m) for m in own if len(m.block.rows) >= least] for least in (0, 2))
    sizes = [(_laid_together(step, rank), _rows(step)) for step in work.values()]
    view = max((rows for together, rows in sizes if together), default=0)
    coded = max((rows for _, rows in sizes), default=0)
    return Buffers(
        received=places(received),
        returned=places(returned),
        made=places(made),
        narrowed=places(narrowed),
        copied=places(copied),
        scattered=places(scattered),
        view=view,
        coded=coded,
    )


def places(things: Iterable[Life]) -> Places:
    """A place for each thing, none shared by two that are alive in one step.

    In order of their first steps each gets the smallest gap that holds it, the lowest of equal ones. Things of one size
    need no more rows than are alive at once; of different sizes they may need a little more.
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
    return Places(end, of)


def _with_gap(gaps: list[tuple[int, int]], a: int, b: int) -> list[tuple[int, int]]:
    """The gaps and one more, joined with those it touches."""
    touching = [gap for gap in gaps if gap[1] == a or gap[0] == b]
    joined = min([a, *(gap[0] for gap in touching)]), max([b, *(gap[1] for gap in touching)])
    return sorted([*(gap for gap in gaps if gap not in touching), joined])


def _on_its_way(move: Move) -> Life:
    return Life(move.post, move.due - 1, count(move.block.rows), move)


def _laid_together(work: Work, rank: int) -> bool:
    """Whether the blocks of a step must be copied, to lie in memory as its calls see them."""
    return bool(work.slices) or (work.blocks[0].owner == rank and len(work.blocks[0].rows) > 1)


def _rows(work: Work) -> int:
    return sum(b - a for _, a, b in work.slices) if work.slices else count(work.blocks[0].rows)
