"""Backward traffic, derived from forward traffic by one rule for every builder.

The backward pass keeps the KV traffic and the uses. Each use away from home makes a partial dKV, and each gets
exactly one dKV transfer. Reversing time literally would not work: the keys and values would have to arrive backwards.
"""

from __future__ import annotations

from seqpar_ring.schedule.traffic import Block, Move, Traffic


def transpose(forward: Traffic, node: int, flight: int = 1) -> Traffic:
    """The backward traffic of a forward traffic.

    A partial dKV goes where its block was passed on to, to be added to the partial of the next rank there that computes
    with it, if that sits in the same node (`node` ranks each); else straight to the owner. So a ring's gradients travel
    round it as one sum, a double ring sends one sum home from each node, and what was sent directly returns directly;
    `node=1` returns everything directly. It leaves as soon as it is made; `flight` is how many computations later the
    owner waits for it.
    """
    used = {(use.rank, use.block): use.step for use in forward.uses}
    onward: dict[tuple[int, Block], list[int]] = {}
    if node > 1:
        for move in forward.kv:
            if move.src != move.block.owner and move.src // node == move.dst // node:
                onward.setdefault((move.src, move.block), []).append(move.dst)

    def next_user(rank: int, block: Block) -> int | None:
        for there in onward.get((rank, block), ()):
            found = there if (there, block) in used else next_user(there, block)
            if found is not None:
                return found
        return None

    dkv = []
    for step, rank, block in forward.uses:
        if rank == block.owner:
            continue
        following = next_user(rank, block)
        if following is None:
            dkv.append(Move(step + 1, step + 1 + flight, rank, block.owner, block))
        else:
            dkv.append(Move(step + 1, used[following, block] + 1, rank, following, block))
    return forward._replace(dkv=tuple(sorted(dkv)), steps=max([forward.steps, *(move.due for move in dkv)]))
