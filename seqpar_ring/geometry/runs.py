"""Runs: where a rank's tokens come from, as arithmetic progressions of positions.

A layout gives each rank a few runs of each document instead of a list of token numbers, so that masks, transfers and
kernel calls can be worked out on a handful of integers however long the sequence is. Runs know nothing about ranks or
masks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

Rows = tuple[tuple[int, int], ...]
"""Half-open ranges of rows in a rank's memory, ascending and disjoint."""


class Run(NamedTuple):
    """`n` positions `start, start + step, ...` of document `doc`, in memory rows `at .. at + n` of their rank."""

    doc: int
    start: int
    n: int
    step: int
    at: int


def view(runs: tuple[Run, ...], rows: Rows) -> tuple[Run, ...]:
    """The runs of a buffer that holds only these row ranges of its owner's memory, one range after the other."""
    out: list[Run] = []
    at = i = 0
    for a, b in rows:
        while i < len(runs) and runs[i].at + runs[i].n <= a:
            i += 1
        j = i
        while j < len(runs) and runs[j].at < b:
            r = runs[j]
            lo, hi = max(a, r.at), min(b, r.at + r.n)
            out.append(Run(r.doc, r.start + (lo - r.at) * r.step, hi - lo, r.step, at + lo - a))
            j += 1
        at += b - a
    return tuple(out)


def by_document(runs: Iterable[Run]) -> dict[int, list[Run]]:
    """The runs of each document, in the order given."""
    mine: dict[int, list[Run]] = {}
    for run in runs:
        mine.setdefault(run.doc, []).append(run)
    return mine


def union(rows: Iterable[tuple[int, int]]) -> Rows:
    """Ranges in any order, overlapping or touching, as ascending disjoint ranges."""
    out: list[tuple[int, int]] = []
    for a, b in sorted(rows):
        if out and a <= out[-1][1]:
            out[-1] = (out[-1][0], max(b, out[-1][1]))
        else:
            out.append((a, b))
    return tuple(out)


def clip(rows: Rows, lo: int, hi: int) -> Rows:
    """The parts of the ranges that lie in `lo .. hi`."""
    return tuple((max(a, lo), min(b, hi)) for a, b in rows if a < hi and b > lo)


def count(rows: Rows) -> int:
    """Number of rows in the ranges."""
    return sum(b - a for a, b in rows)


def within(run: Run, low: int, high: int) -> Run | None:
    """The part of a run at positions `low .. high`; None if there is none."""
    begin = max(0, -((run.start - low) // run.step))
    end = min(run.n, -((run.start - high) // run.step))
    if begin >= end:
        return None
    return Run(run.doc, run.start + begin * run.step, end - begin, run.step, run.at + begin)
