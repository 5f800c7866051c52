"""Build: from the order of a block's visits and what the ranks need to the traffic of a group.

What is worth sending (nothing travels that nobody at or behind its receiver needs), the pieces a block travels in, and
the steps at which it is posted and due follow here, the same way for every schedule. Masks come in as needs; nothing
here knows a layout or a schedule by name.
"""

from __future__ import annotations

from typing import NamedTuple

from seqpar_ring.geometry import count
from seqpar_ring.schedule.needs import Needs
from seqpar_ring.schedule.timetable import Timetable, timetable
from seqpar_ring.schedule.traffic import Block, Move, Traffic, Use
from seqpar_ring.schedule.visits import BUILDERS, Builder, Fabric, Visit


class Granularity(NamedTuple):
    """What `block_tokens` comes to: blocks cut into `pieces`, or `hops` blocks in one step; one of them is 1."""

    pieces: int = 1
    hops: int = 1

    @staticmethod
    def of(block_tokens: int | None, largest: int, world: int) -> Granularity:
        """From the tokens that are to be computed with at a time; None: whole blocks, one at a time.

        Args:
            block_tokens: tokens.
            largest: tokens of the largest block.
            world: ranks.
        """
        if block_tokens is None or largest == 0 or world == 1:
            return Granularity()
        if block_tokens >= largest:
            return Granularity(hops=max(1, min(block_tokens // largest, world - 1)))
        return Granularity(pieces=-(-largest // block_tokens))


def build(builder: Builder, needs: Needs, fabric: Fabric, travels: str = "kv", returns: bool = False) -> Traffic:
    """The traffic of one order of visits, without gradients.

    Args:
        builder: the visits of one owner's block.
        needs: what the ranks need of each other's pieces.
        fabric: ranks, nodes, blocks a step.
        travels: "kv" or "q": which side's rows the needs are about.
        returns: whether gradients will return (`transpose`), which matters for the order of own rows.
    """
    uses: list[Use] = []
    kv: list[Move] = []
    table = timetable_of(builder, fabric, needs.pieces, travels if returns else None)
    for owner in range(needs.world):
        path = builder(owner, fabric)
        relayed = any(visit.source != owner for visit in path)
        for step, first, end in table.own:
            a, b = needs.own[owner][first], needs.own[owner][end]
            if a < b:
                uses.append(Use(step, owner, Block(owner, ((a, b),))))
        for p, part in enumerate(needs.parts[owner]):
            if not part:
                continue
            sent = _relayed(path, needs, owner, p) if relayed else _direct(path, needs, owner, p)
            for v, block, _ in sent:
                kv.append(Move(table.step(p, v.post), table.step(p, v.step), v.source, v.rank, block))
            uses += [Use(table.step(p, v.step), v.rank, block) for v, block, used in sent if used]
    uses.sort()
    kv.sort()
    return Traffic(needs.world, 1 + (uses[-1].step if uses else 0), tuple(uses), tuple(kv), (), travels)


def timetable_of(builder: Builder, fabric: Fabric, pieces: int, returning: str | None) -> Timetable:
    """When the pieces go the way of this builder."""
    return timetable(pieces, max((visit.step for visit in builder(0, fabric)), default=0), returning)


def choose(name: str, needs: Needs, fabric: Fabric, travels: str = "kv", returns: bool = False) -> tuple[Traffic, str]:
    """The traffic of the schedule of this name, in the variant that sends the fewest rows, and the reason."""
    sent = {}
    for variant, builder in BUILDERS[name].items():
        traffic = build(builder, needs, fabric, travels, returns)
        sent[variant] = (rows_sent(traffic), traffic)
    best = min(sent, key=lambda variant: sent[variant][0])
    rows, traffic = sent[best]
    if len(sent) == 1:
        return traffic, f"{rows} rows sent"
    others = ", ".join(f"{variant} {rows} rows" for variant, (rows, _) in sent.items())
    return traffic, f"{name} {best}: fewest rows sent ({others})"


def rows_sent(traffic: Traffic) -> int:
    """Rows of the travelling side that all ranks together send in the pass."""
    blocks = {id(move.block): move.block for move in traffic.kv}  # what is passed on is one object, counted once
    size = {key: count(block.rows) for key, block in blocks.items()}
    return sum([size[id(move.block)] for move in traffic.kv])


Sent = list[tuple[Visit, Block, bool]]
"""The visits that happen, with the block as it is there, and whether the rank computes with it."""


def _direct(path: list[Visit], needs: Needs, owner: int, piece: int) -> Sent:
    wanted = needs.by_rank(owner, piece)
    return [(visit, Block(owner, wanted[visit.rank]), True) for visit in path if visit.rank in wanted]


def _relayed(path: list[Visit], needs: Needs, owner: int, piece: int) -> Sent:
    """A block that is passed on keeps one shape; a visit that nobody at or behind it needs does not happen."""
    needed: list[bool] = needs.wanted[:, owner, piece].tolist()
    carried = list(needed)
    for visit in reversed(path):
        if carried[visit.rank]:
            carried[visit.source] = True
    if not carried[owner]:
        return []
    block = Block(owner, needs.anybody(owner, piece))
    return [(visit, block, needed[visit.rank]) for visit in path if carried[visit.rank]]
