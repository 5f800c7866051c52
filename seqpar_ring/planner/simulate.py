"""Simulate: a discrete-event simulation of one pass of a schedule on a machine, for all ranks at once.

It replays what the executor does: at each step a rank waits for what is due, posts what is to be posted, computes
what is to be used. Messages leave and arrive over resources that ranks have for themselves or share; those posted
together share a resource evenly, but for those of one lane between the same ranks, which follow one another, and later
ones queue behind them. Time goes by steps, so ranks are columns and a ring of 1,024 takes a second. What a step's
computation costs comes in as seconds; nothing here knows attention, layouts or bytes of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqpar_ring.geometry import Ints
from seqpar_ring.planner.hardware import Link, Machine
from seqpar_ring.schedule import Flows, MoveColumns

Floats = NDArray[np.float64]


class Place(NamedTuple):
    """Where the ranks of a ring are.

    Attributes:
        machine: devices and links.
        heads: ranks that share out the heads at each place of the ring: rank r of the ring is devices
            `r * heads .. (r + 1) * heads`, and each of them runs the same ring beside the others.
        size: devices of a sequence group.
    """

    machine: Machine
    heads: int
    size: int

    def node_of(self, rank: Ints) -> Ints:
        """The node of a rank of the ring."""
        node: Ints = rank * self.heads // self.machine.node
        return node

    def link(self, far: bool) -> Link:
        """The link within a node, or between nodes."""
        return self.machine.outer if far else self.machine.inner

    def resource(self, rank: Ints, far: bool) -> Ints:
        """The number of the resource over which a rank sends or receives."""
        shared = min(self.link(far).shared_by, self.machine.node)
        number: Ints = rank * self.heads // shared
        return number

    def crowd(self, far: bool) -> float:
        """How many times a message's bytes cross its resource: other devices send the like over it at the same time."""
        shared = min(self.link(far).shared_by, self.machine.node)
        seen = max(1, min(self.size, shared) // self.heads)
        return shared / seen


class Run(NamedTuple):
    """One pass as it went, in seconds from its begin. Arrays of (steps, world), and of the moves of each lane.

    Attributes:
        ready: when a rank had done the step before.
        begin: when all that was due had come, and it began to compute.
        end: when it had computed.
        moves: (begin, end) of each move: kv first, dkv then, in the order of the flows.
    """

    ready: Floats
    begin: Floats
    end: Floats
    moves: Floats

    @property
    def seconds(self) -> float:
        """When the last rank was done."""
        return float(self.end[-1].max(initial=0.0))

    @property
    def computing(self) -> float:
        """Seconds that a rank computes, on the busiest."""
        return float((self.end - self.begin).sum(0).max(initial=0.0))

    @property
    def waiting(self) -> float:
        """Seconds that a rank waits for transfers and for others, on average, until the last one is done."""
        return self.seconds - float((self.end - self.begin).sum(0).mean()) if self.end.size else 0.0


def simulate(flows: Flows, compute: Floats, sizes: tuple[float, float], place: Place) -> Run:
    """Run a pass.

    Args:
        flows: the traffic.
        compute: seconds of each step and rank, (flows.steps + 1, world).
        sizes: bytes of a row in a kv move and in a dkv move.
        place: where the ranks are.
    """
    moves = MoveColumns(*(np.concatenate(pair) for pair in zip(flows.kv, flows.dkv, strict=True)))
    size = np.r_[flows.kv.rows * float(sizes[0]), flows.dkv.rows * float(sizes[1])]
    lane = np.repeat([0, 1], [len(flows.kv.rows), len(flows.dkv.rows)])
    wire = _Wire(moves, lane, size, place)
    steps = len(compute)
    ready, begin, end = (np.zeros((steps, flows.world)) for _ in range(3))
    by_post, by_due = (_Steps(column, steps) for column in (moves.post, moves.due))
    now = np.zeros(flows.world)
    for step in range(steps):
        ready[step] = now
        due = by_due[step]
        if len(due):
            wire.settle(due, now)
        begin[step] = now
        posted = by_post[step]
        stolen = wire.post(posted, now) if len(posted) else 0.0
        lasts = compute[step]
        now = now + lasts + np.minimum(lasts, stolen)
        end[step] = now
    return Run(ready, begin, end, np.stack([wire.begin, wire.end]))


class _Steps:
    """The moves of each step, as index arrays."""

    def __init__(self, step: Ints, steps: int) -> None:
        self._order = np.argsort(step, kind="stable")
        self._bounds = np.searchsorted(step[self._order], np.arange(steps + 1))

    def __getitem__(self, step: int) -> Ints:
        found: Ints = self._order[self._bounds[step] : self._bounds[step + 1]]
        return found


class _Wire:
    """The links: what is under way on them, and until when each resource is taken."""

    def __init__(self, moves: MoveColumns, lane: Ints, size: Floats, place: Place) -> None:
        self._moves = moves
        far = place.node_of(moves.src) != place.node_of(moves.dst)
        links = (place.link(False), place.link(True))
        seconds = size * np.where(far, *(place.crowd(f) / links[f].bandwidth for f in (True, False)))
        self._latency = np.where(far, links[1].latency, links[0].latency)
        self._steals = np.where(far, links[1].steals, links[0].steals) * size
        self._steals /= np.where(far, links[1].bandwidth, links[0].bandwidth)
        # Resources of links within a node and of those between nodes have numbers of their own.
        base = 1 + max(int(place.resource(np.max(moves.src, initial=0, keepdims=True), f)[0]) for f in (False, True))
        both = [
            np.where(far, base + place.resource(rank, True), place.resource(rank, False))
            for rank in (moves.src, moves.dst)
        ]
        highest = 2 * base + max(int(r.max(initial=0)) for r in both)
        self._out, self._into = both
        self._out_free, self._into_free = np.zeros(highest + 1), np.zeros(highest + 1)
        self._out_share, self._out_total = _shares(moves, lane, self._out, seconds)
        self._into_share, self._into_total = _shares(moves, lane, self._into, seconds)
        self.begin, self.end = np.zeros(len(size)), np.zeros(len(size))

    def post(self, which: Ints, now: Floats) -> Floats:
        """Put the moves of a step on their way; returns the seconds that they take of each rank's computation."""
        src, dst = self._moves.src[which], self._moves.dst[which]
        out, into = self._out[which], self._into[which]
        both = np.maximum(now[src], now[dst])
        leave, come = np.maximum(both, self._out_free[out]), np.maximum(both, self._into_free[into])
        np.maximum.at(self._out_free, out, leave + self._out_total[which])
        np.maximum.at(self._into_free, into, come + self._into_total[which])
        self.begin[which] = np.maximum(leave, come)
        last = np.maximum(leave + self._out_share[which], come + self._into_share[which])
        self.end[which] = last + self._latency[which]
        sent, got = np.zeros_like(now), np.zeros_like(now)
        np.add.at(sent, src, self._steals[which])
        np.add.at(got, dst, self._steals[which])
        stolen: Floats = np.maximum(sent, got)
        return stolen

    def settle(self, which: Ints, now: Floats) -> None:
        """Let both ends wait for the moves that are due."""
        np.maximum.at(now, self._moves.src[which], self.end[which])
        np.maximum.at(now, self._moves.dst[which], self.end[which])


def _shares(moves: MoveColumns, lane: Ints, resource: Ints, seconds: Floats) -> tuple[Floats, Floats]:
    """When each move is through, and when all are, of those posted at one step over one resource.

    Moves of one lane between the same two ranks follow one another, those due first in front; such queues share the
    resource evenly. A move that ends c seconds of its own queue's into it is through once each queue has had c, or all
    that it holds: after the sum over the queues of min(c, seconds of the queue).
    """
    if not len(seconds):
        return np.zeros(0), np.zeros(0)
    ranks = 1 + int(max(moves.src.max(), moves.dst.max()))
    group = moves.post * (int(resource.max()) + 1) + resource
    queue = ((group * 2 + lane) * ranks + moves.src) * ranks + moves.dst
    order = np.lexsort((moves.due, queue))
    first = np.flatnonzero(np.r_[True, queue[order][1:] != queue[order][:-1]])
    through = seconds[order].cumsum()
    through -= np.repeat(np.r_[0.0, through][first], np.diff(np.r_[first, len(order)]))
    whole = through[np.r_[first[1:], len(order)] - 1]
    # Queues and moves of each group in order of their seconds; what queues before a move hold is done by then.
    held = np.r_[whole, np.zeros(len(order))]
    groups = np.r_[group[order][first], group[order]]
    ranked = np.lexsort((held == 0, np.r_[whole, through], groups))
    begins = np.flatnonzero(np.r_[True, groups[ranked][1:] != groups[ranked][:-1]])
    counts = np.diff(np.r_[begins, len(ranked)])
    done, left = (_running(x[ranked], begins, counts) for x in (held, (held > 0).astype(float)))
    every, queues = (np.repeat(np.add.reduceat(x[ranked], begins), counts) for x in (held, (held > 0).astype(float)))
    shares = np.empty(len(ranked))
    shares[ranked] = done + (queues - left) * np.r_[whole, through][ranked]
    totals = np.empty(len(ranked))
    totals[ranked] = every
    share, total = np.empty_like(seconds), np.empty_like(seconds)
    share[order], total[order] = shares[len(first) :], totals[len(first) :]
    return share, total


def _running(values: Floats, begins: Ints, counts: Ints) -> Floats:
    """Sums from the beginning of each group to each of its members, those included."""
    total = values.cumsum()
    found: Floats = total - np.repeat(np.r_[0.0, total][begins], counts)
    return found
