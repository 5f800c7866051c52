"""Fits: the few numbers of a description from many timings, by least squares of relative errors, none below zero.

Relative, because a schedule is made of small and large blocks alike and a large one must not drown the small. With two
or three unknowns every set of those that are not zero is tried, so the answer is the best there is, without a solver.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqpar_ring.errors import ConfigError
from seqpar_ring.planner.hardware import Pace

Floats = NDArray[np.float64]


class Block(NamedTuple):
    """One timed kernel call.

    Attributes:
        rows: its query rows.
        keys: its keys.
        pairs: pairs of a query and a key that it computes.
        flop: FLOP of a pair, all heads and the whole pass.
        seconds: what it took.
    """

    rows: int
    keys: int
    pairs: int
    flop: float
    seconds: float


class Errors(NamedTuple):
    """How far a fit is off, as shares of what was measured."""

    median: float
    worst: float


class PaceFit(NamedTuple):
    """A pace, and how well it tells the calls it is made from."""

    pace: Pace
    errors: Errors


class LineFit(NamedTuple):
    """Seconds of a message, about `latency + bytes / bandwidth`."""

    latency: float
    bandwidth: float


def pace(blocks: Sequence[Block]) -> PaceFit:
    """The pace that tells these calls best.

    Raises:
        ConfigError: too few calls to tell three numbers, or some that took no time.
    """
    _check([b.seconds for b in blocks], least=3)
    seconds = np.array([b.seconds for b in blocks])
    table = np.array([[b.flop * b.pairs, 1.0, b.flop * b.rows] for b in blocks])
    (per_flop, call, per_row), errors = _solve(table, seconds)
    return PaceFit(Pace(rate=1 / per_flop, call=call, row=per_row / per_flop), errors)


def line(nbytes: Sequence[float], seconds: Sequence[float]) -> LineFit:
    """The bandwidth of large messages and the latency of small ones.

    Not one line through all: links let the first bytes after a pause through faster (buffers, buckets), and libraries
    send small messages in another way. So the bandwidth is what the bytes take by which the largest message exceeds the
    largest of at most half its size, and the latency what the smallest takes beyond its bytes.

    Raises:
        ConfigError: too few messages to tell two numbers, or some that took no time.
    """
    _check(seconds, least=2)
    order = np.argsort(nbytes)
    size, took = np.array(nbytes, dtype=float)[order], np.array(seconds)[order]
    half = int(np.searchsorted(size, size[-1] / 2, "right")) - 1
    more = took[-1] - took[half] if half >= 0 else 0.0
    bandwidth = (size[-1] - size[half]) / more if more > 0 else size[-1] / took[-1]
    return LineFit(max(0.0, float(took[0] - size[0] / bandwidth)), float(bandwidth))


def _check(seconds: Sequence[float], least: int) -> None:
    if len(seconds) < least or min(seconds) <= 0:
        fix = f"Measure at least {least} sizes, each long enough for the clock."
        raise ConfigError("these timings cannot be fitted", fix=fix, seconds=list(seconds))


def _solve(table: Floats, seconds: Floats) -> tuple[list[float], Errors]:
    """Factors of the columns, none negative and the first positive, with the least squares of relative errors."""
    relative = table / seconds[:, None]
    scale = np.abs(relative).max(0)
    best: tuple[float, Floats] | None = None
    others = range(1, table.shape[1])
    for size in range(table.shape[1]):
        for some in combinations(others, size):
            columns = [0, *some]
            found = np.linalg.lstsq((relative / scale)[:, columns], np.ones(len(seconds)), rcond=None)[0]
            if found[0] <= 0 or (found < 0).any():
                continue
            factors = np.zeros(table.shape[1])
            factors[columns] = found
            off = float(((relative / scale) @ factors - 1) @ ((relative / scale) @ factors - 1))
            if best is None or off < best[0]:
                best = off, factors
    assert best is not None  # the first column alone is positive, and so is its factor
    factors = best[1] / scale
    misses = np.abs(relative @ factors - 1)
    return factors.tolist(), Errors(float(np.median(misses)), float(misses.max()))
