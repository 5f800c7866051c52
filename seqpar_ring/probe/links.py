"""Links: how long messages take between each pair of ranks, alone and together, and what they take from computation.

Messages go the way the executor's do, through the ring's transport, so the figures hold for that and not for the wire.
Ranks of one host are told apart from those of others. Small groups try every pair; large ones each rank's neighbours,
which a ring uses, and the first rank's way to every node.
"""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqpar_ring.errors import GroupError
from seqpar_ring.groups import Groups
from seqpar_ring.planner.hardware import Link
from seqpar_ring.probe import fit
from seqpar_ring.probe.timing import Effort, clocked, device_of, meet, settle, shared
from seqpar_ring.transport import Recv, Send

BYTES = (4 << 10, 32 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)
"""Message sizes."""

ALL_PAIRS = 8
"""Ranks up to which every pair is tried."""

MOST_ROUNDS = 25
"""Times that a small message is sent."""

LANE = "kv"


class Message(NamedTuple):
    """Timed messages between ranks of a group.

    Attributes:
        how: "one way", from the first rank to the second; "both ways", between the two at once; "together", from every
            rank to another at once, as from the first to the second: the next of its node, or its like in the next.
        first, second: the ranks.
        near: whether they share a node.
        nbytes: bytes of each message.
        seconds: of the slower rank, lower quartile of the rounds.
    """

    how: str
    first: int
    second: int
    near: bool
    nbytes: int
    seconds: float


def node_size(groups: Groups, node: int | None) -> int:
    """Ranks of a node: as given, or as host names say. Collective over the ring.

    Raises:
        GroupError: ranks of a host are not adjacent and of one number on each, or `node` does not divide them.
    """
    if node is None:
        digest = hashlib.sha256(socket.gethostname().encode()).digest()
        hosts = [row[0] for row in shared(groups, [float(int.from_bytes(digest[:6], "big"))])]
        borders = [r for r in range(1, groups.size) if hosts[r] != hosts[r - 1]]
        node = borders[0] if borders else groups.size
        if len(set(hosts)) != groups.size // node or borders != list(range(node, groups.size, node)):
            fix = "Start as many ranks on every host, host by host; or give node."
            raise GroupError("the ranks of a host are not adjacent", fix=fix, hosts_begin_at=[0, *borders])
    if node < 1 or groups.size % node:
        fitting = [n for n in range(1, groups.size + 1) if groups.size % n == 0]
        fix = f"Give {' or '.join(map(str, fitting))}."
        raise GroupError("the ranks of a node do not divide the group", fix=fix, node=node, ranks=groups.size)
    return node


def table(groups: Groups, node: int, effort: Effort) -> list[Message]:
    """Timings of messages of all sizes; the same on every rank. Collective over the ring."""
    found = []
    for first, second in _pairs(groups.size, node):
        near = first // node == second // node
        for how in ("one way", "both ways"):
            post = partial(_between, groups, first, second, how)
            found += [Message(how, first, second, near, *row) for row in _by_size(groups, post, effort)]
    for near in nearness(groups, node):
        post = partial(_shift, groups, node, near)
        found += [Message("together", 0, 1 if near else node, near, *row) for row in _by_size(groups, post, effort)]
    return found


def nearness(groups: Groups, node: int) -> list[bool]:
    """Which links there are: within a node (True), between nodes (False)."""
    return [True] * (node > 1) + [False] * (node < groups.size)


def link(messages: Sequence[Message], near: bool, node: int, steals: float) -> Link | None:
    """The link within a node, or between nodes; None where no two ranks have it.

    The bandwidth is that of ranks that all transfer at once, each with the next, times the number that share the link:
    as many as one that transfers alone is faster. Latency is that of the smallest messages between two.
    """
    mine = [m for m in messages if m.near == near]
    alone = [m for m in mine if m.how == "both ways"]
    if not alone:
        return None
    fits = [_line([m for m in alone if (m.first, m.second) == pair]) for pair in _of(alone)]
    rates, latency = sorted(f.bandwidth for f in fits), median(f.latency for f in fits)
    crowded = _line([m for m in mine if m.how == "together"]).bandwidth
    sharers = min(max(1, round(median(rates) / crowded)), node)
    where = "within a node" if near else "between nodes"
    spread = f"{rates[0] / 1e6:.4g} to {rates[-1] / 1e6:.4g} MB/s"
    source = f"probed: {len(fits)} pairs alone, {spread}; all at once {crowded / 1e6:.4g} MB/s each"
    numbers = {"bandwidth": crowded * sharers, "latency": latency, "shared_by": sharers, "steals": steals}
    return Link.model_validate({"name": where, "source": source, **numbers})


