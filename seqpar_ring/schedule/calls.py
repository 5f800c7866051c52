"""Calls: the tiles of one step as few varlen kernel calls.

A call takes one slice of q, one slice of k, cumulative lengths and one window. Tiles share a call when they have the
same window and ascend in q and in k memory together; what lies between them is covered by empty segments (rows of q
with no k, rows of k with no q). So a call is always slices, never a gather, and all documents of a causal step are
one call. This is the plain form, for one pair of ranks, and the oracle; `work` does the same for all steps of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from seqpar_ring.geometry import INF, Band, Regions, Run, Tile, join, tile, window, within


class Call(NamedTuple):
    """One varlen kernel call on rows `q0:q1` of a rank's queries and rows `k0:k1` of a KV buffer.

    Segment i takes queries `cu_q[i]:cu_q[i+1]` and keys `cu_k[i]:cu_k[i+1]` of those slices, and either may be empty.
    In a segment of m queries and n keys, query i sees key j where `-left <= (j - i) - (n - m) <= right`:
    flash-attention's window, aligned bottom right. INF means unbounded; neither side is ever negative.
    """

    q0: int
    k0: int
    left: int
    right: int
    cu_q: tuple[int, ...]
    cu_k: tuple[int, ...]

    @property
    def q1(self) -> int:
        """One past the last query row."""
        return self.q0 + self.cu_q[-1]

    @property
    def k1(self) -> int:
        """One past the last key row."""
        return self.k0 + self.cu_k[-1]

    @property
    def windowed(self) -> bool:
        """Whether the call has a lower edge, which only kernels with windows can do in one piece."""
        return self.left < INF


def tiles(q_runs: Sequence[Run], k_runs: Sequence[Run], regions: Regions) -> list[Tile]:
    """The tiles between two ranks' runs, joined within each region where that is exact."""
    keys: dict[int, list[Run]] = {}
    for k in k_runs:
        keys.setdefault(k.doc, []).append(k)
    found: list[Tile] = []
    for doc in dict.fromkeys(q.doc for q in q_runs if q.doc in keys):
        for _, r in regions.by_document.get(doc, ()):
            mine = [part for q in q_runs if q.doc == doc and (part := within(q, r.q0, r.q1))]
            theirs = [part for k in keys[doc] if (part := within(k, r.k0, r.k1))]
            rows = [[t for k in theirs if (t := tile(q, k, Band(r.lo, r.hi)))] for q in mine]
            found += join([t for row in rows for t in join(row)])
    return found


def coalesce(found: Sequence[Tile]) -> list[Call]:
    """Few calls that hold exactly these tiles."""
    chains: dict[tuple[int, int], list[list[Tile]]] = {}
    keys = {window(t) for t in found if t.q1 - t.q0 > 1} or {(INF, INF)}
    for t in sorted(found):
        key = window(t)
        if t.q1 - t.q0 == 1:  # a trimmed tile of one row sees all its keys: any window that is wide enough does
            key = next((k for k in sorted(keys) if k[0] >= t.k1 - t.k0 - 1), key)
        same = chains.setdefault(key, [])
        for chain in same:
            if chain[-1].q1 <= t.q0 and chain[-1].k1 <= t.k0:
                chain.append(t)
                break
        else:
            same.append([t])
    return [_call(key, chain) for key, same in chains.items() for chain in same]


def _call(key: tuple[int, int], chain: list[Tile]) -> Call:
    q0, k0 = chain[0].q0, chain[0].k0
    cu_q, cu_k = [0], [0]
    for t in chain:
        if t.q0 - q0 > cu_q[-1]:  # queries that see nothing in this call
            cu_q.append(t.q0 - q0)
            cu_k.append(cu_k[-1])
        if t.k0 - k0 > cu_k[-1]:  # keys that nobody looks at in this call
            cu_k.append(t.k0 - k0)
            cu_q.append(cu_q[-1])
        cu_q.append(t.q1 - q0)
        cu_k.append(t.k1 - k0)
    return Call(q0, k0, *key, tuple(cu_q), tuple(cu_k))
