"""Backward traffic, derived from forward traffic by one rule for every builder.

The backward pass keeps the KV traffic and the uses. Each use away from home makes a partial dKV, and each gets
exactly one dKV transfer. Reversing time literally would not work: the keys and values would have to arrive backwards.
"""

from __future__ import annotations

from seqpar_ring.schedule.traffic import Block, Move, Traffic, Use


def transpose(forward: Traffic, node: int) -> Traffic:
    """The backward traffic of a forward traffic.

    A partial dKV goes to the block's next user, to be added there, if that user comes later and sits in the same node
    (`node` ranks each); else straight to the owner. So `node=1` sends every partial home directly, and `node=world`
    is the travelling sum of the ring.
    """
    users: dict[Block, list[Use]] = {}
    for use in forward.uses:
        if use.rank != use.block.owner:
            users.setdefault(use.block, []).append(use)
    dkv = []
    for block, uses in users.items():
        for use, following in zip(uses, uses[1:] + uses[-1:], strict=True):
            if following.step > use.step and following.rank // node == use.rank // node:
                dkv.append(Move(following.step, following.step + 1, use.rank, following.rank, block))
            else:
                dkv.append(Move(use.step + 1, use.step + 2, use.rank, block.owner, block))
    return forward._replace(dkv=tuple(sorted(dkv)), steps=max([forward.steps, *(move.due for move in dkv)]))
