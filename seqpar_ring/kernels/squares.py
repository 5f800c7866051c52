"""Squares: a kernel that knows full and square causal blocks, given calls of any kind without a window.

Some libraries align a causal diagonal top left, some refuse one with more queries than keys, some change their mind
with a release. All agree on full blocks and on causal squares. So the segments of a call are cut into those
(`geometry.split`), and the blocks of a kind make one call, or one each where a kernel takes no varlen calls. Most calls
of contiguous and zigzag layouts are of one kind already.
"""

from __future__ import annotations

from collections.abc import Iterator

from seqpar_ring import geometry
from seqpar_ring.geometry import INF
from seqpar_ring.kernels.regrouped import Part, Regrouped, part
from seqpar_ring.kernels.remembered import remembered
from seqpar_ring.schedule import Call

PADDED = 8
"""A call whose queries, padded to the longest segment, would be so many times as many rows is cut by segments' lengths:
cuDNN's backward wants a log-sum-exp of that size, 17 GB for 1,000 documents and 64 heads if one has 65,536 tokens."""


class Squares(Regrouped):
    """The kernel it is made of, for calls of any kind without a window. See the module."""

    def cut(self, call: Call) -> tuple[Part, ...]:
        """See `Regrouped.cut`."""
        return in_squares(call, self.capabilities.varlen)


@remembered
def in_squares(call: Call, varlen: bool) -> tuple[Part, ...]:
    """A call without a window as calls of full blocks and of causal squares."""
    blocks: list[geometry.Part] = []
    for q0, q1, k0, k1 in zip(call.cu_q, call.cu_q[1:], call.cu_k, call.cu_k[1:], strict=False):
        found = geometry.split(q1 - q0, k1 - k0, call.left, call.right)
        blocks += [p._replace(q0=p.q0 + q0, q1=p.q1 + q0, k0=p.k0 + k0, k1=p.k1 + k0) for p in found]
    return tuple(
        part([(p.q0, p.q1, p.k0, p.k1) for p in some], INF, right)
        for right in (0, INF)
        for group in _groups([p for p in blocks if (p.kind == "causal") == (right == 0)], varlen)
        for some in _of_like_lengths(group)
    )


def _groups(blocks: list[geometry.Part], varlen: bool) -> Iterator[list[geometry.Part]]:
    """Blocks that make one call: no query row twice, or its results would overwrite each other."""
    while blocks:
        taken: list[geometry.Part] = []
        rest: list[geometry.Part] = []
        end = -1
        for p in blocks:
            if p.q0 >= end and (varlen or not taken):
                taken.append(p)
                end = p.q1
            else:
                rest.append(p)
        yield taken
        blocks = rest


def _of_like_lengths(blocks: list[geometry.Part]) -> list[list[geometry.Part]]:
    """The blocks of a call as one, or as several in each of which none has twice the queries of another."""
    lengths = [p.q1 - p.q0 for p in blocks]
    if len(blocks) * max(lengths) <= PADDED * sum(lengths):
        return [blocks]
    classes = sorted({length.bit_length() for length in lengths})
    return [[p for p in blocks if (p.q1 - p.q0).bit_length() == one] for one in classes]
