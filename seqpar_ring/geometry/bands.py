"""Bands: which key a query may see, as `lo <= k - q <= hi`, and tiles, the part of a band between two runs.

Two facts carry the whole package. A band restricted to two runs of one step is again a band on local indices; and
once the rows and columns that hold nothing are trimmed away, that band is exactly one flash-attention window call
(bottom-right aligned, neither side negative). So striped needs no special case, nor does a diagonal. `split` goes the
last step for kernels that know only full blocks and causal ones, square or of more rows too. Integers only; no torch.
"""

from __future__ import annotations

from typing import NamedTuple

from seqpar_ring.geometry.runs import Run

INF = 1 << 60
"""Unbounded edge of a band or window. Far above any length, and still exact in 64 bits."""


class Band(NamedTuple):
    """A query at position q sees the keys of its document at positions k with `lo <= k - q <= hi`."""

    lo: int
    hi: int


class Tile(NamedTuple):
    """Rows `q0:q1` of the queries against rows `k0:k1` of a KV buffer, where `lo <= (k - k0) - (q - q0) <= hi`."""

    q0: int
    q1: int
    k0: int
    k1: int
    lo: int
    hi: int


class Part(NamedTuple):
    """A piece of one segment: "full" (all pairs), "causal" (j <= i, square or of more rows than keys) or "band"
    (`lo <= j - i <= hi` locally)."""

    q0: int
    q1: int
    k0: int
    k1: int
    kind: str
    lo: int
    hi: int


def full() -> Band:
    """Every key of the document."""
    return Band(-INF, INF)


def causal(window: int | None = None) -> Band:
    """Keys up to the query itself; with a window, only the last `window` of them (the query's own included)."""
    return Band(-INF if window is None else 1 - window, 0)


def triangle_sum(m: int, n: int, h: int) -> int:
    """Cells of an m x n rectangle with `j - i <= h`."""

    def below(x: int) -> int:
        if x <= 0:
            return 0
        return x * (x + 1) // 2 if x <= n else n * (n + 1) // 2 + (x - n) * n

    return below(m + h) - below(h)


def area(t: Tile) -> int:
    """Number of (query, key) pairs that a tile allows."""
    m, n = t.q1 - t.q0, t.k1 - t.k0
    return triangle_sum(m, n, min(t.hi, n)) - triangle_sum(m, n, max(t.lo, -m) - 1)


def tile(q: Run, k: Run, band: Band) -> Tile | None:
    """The band between two runs of one document, without the rows and columns that hold nothing; None if all is empty.

    Both runs must have the same step, unless one of them is a single token (whose step means nothing).
    """
    step, offset = (q.step if q.n > 1 else k.step), k.start - q.start
    if q.n > 1 and k.n > 1 and q.step != k.step:
        raise AssertionError(f"runs of different steps never meet in one layout: {q}, {k}")
    lo, hi = -((offset - band.lo) // step), (band.hi - offset) // step
    q0, q1 = max(0, -hi), min(q.n - 1, k.n - 1 - lo)
    k0, k1 = max(0, lo), min(k.n - 1, q.n - 1 + hi)
    if lo > hi or q0 > q1 or k0 > k1:
        return None
    shift = k0 - q0
    return Tile(q.at + q0, q.at + q1 + 1, k.at + k0, k.at + k1 + 1, max(lo - shift, q0 - q1), min(hi - shift, k1 - k0))


def join(tiles: list[Tile]) -> list[Tile]:
    """One tile instead of several, when the band around all of them holds not one cell more than they do.

    Zigzag's diagonal (causal, full, causal) becomes one causal tile this way, without knowing the word zigzag.
    """
    if len(tiles) < 2:
        return tiles
    q0, q1 = min(t.q0 for t in tiles), max(t.q1 for t in tiles)
    k0, k1 = min(t.k0 for t in tiles), max(t.k1 for t in tiles)

    def shift(t: Tile) -> int:
        return (t.k0 - t.q0) - (k0 - q0)

    around = Tile(q0, q1, k0, k1, min(t.lo + shift(t) for t in tiles), max(t.hi + shift(t) for t in tiles))
    return [around] if area(around) == sum(map(area, tiles)) else tiles


def window(t: Tile) -> tuple[int, int]:
    """A trimmed tile's (left, right) in flash-attention's way: bottom-right aligned, INF where an edge cuts nothing."""
    m, n = t.q1 - t.q0, t.k1 - t.k0
    return (INF if t.lo <= 1 - m else n - m - t.lo), (INF if t.hi >= n - 1 else t.hi - n + m)


def split(m: int, n: int, left: int, right: int, rows: int = 1024, tall: bool = False) -> tuple[Part, ...]:
    """One segment (m queries, n keys, bottom-right window) as parts for a kernel without windows.

    Without a lower edge this is at most three parts, full and causal only: square ones, or with `tall` also one of more
    rows than keys, where the rows below the square see all of them. With a lower edge, the queries are cut into slabs
    of about the window's width (at most `rows`) and each slab keeps its band, for the kernel to apply as a mask.
    Parts are disjoint and cover exactly the allowed pairs; rows and columns that hold nothing are in no part.
    """
    if not m or not n:
        return ()
    t = tile(Run(0, 0, m, 1, 0), Run(0, 0, n, 1, 0), Band(n - m - left, n - m + right))
    if t is None:
        return ()
    m, n = t.q1 - t.q0, t.k1 - t.k0
    if t.lo <= 1 - m:
        parts = _without_lower_edge(m, n, min(t.hi, n - 1), tall)
    else:
        parts = _slabs(t, max(min(rows, max(t.hi - t.lo + 1, 256)), 1))
    return tuple(Part(p.q0 + t.q0, p.q1 + t.q0, p.k0 + t.k0, p.k1 + t.k0, p.kind, p.lo, p.hi) for p in parts)


def _without_lower_edge(m: int, n: int, hi: int, tall: bool) -> list[Part]:
    """Row i sees columns 0 .. i + hi: a full block of hi columns, a causal square of the rest, full rows below it."""
    side = n - hi  # at least 1, and at most m: the tile is trimmed
    if side == 1:  # a causal square of one cell cuts nothing
        return [Part(0, m, 0, n, "full", -INF, INF)]
    if tall and not hi:
        return [Part(0, m, 0, n, "causal", -INF, 0)]
    parts = [Part(0, side, hi, n, "causal", -INF, 0)]
    if hi:
        parts.append(Part(0, side, 0, hi, "full", -INF, INF))
    if m > side:
        parts.append(Part(side, m, 0, n, "full", -INF, INF))
    return parts


def _slabs(t: Tile, rows: int) -> list[Part]:
    m, n = t.q1 - t.q0, t.k1 - t.k0
    parts = []
    for a in range(0, m, rows):
        b = min(m, a + rows)
        k0, k1 = max(0, a + t.lo), min(n, b + t.hi)
        parts.append(Part(a, b, k0, k1, "band", t.lo + a - k0, t.hi + a - k0))
    return parts
