"""Pieces: how a rank's block is cut where it does not travel whole.

"even": each piece has rows of both halves of the block, as many of each. In a causal zigzag the first half is a chunk
that all later ranks need with all their queries, the second one that few need; so a step's work is the same on all
ranks, and no rank waits for another that has more to do. "halves": pieces of the first half go before those of the
second. Then what few need travels apart, and a ring sends up to a quarter less: that is for links that take longer
than the work. Where nothing returns, a pass ends with the work of the piece that came last, and nothing can hide under
it: so in forward the last piece goes in two parts. A rank's own rows do not travel, and are cut in their order: a part
of them is a range, which lies together in memory and under a causal mask is one step of a staircase.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from seqpar_ring.geometry import Ints, Rows

CUTS = ("even", "halves")


class Pieces(NamedTuple):
    """So many pieces of each block, cut in one of the `CUTS`; of one size, or the last two of half that size."""

    number: int = 1
    cut: str = "even"
    tapered: bool = False

    def with_taper(self) -> Pieces:
        """The same with the last piece in two parts; a whole block stays whole."""
        return self if self.number == 1 else self._replace(number=self.number + 1, tapered=True)

    def of(self, rows: int) -> list[Rows]:
        """The rows of each piece of a block of so many rows; pieces may be empty."""
        halves = self._halves()
        half, many = (rows + 1) // 2, halves[-1]
        chunks = [(0, rows)] if self.cut == "halves" or self.number == 1 else [(0, half), (half, rows - half)]
        return [
            _ranges(*((at + n * begin // many, at + n * end // many) for at, n in chunks))
            for begin, end in pairwise(halves)
        ]

    def own(self, rows: int) -> list[int]:
        """Where a rank's own rows, so many, are cut into as many parts: the first row of each, and the end."""
        halves = self._halves()
        return [rows * at // halves[-1] for at in halves]

    def columns(self, sizes: tuple[int, ...]) -> tuple[Ints, Ints, Ints, Ints]:
        """(owner, piece, first row, end row) of the ranges of all pieces of blocks of these sizes."""
        found = [
            (owner, p, a, b)
            for owner, rows in enumerate(sizes)
            for p, part in enumerate(self.of(rows))
            for a, b in part
        ]
        owner, piece, begin, end = np.array(found, dtype=np.int64).reshape(-1, 4).T
        return owner, piece, begin, end

    def _halves(self) -> list[int]:
        """Where the pieces begin and end, in halves of a full one."""
        halves = [2 * p for p in range(self.number + 1)]
        if self.tapered:
            halves[-2:] = halves[-2] - 1, halves[-2]
        return halves


def _ranges(*ranges: tuple[int, int]) -> Rows:
    """Ascending ranges that are not empty; those that meet are one."""
    found: list[tuple[int, int]] = []
    for a, b in ranges:
        if found and found[-1][1] == a < b:
            found[-1] = (found[-1][0], b)
        elif a < b:
            found.append((a, b))
    return tuple(found)