class Overlap(NamedTuple):
    """Seconds of computation alone, of transfers alone, and of both at once; and what was stolen of the computation."""

    compute: float
    transfer: float
    both: float

    @property
    def steals(self) -> float:
        """Seconds of computation lost for each second in which a rank transfers."""
        return min(max((self.both - max(self.compute, self.transfer)) / self.transfer, 0.0), 1.0)


def overlap(
    groups: Groups, node: int, near: bool, work: tuple[Callable[[], object], float], speed: float
) -> Overlap:
    """Kernel calls and a shift of all ranks, alone and at once; the calls take twice as long. Collective over the ring.

    Args:
        groups: the ranks.
        node: ranks of a node.
        near: whether each sends within its node, or to the next.
        work: the call, and the seconds that it takes.
        speed: bytes per second of the shift, about.
    """
    call, seconds = work
    times = max(4, round(0.2 / seconds))
    nbytes = max(BYTES[1], int(min(speed * times * seconds / 2, 256 << 20)) // 8 * 8)
    post = _shift(groups, node, near, nbytes)

    def compute() -> None:
        for _ in range(times):
            call()

    def both() -> None:
        handle = post()
        compute()
        handle.wait()

    rounds = []
    for _ in range(5):
        mine = clocked(groups, compute), clocked(groups, lambda: post().wait()), clocked(groups, both)
        rounds.append([max(column) for column in zip(*shared(groups, mine), strict=True)])
    # A small difference of large numbers, so the best of each.
    return Overlap(*(min(column) for column in zip(*rounds, strict=True)))


Post = Callable[[], Any]


def _pairs(world: int, node: int) -> list[tuple[int, int]]:
    if world <= ALL_PAIRS:
        return [(a, b) for a in range(world) for b in range(a + 1, world)]
    every = [(r, r + 1) for r in range(world - 1)] + [(0, r) for r in range(node, world, node)]
    return list(dict.fromkeys(every))


def _of(messages: Sequence[Message]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((m.first, m.second) for m in messages))


def _line(messages: Sequence[Message]) -> fit.LineFit:
    return fit.line([m.nbytes for m in messages], [m.seconds for m in messages])


def _by_size(groups: Groups, post: Callable[[int], Post], effort: Effort) -> list[tuple[int, float]]:
    """(bytes, seconds) of messages of growing size, until they take too long."""
    found = []
    for nbytes in BYTES:
        send = post(nbytes)
        _timed(groups, send)  # connects, and warms up
        once = max(row[0] for row in shared(groups, [_timed(groups, send)]))
        rounds = min(max(effort.rounds, round(5 * effort.seconds / once)), MOST_ROUNDS)
        times = [_timed(groups, send) for _ in range(rounds)]
        # What else goes on only makes a message slower, so a good one says more than a middling one.
        seconds = sorted(max(column) for column in zip(*shared(groups, times), strict=True))[rounds // 4]
        found.append((nbytes, seconds))
        if 4 * seconds > effort.longest and len(found) > 3:
            break
    return found


def _timed(groups: Groups, send: Post) -> float:
    meet(groups)
    begin = time.perf_counter()
    send().wait()
    settle(groups)
    return time.perf_counter() - begin


def _between(groups: Groups, first: int, second: int, how: str, nbytes: int) -> Post:
    """Posts a message between two ranks; the others have nothing to do."""
    mine, theirs = _buffers(groups, nbytes)
    sends, recvs = [], []
    if groups.rank in (first, second):
        peer = second if groups.rank == first else first
        sends = [Send(peer, mine)] if how == "both ways" or groups.rank == first else []
        recvs = [Recv(peer, theirs)] if how == "both ways" or groups.rank == second else []
    return partial(groups.ring.exchange, sends, recvs, LANE)


def _shift(groups: Groups, node: int, near: bool, nbytes: int) -> Post:
    """Posts a message to the next rank of the node, or to the same rank of the next node, on all ranks."""
    mine, theirs = _buffers(groups, nbytes)
    first = groups.rank // node * node
    to, source = (
        first + (groups.rank - first + by) % node if near else (groups.rank + by * node) % groups.size for by in (1, -1)
    )
    return partial(groups.ring.exchange, [Send(to, mine)], [Recv(source, theirs)], LANE)


def _buffers(groups: Groups, nbytes: int) -> tuple[Tensor, Tensor]:
    mine, theirs = (torch.zeros(nbytes // 4, device=device_of(groups)) for _ in range(2))
    return mine, theirs
