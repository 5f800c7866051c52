"""Passes: what one rank does in one direction, worked out once: the group's traffic as this rank's stages, its kernel
calls, and where everything lies that it holds meanwhile. `plan` makes them, `run` runs them."""

from __future__ import annotations

from typing import NamedTuple

from seqpar_ring.schedule import Buffers, Move, Posting, Sides, Stage, Traffic, Work, buffers, program, work
from seqpar_ring.transport import FAR_LANES, Messenger


class Message(NamedTuple):
    """A move as one of its two ranks sees it.

    Attributes:
        move: which.
        peer: the other rank.
        out: whether this rank sends it.
        home: whether the block is this rank's own.
        in_place: whether it is rows of their owner that lie together, sent from where they are: field by field.
    """

    move: Move
    peer: int
    out: bool
    home: bool
    in_place: bool


class Posted(NamedTuple):
    """A `Posting` as its rank sees it."""

    due: int
    lane: str
    gradients: bool
    messages: tuple[Message, ...]


class Pass(NamedTuple):
    """One pass as one rank runs it.

    Attributes:
        traffic: the group's.
        stages: this rank's.
        posts: what is posted at each stage.
        work: what it computes, by stage.
        buffers: its memory.
        in_place: own rows that could be sent from where they lie: of blocks whose rows lie together.
    """

    traffic: Traffic
    stages: tuple[Stage, ...]
    posts: tuple[tuple[Posted, ...], ...]
    work: dict[int, Work]
    buffers: Buffers
    in_place: tuple[tuple[int, int], ...]


def pass_of(
    traffic: Traffic, ring: Messenger, sides: Sides, node: int, known: dict[int, Work] | None = None
) -> Pass:
    """The pass of the rank that `ring` is of.

    Args:
        traffic: of the whole group.
        ring: its ranks; whether what goes between nodes has lanes of its own is seen by its lanes.
        sides: layouts of queries and keys, and the mask.
        node: ranks a node.
        known: this rank's work, where it is that of another pass.
    """
    found = work(traffic, ring.rank, sides) if known is None else known
    stages = program(traffic, ring.rank, node if {*FAR_LANES} <= {*ring.lanes} else None)
    sent = {move.block.rows for move in traffic.kv if move.src == ring.rank == move.block.owner}
    in_place = tuple(sorted(rows[0] for rows in sent if len(rows) == 1))
    posts = tuple(tuple(_posted(posting, ring.rank) for posting in stage.posts) for stage in stages)
    return Pass(traffic, stages, posts, found, buffers(traffic, ring.rank, found), in_place)


def _posted(posting: Posting, rank: int) -> Posted:
    messages = []
    for move in posting.moves:
        out, block = move.src == rank, move.block
        in_place = block.owner == move.src and len(block.rows) == 1  # never of gradients: others send them to the owner
        messages.append(Message(move, move.dst if out else move.src, out, block.owner == rank, in_place))
    return Posted(posting.due, posting.lane, posting.gradients, tuple(messages))
