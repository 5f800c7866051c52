"""Calls: the tiles of one use as few varlen kernel calls.

A call takes one slice of q, one slice of k, cumulative lengths and one window. Tiles share a call when they have the
same window and ascend in q and in k memory together; what lies between them is covered by empty segments (rows of q
with no k, rows of k with no q). So a call is always slices, never a gather, and all documents of a causal step are
one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from seqpar_ring.geometry import INF, Band, Rows, Run, Tile, by_document, join, tile, view, window


class Call(NamedTuple):
    """One varlen kernel call on rows `q0:q1` of the rank's queries and rows `k0:k1` of a KV buffer.

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


def calls(q_runs: tuple[Run, ...], owner_runs: tuple[Run, ...], rows: Rows, band: Band) -> tuple[Call, ...]:
    """The kernel calls of one use: all of a rank's queries against these rows of the owner's memory."""
    return tuple(coalesce(tiles(q_runs, view(owner_runs, rows), band)))


def tiles(q_runs: Sequence[Run], k_runs: Sequence[Run], band: Band) -> list[Tile]:
    """The tiles between two ranks' runs, joined within each document where that is exact."""
    mine = by_document(q_runs)
    found: dict[int, list[Tile]] = {}
    for k in k_runs:
        for q in mine.get(k.doc, ()):
            if t := tile(q, k, band):
                found.setdefault(k.doc, []).append(t)
    return [t for of_document in found.values() for t in join(of_document)]


def coalesce(found: list[Tile]) -> list[Call]:
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
