"""Timing: how long something takes on every rank of a group while all of them do it.

Ranks share cores, memory and links, so what one of them attains alone is not what a ring sees. All begin together, do
the same number of calls, and the figures of all ranks come back to each, so that what they decide is decided alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch

from seqpar_ring.groups import Groups, own_device


class Effort(NamedTuple):
    """How thoroughly to measure.

    Attributes:
        seconds: that the calls of one figure take together, at least.
        rounds: times that each figure is taken; the median counts.
        longest: seconds of one call beyond which larger ones are left out.
    """

    seconds: float
    rounds: int
    longest: float


QUICK, THOROUGH = Effort(0.04, 3, 0.35), Effort(0.2, 5, 1.5)


def device_of(groups: Groups) -> torch.device:
    """Where this rank computes."""
    return own_device(groups.mesh is not None and groups.mesh.device_type == "cuda")


def shared(groups: Groups, mine: Sequence[float]) -> list[list[float]]:
    """Every rank's numbers, in rank order; collective over the ring."""
    table = torch.zeros((groups.size, len(mine)), dtype=torch.float64)
    table[groups.rank] = torch.tensor(list(mine), dtype=torch.float64)
    rows: list[list[float]] = groups.ring.all_reduce(table).tolist()
    return rows


def meet(groups: Groups) -> None:
    """Return when all ranks are here and what was queued on their devices is done."""
    settle(groups)
    groups.ring.all_reduce(torch.zeros(1))


def settle(groups: Groups) -> None:
    """Wait for this rank's device."""
    if device_of(groups).type == "cuda":
        torch.cuda.synchronize()


def clocked(groups: Groups, work: Callable[[], object], times: int = 1) -> float:
    """Seconds of so many calls on this rank; all ranks begin together. Collective over the ring."""
    meet(groups)
    begin = time.perf_counter()
    for _ in range(times):
        work()
    settle(groups)
    return time.perf_counter() - begin


def per_call(groups: Groups, work: Callable[[], object], effort: Effort) -> float:
    """Seconds of one call while all ranks make such calls: the median over rounds and ranks, on all of them."""
    clocked(groups, work)  # warms up
    once = _median(shared(groups, [clocked(groups, work)]))
    times = max(1, round(effort.seconds / once)) if once > 0 else 1
    return _median(shared(groups, [clocked(groups, work, times) / times for _ in range(effort.rounds)]))


def _median(ranks: list[list[float]]) -> float:
    return median(number for rank in ranks for number in rank)
