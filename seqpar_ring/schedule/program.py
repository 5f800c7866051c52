"""Program: what one rank does at each step of a traffic, and the buffers it needs.

The traffic is global; this is one rank's view of it, worked out once per plan so that the executor's loop holds no search.
Posting order is the traffic's own order on every rank, which is what makes matching sends and receives pair up.
"""

from __future__ import annotations

from typing import NamedTuple

from seqpar_ring.schedule.traffic import Block, Move, Traffic


class Stage(NamedTuple):
    """One step of one rank, in this order: wait for what is due, post what is to be posted, compute."""

    due_kv: tuple[Move, ...]
    due_dkv: tuple[Move, ...]
    post_kv: tuple[Move, ...]
    post_dkv: tuple[Move, ...]
    uses: tuple[Block, ...]
    drop: tuple[Block, ...]


def program(traffic: Traffic, rank: int) -> tuple[Stage, ...]:
    """The stages of one rank: `traffic.steps + 1` of them, the last for what is due at the end.

    `due_*` holds the rank's own sends too (their buffers may be reused from then on); `drop` the received blocks that
    nobody needs after the stage.
    """
    stages: list[tuple[list[Move], list[Move], list[Move], list[Move], list[Block], list[Block]]]
    stages = [([], [], [], [], [], []) for _ in range(traffic.steps + 1)]
    for moves, due, post in ((traffic.kv, 0, 2), (traffic.dkv, 1, 3)):
        for move in moves:
            if rank in (move.src, move.dst):
                stages[move.post][post].append(move)  # type: ignore[arg-type]
                stages[move.due][due].append(move)  # type: ignore[arg-type]
    for use in traffic.uses:
        if use.rank == rank:
            stages[use.step][4].append(use.block)
    for last, block in _last_needed(traffic, rank):
        stages[last][5].append(block)
    return tuple(Stage(*map(tuple, stage)) for stage in stages)


def lives(traffic: Traffic, rank: int) -> dict[str, list[tuple[int, int, Block]]]:
    """First and last step of every buffer that a rank needs beside its own k, v, dk and dv.

    "kv": received blocks; "made": partial dKV of its own making; "got": partial dKV received.
    """
    kv: dict[Block, list[int]] = {}
    made: dict[Block, list[int]] = {}
    for m in traffic.kv:
        if m.dst == rank:
            kv[m.block] = [m.post, m.due]
    for m in traffic.kv:
        if m.src == rank and m.block.owner != rank:
            kv[m.block][1] = max(kv[m.block][1], m.due - 1)
    for u in traffic.uses:
        if u.rank == rank and u.block.owner != rank:
            kv[u.block][1] = max(kv[u.block][1], u.step)
            made[u.block] = [u.step, u.step]
    for m in traffic.dkv:
        if m.src == rank:
            made[m.block][1] = max(made[m.block][1], m.due - 1)
    got = [(m.post, m.due - 1, m.block) for m in traffic.dkv if m.dst == rank]
    return {
        "kv": [(a, b, block) for block, (a, b) in kv.items()],
        "made": [(a, b, block) for block, (a, b) in made.items()] if traffic.dkv else [],
        "got": got,
    }


def peak(intervals: list[tuple[int, int, Block]]) -> int:
    """Most intervals alive in one step; giving each the lowest free slot needs exactly as many slots."""
    return max((sum(a <= s <= b for a, b, _ in intervals) for s in {a for a, _, _ in intervals}), default=0)


def _last_needed(traffic: Traffic, rank: int) -> list[tuple[int, Block]]:
    return [(last, block) for _, last, block in lives(traffic, rank)["kv"]]
