"""Packing: which ranks share which document, for data of many lengths.

A document that one rank holds whole is never sent. So short documents stay whole, and a long one is spread over as
few ranks as balance allows: groups of 2, 4, .. world ranks, aligned and nested, so that a group stays inside a node
where it fits. Attention costs the square of a length, memory the length itself; ranks must be even in both. This
module only assigns; `layout.spread` cuts.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Balance(NamedTuple):
    """How far above the mean the fullest rank may be, in tokens and in attention area (the sum of squares)."""

    tokens: float = 1.01
    area: float = 1.03


class Groups(NamedTuple):
    """For each document the ranks that share it: `first .. first + size`."""

    first: Ints
    size: Ints

    @staticmethod
    def everywhere(n: Ints, world: int) -> Groups:
        """Every document over all ranks."""
        return Groups(np.zeros_like(n), np.full_like(n, world))


def assign(n: Ints, world: int, balance: Balance) -> Groups:
    """Whole where short, shared where longer than a limit: the largest limit that meets the tolerances.

    Limits are T/W, T/2W, T/4W, .. tokens (T in all). The largest means the fewest bytes: what is whole stays.
    Where no limit meets them (a few tokens in all), every document is shared as widely as the last limit says.

    Args:
        n: tokens of each document.
        world: ranks.
        balance: the tolerances.
    """
    total, divisor = int(n.sum()), 1
    order = np.argsort(-n, kind="stable")
    while True:
        limit = max(1, total // (divisor * world))
        groups, tokens, area = _assign(n, order, world, limit)
        even = max(tokens) * world <= balance.tokens * total and max(area) * world <= balance.area * sum(area)
        if even or divisor * world > total:
            return groups
        divisor *= 2


def _assign(n: Ints, order: Ints, world: int, limit: int) -> tuple[Groups, list[float], list[float]]:
    """Longest first to the least loaded: by area, and by tokens for the shortest documents that together hold a quarter
    of the tokens, which fill up what area left uneven."""
    lengths = n[order].tolist()
    sizes = _sizes(n[order], world, limit)
    first = [0] * len(lengths)
    few = int(np.searchsorted(n[order][::-1].cumsum(), int(n.sum()) / 4, "left"))
    border = len(lengths) - min(len(lengths), few + 1)
    fill, work = np.zeros(world), np.zeros(world)  # tokens and area of each rank so far
    shared = sum(size > 1 for size in sizes)  # the longest, so they come first
    for i in range(shared):
        size = sizes[i]
        load = work if i < border else fill
        starts = range(0, world - size + 1, size)
        g = 0
        if len(starts) > 1:
            g = int(load[: len(starts) * size].reshape(-1, size).sum(1).argmin()) * size
        first[i] = g
        fill[g : g + size] += lengths[i] / size
        work[g : g + size] += lengths[i] ** 2 / size
    t: list[float] = fill.tolist()
    a: list[float] = work.tolist()
    for begin, end, sums in ((shared, max(border, shared), a), (max(border, shared), len(lengths), t)):
        heap = [(x, r) for r, x in enumerate(sums)]
        heapq.heapify(heap)
        for i in range(begin, end):
            r, length = heap[0][1], lengths[i]
            first[i] = r
            t[r] += length
            a[r] += length * length
            heapq.heapreplace(heap, (sums[r], r))
    groups = Groups(np.zeros_like(n), np.ones_like(n))
    groups.first[order], groups.size[order] = first, sizes
    return groups, t, a


def _sizes(n: Ints, world: int, limit: int) -> list[int]:
    """The smallest group of 1, 2, 4, .. world ranks in which a rank's share of the document is within the limit."""
    size = np.ones_like(n)
    m = 1
    while m < world:
        size[n > m * limit] = m = min(2 * m, world)
        if not (n > m * limit).any():
            break
    return size.tolist()  # type: ignore[no-any-return]
