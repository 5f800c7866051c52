"""Builders: from "in which order does a block visit the ranks" to traffic.

A builder says only the visits of one owner's block. What is worth sending (nothing travels that nobody at or behind
its receiver needs), the pieces a block travels in, and the steps at which it is posted and due follow here, the same
way for every builder. The ring is that of Ring Attention (arXiv 2310.01889). Masks come in as needs; nothing here
knows a layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from seqpar_ring.geometry import Band, Rows, Run, by_document, clip, count, tile, union
from seqpar_ring.layout import Layout
from seqpar_ring.schedule.traffic import Block, Move, Traffic, Use


class Visit(NamedTuple):
    """At `step` the block is at `rank`; it was posted at step `post` by rank `source`."""

    step: int
    rank: int
    post: int
    source: int


Builder = Callable[[int, int], list[Visit]]
"""(owner, world) -> the visits of that owner's block away from home."""


def ring_up(owner: int, world: int) -> list[Visit]:
    """Blocks travel to the next higher rank, one hop a step."""
    return [Visit(s, (owner + s) % world, s - 1, (owner + s - 1) % world) for s in range(1, world)]


def ring_down(owner: int, world: int) -> list[Visit]:
    """Blocks travel to the next lower rank, one hop a step."""
    return [Visit(s, (owner - s) % world, s - 1, (owner - s + 1) % world) for s in range(1, world)]


BUILDERS: dict[str, dict[str, Builder]] = {"ring": {"up": ring_up, "down": ring_down}}
"""Schedules by name, each with its variants; of the variants the one that sends the fewest rows is taken."""


def needs(layout: Layout, band: Band) -> list[list[Rows]]:
    """`needs[rank][owner]`: the owner's rows that some query of the rank may see; empty where rank == owner."""
    shared = _runs_of_shared_documents(layout)
    out: list[list[Rows]] = []
    for rank, queries in enumerate(shared):
        mine = by_document(queries)
        out.append([() if owner == rank else _seen(mine, keys, band) for owner, keys in enumerate(shared)])
    return out


def build(builder: Builder, wanted: Sequence[Sequence[Rows]], sizes: Sequence[int], pieces: int = 1) -> Traffic:
    """The forward traffic of one builder.

    Args:
        builder: the visits of one owner's block.
        wanted: what `needs` gives.
        sizes: tokens of each rank.
        pieces: into how many messages a block is cut; they travel one after the other and are computed as they land.
    """
    world = len(sizes)
    uses: list[Use] = []
    kv: list[Move] = []
    for owner in range(world):
        path = builder(owner, world)
        for p in range(pieces):
            part = sizes[owner] * p // pieces, sizes[owner] * (p + 1) // pieces
            if part[0] == part[1]:
                continue
            uses.append(Use(p, owner, Block(owner, (part,))))
            need = {v.rank: clip(wanted[v.rank][owner], *part) for v in path}
            for v, block in _worth_sending(path, need, owner):
                kv.append(Move((v.post + 1) * pieces - 1 + p, v.step * pieces + p, v.source, v.rank, block))
                if need[v.rank]:
                    uses.append(Use(v.step * pieces + p, v.rank, block))
    steps = 1 + max((u.step for u in uses), default=0)
    return Traffic(world, steps, tuple(sorted(uses)), tuple(sorted(kv)))


def choose(name: str, wanted: Sequence[Sequence[Rows]], sizes: Sequence[int], pieces: int = 1) -> tuple[Traffic, str]:
    """The traffic of the schedule of this name, in the variant that sends the fewest rows, and the reason."""
    sent = {}
    for variant, builder in BUILDERS[name].items():
        traffic = build(builder, wanted, sizes, pieces)
        sent[variant] = (rows_sent(traffic), traffic)
    best = min(sent, key=lambda variant: sent[variant][0])
    others = ", ".join(f"{variant} {rows} rows" for variant, (rows, _) in sent.items())
    return sent[best][1], f"{name} {best}: fewest KV rows sent ({others})"


def rows_sent(traffic: Traffic) -> int:
    """Rows of keys (and as many of values) that all ranks together send in the pass."""
    return sum(count(move.block.rows) for move in traffic.kv)


def _worth_sending(path: list[Visit], need: dict[int, Rows], owner: int) -> list[tuple[Visit, Block]]:
    carried = dict(need)  # what passes through a rank: for itself and for those behind it
    for v in reversed(path):
        if v.source != owner:
            carried[v.source] = union(carried[v.source] + carried[v.rank])
    relayed = any(v.source != owner for v in path)
    whole = union(r for rows in carried.values() for r in rows)  # a travelling block keeps one shape
    return [(v, Block(owner, whole if relayed else carried[v.rank])) for v in path if carried[v.rank]]


def _seen(mine: dict[int, list[Run]], keys: tuple[Run, ...], band: Band) -> Rows:
    rows = []
    for k in keys:
        tiles = [t for q in mine.get(k.doc, ()) if (t := tile(q, k, band))]
        if tiles:
            rows.append((min(t.k0 for t in tiles), max(t.k1 for t in tiles)))
    return union(rows)


def _runs_of_shared_documents(layout: Layout) -> tuple[tuple[Run, ...], ...]:
    """Only the runs of documents that more than one rank holds: all that traffic can be about."""
    holder: dict[int, int] = {}
    for rank, runs in enumerate(layout):
        for run in runs:
            holder[run.doc] = rank if holder.get(run.doc, rank) == rank else -1
    return tuple(tuple(run for run in runs if holder[run.doc] < 0) for runs in layout)
