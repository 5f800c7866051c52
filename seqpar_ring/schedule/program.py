"""Program: what one rank does at each step of a traffic, and the buffers it needs.

The traffic is global; this is one rank's view of it, worked out once per plan so that the executor's loop holds no
search. Posting order is the traffic's own order on every rank, which is what makes matching sends and receives pair
up.
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
    kinds = ("due_kv", "due_dkv", "post_kv", "post_dkv")
    moves: list[dict[str, list[Move]]] = [{kind: [] for kind in kinds} for _ in range(traffic.steps + 1)]
    uses: list[list[Block]] = [[] for _ in moves]
    drop: list[list[Block]] = [[] for _ in moves]
    for lane, of_lane in (("kv", traffic.kv), ("dkv", traffic.dkv)):
        for move in of_lane:
            if rank in (move.src, move.dst):
                moves[move.post][f"post_{lane}"].append(move)
                moves[move.due][f"due_{lane}"].append(move)
    for use in traffic.uses:
        if use.rank == rank:
            uses[use.step].append(use.block)
    for _, last, block in lives(traffic, rank)["kv"]:
        drop[last].append(block)
    return tuple(
        Stage(uses=tuple(use), drop=tuple(gone), **{kind: tuple(of_step[kind]) for kind in kinds})
        for of_step, use, gone in zip(moves, uses, drop, strict=True)
    )


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
