"""Flows: the traffic of a group as columns of numbers, for those who price a schedule and do not run it.

A ring of 1,024 ranks has a million moves in each pass; as tuples they take half a minute to build, as columns a few
seconds. The rules are those of `build` and `transpose`, which run what a rank does and are the oracle that the tests
hold these to, move for move. Only the form differs: of a block's rows only their number is told.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from seqpar_ring.geometry import Ints, Rows, count
from seqpar_ring.schedule.build import timetable_of
from seqpar_ring.schedule.needs import Needs
from seqpar_ring.schedule.timetable import Timetable
from seqpar_ring.schedule.visits import BUILDERS, Builder, Fabric

Flags = NDArray[np.bool_]


class UseColumns(NamedTuple):
    """At `step`, `rank` computes with piece `piece` of `owner`, or with the parts `piece .. end` of its own rows, which
    are cut in their order (`Pieces.own`). See `Use`."""

    step: Ints
    rank: Ints
    owner: Ints
    piece: Ints
    end: Ints


class MoveColumns(NamedTuple):
    """Transfers of `rows` rows of the owner's block. See `Move`.

    Of a piece different ranks may be sent different rows, which are blocks of their own: a block is its owner, its
    piece and `alike`, a number that all transfers of the same rows share.
    """

    post: Ints
    due: Ints
    src: Ints
    dst: Ints
    owner: Ints
    piece: Ints
    rows: Ints
    alike: Ints

    def take(self, index: Ints | Flags | slice) -> MoveColumns:
        """Some of the moves."""
        return MoveColumns(*(column[index] for column in self))


class Flows(NamedTuple):
    """One pass of a group of `world` ranks. See `Traffic`."""

    world: int
    steps: int
    uses: UseColumns
    kv: MoveColumns
    dkv: MoveColumns
    travels: str = "kv"

    @property
    def rows_sent(self) -> int:
        """Rows of the travelling side that all ranks together send in the pass."""
        return int(self.kv.rows.sum())


def flows(name: str, needs: Needs, fabric: Fabric, travels: str = "kv", returns: bool = False) -> Flows:
    """The traffic that `choose` takes: of the schedule of this name, in the variant that sends the fewest rows."""
    every = [_Sent(builder, needs, fabric) for builder in BUILDERS[name].values()]
    best = min(every, key=lambda one: one.total)
    table = timetable_of(best.builder, fabric, needs.pieces, travels if returns else None)
    return _flows(best, needs, table, travels)


def return_flows(forward: Flows, node: int, flight: int = 1) -> Flows:
    """The backward traffic of a forward traffic. See `transpose` for the rule."""
    uses, kv = forward.uses, forward.kv
    block = _Blocks(forward)
    used = np.full((block.number, forward.world), -1)  # the step at which a rank computes with a block
    away = uses.owner != uses.rank
    at, rank, step = block.of(uses.owner, uses.piece)[away], uses.rank[away], uses.step[away]
    used[at, rank] = step
    following = np.full((block.number, forward.world), -1)
    onward = (kv.src != kv.owner) & (kv.src // node == kv.dst // node) & (node > 1)
    # Against the order in which a block is passed on, so that whoever gets it later is known before who sends it there;
    # where a rank passes a block to several, the first of them stands, so it is written last.
    moves = kv.take(np.flatnonzero(onward))
    order = np.lexsort((moves.dst, moves.src, moves.due, moves.post))[::-1]
    moves = moves.take(order)
    for at_once in np.split(np.arange(len(order)), np.flatnonzero(np.diff(moves.post)) + 1):
        part = moves.take(at_once)
        which = block.of(part.owner, part.piece)
        there = np.where(used[which, part.dst] >= 0, part.dst, following[which, part.dst])
        some = there >= 0
        # numpy keeps the last of several values written to one place.
        following[which[some], part.src[some]] = there[some]
    then = following[at, rank]
    direct = then < 0
    joins = used[at, then]
    post, due = step + 1, np.where(direct, step + 1 + flight, joins + 1)
    dst = np.where(direct, uses.owner[away], then)
    owner, piece = uses.owner[away], uses.piece[away]
    dkv = _sorted(MoveColumns(post, due, rank, dst, owner, piece, *block.rows(owner, piece, rank)))
    return forward._replace(dkv=dkv, steps=max(forward.steps, int(dkv.due.max(initial=0))))


class _Blocks:
    """Numbers for the blocks of a traffic: one for each piece of each owner."""

    def __init__(self, forward: Flows) -> None:
        self._pieces = 1 + int(forward.kv.piece.max(initial=0))
        self.number = forward.world * self._pieces
        # Rows by block and receiver: what is sent directly has other rows for each.
        self._rows = np.zeros((2, self.number, forward.world), dtype=np.int64)
        kv = forward.kv
        self._rows[:, self.of(kv.owner, kv.piece), kv.dst] = kv.rows, kv.alike

    def of(self, owner: Ints, piece: Ints) -> Ints:
        number: Ints = owner * self._pieces + piece
        return number

    def rows(self, owner: Ints, piece: Ints, rank: Ints) -> Ints:
        """`rows` and `alike` of what a rank got."""
        rows: Ints = self._rows[:, self.of(owner, piece), rank]
        return rows


class _Sent:
    """What one order of visits sends: `there[p]` tells of each owner and visit whether it happens for piece p."""

    def __init__(self, builder: Builder, needs: Needs, fabric: Fabric) -> None:
        self.builder, self.visits = builder, _visits(builder, fabric)
        _, rank, _, source = self.visits
        owners = np.arange(needs.world)[:, None]
        relayed = bool((source != owners).any())
        self.rows = [_rows(needs, piece, relayed) for piece in range(needs.pieces)]
        self.there = []
        for piece, (rows, _) in enumerate(self.rows):
            wanted = needs.wanted[:, :, piece].T
            coming = _carried(wanted, rank, source) if relayed else wanted
            self.there.append(coming[owners, rank] & (rows[owners, rank] > 0))
        self.total = sum(int(r[owners, rank][t].sum()) for (r, _), t in zip(self.rows, self.there, strict=True))


def _flows(sent: _Sent, needs: Needs, table: Timetable, travels: str) -> Flows:
    step, rank, post, source = sent.visits
    uses, moves = [np.zeros((5, 0), dtype=np.int64)], [np.zeros((8, 0), dtype=np.int64)]
    for at, first, end in table.own:
        own = np.flatnonzero([cuts[first] < cuts[end] for cuts in needs.own])
        uses.append(np.stack([np.full_like(own, at), own, own, np.full_like(own, first), np.full_like(own, end)]))
    for piece, (each, there) in enumerate(zip(sent.rows, sent.there, strict=True)):
        when = np.array([table.step(piece, s) for s in range(1 + int(step.max(initial=0)))])
        o, v = np.nonzero(there)
        to, which = rank[o, v], np.full_like(o, piece)
        computes = needs.wanted[to, o, piece]
        due, posted = when[step[o, v]], when[post[o, v]]
        uses.append(np.stack([due, to, o, which, which + 1])[:, computes])
        moves.append(np.stack([posted, due, source[o, v], to, o, which, *each[:, o, to]]))
    every = np.concatenate(uses, axis=1)
    found = UseColumns(*every[:, np.lexsort(every[::-1])])
    kv = _sorted(MoveColumns(*np.concatenate(moves, axis=1)))
    none = MoveColumns(*np.zeros((8, 0), dtype=np.int64))
    return Flows(needs.world, 1 + int(found.step.max(initial=0)), found, kv, none, travels)


def _carried(wanted: Flags, rank: Ints, source: Ints) -> Flags:
    """Which ranks a block must come to: those that need it, and those that pass it on to one that does."""
    carried: Flags = wanted.copy()
    owners = np.arange(len(wanted))
    for v in reversed(range(rank.shape[1])):
        carried[owners, source[:, v]] |= carried[owners, rank[:, v]]
    return carried


def _rows(needs: Needs, piece: int, relayed: bool) -> Ints:
    """Rows of each owner's piece that are sent to each rank, and a number for those that are the same: (2, W, W)."""
    found = np.zeros((2, needs.world, needs.world), dtype=np.int64)
    for owner in range(needs.world):
        if relayed:
            found[0, owner] = count(needs.anybody(owner, piece))
        else:
            first: dict[Rows, int] = {}
            for rank, ranges in needs.by_rank(owner, piece).items():
                found[:, owner, rank] = count(ranges), first.setdefault(ranges, rank)
    return found


def _sorted(moves: MoveColumns) -> MoveColumns:
    return moves.take(np.lexsort((moves.piece, moves.owner, moves.dst, moves.src, moves.due, moves.post)))


@lru_cache(maxsize=64)
def _visits(builder: Builder, fabric: Fabric) -> tuple[Ints, Ints, Ints, Ints]:
    """(step, rank, post, source) of the visits of every owner, each (world, visits)."""
    # An order of visits is arithmetic on the owner's number, so a column of owners gives those of all at once.
    path = builder(cast(int, np.arange(fabric.world)), fabric)
    table = np.empty((4, fabric.world, len(path)), dtype=np.int64)
    for v, visit in enumerate(path):
        for column, value in zip(table, (visit.step, visit.rank, visit.post, visit.source), strict=True):
            column[:, v] = value
    step, rank, post, source = table
    return step, rank, post, source
