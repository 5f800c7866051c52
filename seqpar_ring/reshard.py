"""Reshard: from some tokens with all heads to more tokens with some heads, and back (Ulysses, arXiv 2309.14509).

The ranks that share out heads hold, one after the other, the tokens of one rank of the ring. Each sends every other one
the heads that are that one's, and gets the tokens that it lacks. Where there are fewer key heads than ranks, several
ranks get the same one, and what they give back is summed. All to all, by messages; no attention here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seqpar_ring.errors import UnsupportedError
from seqpar_ring.transport import Messenger, Recv, Send

Heads = list[tuple[int, int]]
"""For each rank the heads that are its own, `first .. end`."""


def shares(heads: int, kv_heads: int, degree: int) -> tuple[Heads, Heads]:
    """The query heads and the key heads of each of `degree` ranks.

    Raises:
        UnsupportedError: the degree does not divide the query heads, or neither of key heads and degree divides the
            other.
    """
    if heads % degree or (kv_heads % degree and degree % kv_heads):
        fitting = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
        raise UnsupportedError(
            "these heads cannot be shared out evenly among so many ranks",
            fix=f'Set "heads" to {" or ".join(map(str, fitting))}; it must also divide the size of the sequence group.',
            heads=degree,
            query_heads=heads,
            key_value_heads=kv_heads,
        )
    each, first = max(1, kv_heads // degree), [j * kv_heads // degree for j in range(degree)]
    return [(j * heads // degree, (j + 1) * heads // degree) for j in range(degree)], [(k, k + each) for k in first]


def to_heads(x: Tensor, members: Messenger, rows: Sequence[int], heads: Heads) -> Tensor:
    """All members' tokens, this rank's heads.

    Args:
        x: (B, S, H, ...), this rank's tokens with all heads.
        members: the ranks that share out the heads.
        rows: tokens of each of them.
        heads: heads of each of them.
    """
    first, end = heads[members.rank]
    parts = [x.new_empty((x.shape[0], n, end - first, *x.shape[3:])) for n in rows]
    parts[members.rank] = x[:, :, first:end]
    others = [r for r in range(members.world) if r != members.rank]
    sends = [Send(r, x[:, :, heads[r][0] : heads[r][1]].contiguous()) for r in others]
    members.exchange(sends, [Recv(r, parts[r]) for r in others]).wait()
    return torch.cat(parts, 1)


def to_tokens(x: Tensor, members: Messenger, rows: Sequence[int], heads: Heads) -> Tensor:
    """This rank's tokens, all heads: the other way. What several ranks computed of one head is summed.

    Args:
        x: (B, all members' tokens, this rank's heads, ...).
        members, rows, heads: as in `to_heads`.
    """
    mine, total = rows[members.rank], max(end for _, end in heads)
    others = [r for r in range(members.world) if r != members.rank]
    parts = list(x.split(list(rows), 1))
    sends = [Send(r, parts[r].contiguous()) for r in others]
    got = {r: x.new_empty((x.shape[0], mine, heads[r][1] - heads[r][0], *x.shape[3:])) for r in others}
    members.exchange(sends, [Recv(r, got[r]) for r in others]).wait()
    got[members.rank] = parts[members.rank]
    out = x.new_zeros((x.shape[0], mine, total, *x.shape[3:]))
    for r in range(members.world):
        out[:, :, heads[r][0] : heads[r][1]] += got[r]
    return out
