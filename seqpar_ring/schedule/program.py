"""Program: what one rank does at each step of a traffic, and the buffers it needs.

The traffic is global; this is one rank's view of it, worked out once per plan so that the executor's loop holds no
search. Posting order is the traffic's own order on every rank, which is what makes matching sends and receives pair
up.
"""

from __future__ import annotations

from typing import NamedTuple

from seqpar_ring.schedule.traffic import Block, Move, Traffic


class Posting(NamedTuple):
    """Transfers of one stage that go in one lane and are due together, so they have one handle.

    Attributes:
        due: the stage at whose start they have arrived; from then on the memory of what was sent may be used anew.
        lane: "kv" or "dkv"; what goes between nodes has lanes of its own where the transport made them.
        gradients: whether they carry gradients.
        moves: in the traffic's order.
    """

    due: int
    lane: str
    gradients: bool
    moves: tuple[Move, ...]


class Stage(NamedTuple):
    """One step of one rank, in this order: wait for what is due, post what is to be posted, compute.

    Attributes:
        posts: what is to be posted; of keys before gradients, and what is due first goes first.
        uses: the blocks that are computed with.
        drop: the received blocks that nobody needs after the stage.
    """

    posts: tuple[Posting, ...]
    uses: tuple[Block, ...]
    drop: tuple[Block, ...]


def program(traffic: Traffic, rank: int, node: int | None = None) -> tuple[Stage, ...]:
    """The stages of one rank: `traffic.steps + 1` of them, the last for what is due at the end.

    Args:
        traffic: of the whole group.
        rank: whose.
        node: ranks a node, where what goes between nodes has lanes of its own.
    """
    posts: list[dict[tuple[bool, int, str], list[Move]]] = [{} for _ in range(traffic.steps + 1)]
    uses: list[list[Block]] = [[] for _ in posts]
    drop: list[list[Block]] = [[] for _ in posts]
    for lane, of_lane in (("kv", traffic.kv), ("dkv", traffic.dkv)):
        for move in of_lane:
            if rank in (move.src, move.dst):
                far = node is not None and move.src // node != move.dst // node
                key = lane == "dkv", move.due, f"{lane}_far" if far else lane
                posts[move.post].setdefault(key, []).append(move)
    for use in traffic.uses:
        if use.rank == rank:
            uses[use.step].append(use.block)
    for _, last, block in lives(traffic, rank)["kv"]:
        drop[last].append(block)
    return tuple(
        Stage(
            tuple(Posting(due, lane, back, tuple(found[back, due, lane])) for back, due, lane in sorted(found)),
            tuple(use),
            tuple(gone),
        )
        for found, use, gone in zip(posts, uses, drop, strict=True)
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
