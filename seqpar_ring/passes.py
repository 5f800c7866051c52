"""Passes: what one rank does in one direction, worked out once: the group's traffic as this rank's stages, its kernel
calls, and where everything lies that it holds meanwhile. `plan` makes them, `run` runs them."""

from __future__ import annotations

from typing import NamedTuple

from seqpar_ring.schedule import Buffers, Sides, Stage, Traffic, Work, buffers, program, work
from seqpar_ring.transport import FAR_LANES, Messenger


class Pass(NamedTuple):
    """One pass as one rank runs it.

    Attributes:
        traffic: the group's.
        stages: this rank's.
        work: what it computes, by stage.
        buffers: its memory.
        in_place: own rows that could be sent from where they lie: of blocks whose rows lie together.
    """

    traffic: Traffic
    stages: tuple[Stage, ...]
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
    return Pass(traffic, stages, found, buffers(traffic, ring.rank, found), in_place)
