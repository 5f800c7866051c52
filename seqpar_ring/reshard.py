"""Reshard: from some tokens with all heads to more tokens with some heads, and back (Ulysses, arXiv 2309.14509).

The ranks that share out heads hold, one after the other, the tokens of one rank of the ring. Each sends every other one
the heads that are that one's, and gets the tokens that it lacks. Where there are fewer key heads than ranks, several
ranks get the same one, and what they give back is summed. All to all, by messages; no attention here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from seqpar_ring.errors import UnsupportedError
from seqpar_ring.transport import Messenger, Recv, Send

Heads = list[tuple[int, int]]
"""For each rank the heads that are its own, `first .. end`: ascending, and of two ranks the same or none in common."""

Tensors = tuple[Tensor, ...]


class Share(NamedTuple):
    """Of one tensor: the tokens of each of the ranks that share out its heads, and the heads of each."""

    rows: tuple[int, ...]
    heads: Heads


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


def to_heads(tensors: Sequence[Tensor], members: Messenger, shared: Sequence[Share]) -> Tensors:
    """All members' tokens, this rank's heads, of some tensors in one exchange.

    Args:
        tensors: (B, S, H, ...) each, this rank's tokens with all heads.
        members: the ranks that share out the heads.
        shared: how, for each tensor.
    """
    others = [r for r in range(members.world) if r != members.rank]
    sends: list[Send] = []
    recvs: list[Recv] = []
    apart: list[tuple[Tensor, Tensor]] = []  # where rows belong that do not lie together there, and where they come to
    found = []
    for x, (rows, heads) in zip(tensors, shared, strict=True):
        first, end = heads[members.rank]
        whole = x.new_empty((x.shape[0], sum(rows), end - first, *x.shape[3:]))
        places = whole.split(rows, 1)
        places[members.rank].copy_(x[:, :, first:end])
        found.append(whole)
        for r in others:
            place = places[r]
            if not place.is_contiguous():
                place = torch.empty_like(place, memory_format=torch.contiguous_format)
                apart.append((places[r], place))
            sends.append(Send(r, x[:, :, heads[r][0] : heads[r][1]].contiguous()))
            recvs.append(Recv(r, place))
    members.exchange(sends, recvs).wait()
    for place, came in apart:
        place.copy_(came)
    return tuple(found)


def to_tokens(tensors: Sequence[Tensor], members: Messenger, shared: Sequence[Share]) -> Tensors:
    """This rank's tokens, all heads: the other way. What several ranks computed of one head is summed.

    Args:
        tensors: (B, all members' tokens, this rank's heads, ...) each.
        members, shared: as in `to_heads`.
    """
    others = [r for r in range(members.world) if r != members.rank]
    sends: list[Send] = []
    recvs: list[Recv] = []
    came: list[list[Tensor]] = []  # by tensor and rank
    for x, (rows, heads) in zip(tensors, shared, strict=True):
        parts, mine = x.split(rows, 1), rows[members.rank]
        got = list(parts)
        for r in others:
            got[r] = x.new_empty((x.shape[0], mine, heads[r][1] - heads[r][0], *x.shape[3:]))
            sends.append(Send(r, parts[r].contiguous()))
            recvs.append(Recv(r, got[r]))
        came.append(got)
    members.exchange(sends, recvs).wait()
    return tuple(_with_all_heads(got, of.heads) for got, of in zip(came, shared, strict=True))


def _with_all_heads(parts: Sequence[Tensor], heads: Heads) -> Tensor:
    """One tensor of parts of some heads each, added where they are of the same."""
    whole, written = parts[0].new_empty((*parts[0].shape[:2], heads[-1][1], *parts[0].shape[3:])), 0
    for (first, end), part in zip(heads, parts, strict=True):
        place = whole[:, :, first:end]
        if first < written:
            place.add_(part)
        else:
            place.copy_(part)
        written = end
    return whole
