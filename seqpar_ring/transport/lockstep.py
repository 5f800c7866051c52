"""Lockstep: W ranks as threads of one process, each message a copy in a mailbox. For tests, and for one device.

The same schedule, executor and model run here as over torch.distributed, in fp64 and without processes, and what goes
wrong says so at once: sizes that differ between sender and receiver, a rank that failed, one that ended without sending
what another waits for. It is not a way to be fast, and starts no threads itself (`seqpar_ring.testing` does).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqpar_ring.errors import TransportError
from seqpar_ring.transport.agreement import Claim, claim, settle
from seqpar_ring.transport.base import FAR_LANES, LANES, BaseTransport, Handle, Recv, Send, alone


class _Address(NamedTuple):
    """Who sends to whom (ranks of the whole world), for which group of ranks, and in which lane."""

    group: tuple[int, ...] | None
    lane: str
    source: int
    target: int


@dataclass
class _Box:
    """Messages from one rank to another: tickets are drawn when a message is posted, so waits may come in any order."""

    sent: int = 0
    asked: int = 0
    waiting: dict[int, Any] = field(default_factory=dict)


def _set_alarm() -> Lock:
    """A lock on which a rank sleeps until another one releases it."""
    alarm = Lock()
    alarm.acquire()
    return alarm


class Link(NamedTuple):
    """How fast a rank sends: its messages share `bandwidth` bytes a second, and each arrives `latency` s later."""

    bandwidth: float
    latency: float = 0.0


class _Hub:
    """All mailboxes of one world, whose turn it is, and what became of its ranks.

    A rank that waits sleeps on a lock of its own, and is woken once: when it can go on and has been given a turn.
    Threads that wake up only to look whether they may run take the interpreter's lock from the one that does.
    """

    def __init__(self, timeout: float, at_once: int, link: Link | None) -> None:
        self.timeout, self.link = timeout, link
        self._turns = at_once  # that nobody has
        self._free: dict[int, float] = {}  # when each rank's link has sent all that was posted
        self._lock = Lock()
        self._boxes: dict[_Address, _Box] = {}
        self._asleep: dict[tuple[_Address, int], Lock] = {}  # by the message that a rank waits for
        self._ready: deque[Lock] = deque()  # of ranks that only wait for a turn, the first come first
        self._failed: dict[int, BaseException] = {}
        self._finished: set[int] = set()

    def put(self, address: _Address, message: object) -> None:
        with self._lock:
            self._stop_if_a_rank_failed(address.source)
            box = self._boxes.setdefault(address, _Box())
            box.waiting[box.sent] = message
            box.sent += 1
            self._wake((address, box.sent - 1))

    def arrival(self, source: int, nbytes: int) -> float:
        """When a message that is posted now will have arrived, on the clock of `time.monotonic`."""
        if self.link is None:
            return 0.0
        with self._lock:
            begin = max(time.monotonic(), self._free.get(source, 0.0))
            self._free[source] = begin + nbytes / self.link.bandwidth
            return self._free[source] + self.link.latency

    def until(self, moment: float) -> None:
        """Wait for a moment, and let another rank have its turn meanwhile."""
        seconds = moment - time.monotonic()
        if seconds > 0:
            self.give_turn()
            try:
                time.sleep(seconds)
            finally:
                self.take_turn()

    def ticket(self, address: _Address) -> int:
        with self._lock:
            self._stop_if_a_rank_failed(address.target)
            box = self._boxes.setdefault(address, _Box())
            box.asked += 1
            return box.asked - 1

    def take(self, address: _Address, ticket: int) -> Any:
        """The message of this ticket; waits for it.

        Raises:
            TransportError: some rank failed, the sender ended, or nothing came within the timeout.
        """
        deadline = time.monotonic() + self.timeout
        with self._lock:
            while True:
                self._stop_if_a_rank_failed(address.target)
                if ticket in self._boxes[address].waiting:
                    return self._boxes[address].waiting.pop(ticket)
                if address.source in self._finished:
                    raise self._gave_up(address, "which ended without sending it")
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self._gave_up(address, f"which did not come within {self.timeout:g} s")
                self._sleep((address, ticket), left)

    def fail(self, rank: int, error: BaseException) -> None:
        with self._lock:
            self._failed.setdefault(rank, error)
            self._wake(*self._asleep)

    def finish(self, rank: int) -> None:
        with self._lock:
            self._finished.add(rank)
            self._wake(*(message for message in self._asleep if message[0].source == rank))

    def take_turn(self) -> None:
        """Wait until it is this rank's turn to run."""
        alarm = _set_alarm()
        with self._lock:
            self._ready.append(alarm)
            self._hand_out_turns()
        alarm.acquire()

    def give_turn(self) -> None:
        """Let another rank run."""
        with self._lock:
            self._turns += 1
            self._hand_out_turns()

    def _sleep(self, message: tuple[_Address, int], seconds: float) -> None:
        """Let another rank run until something is known of this message. The lock is held before and after."""
        self._asleep[message] = alarm = _set_alarm()
        self._turns += 1
        self._hand_out_turns()
        self._lock.release()
        in_time = alarm.acquire(timeout=seconds)
        self._lock.acquire()
        if not in_time:
            self._wake(message)
            self._lock.release()  # whoever has the turn may need the lock to go on
            alarm.acquire()
            self._lock.acquire()

    def _wake(self, *messages: tuple[_Address, int]) -> None:
        """Whoever waits for one of these messages now waits for a turn."""
        for message in messages:
            if message in self._asleep:
                self._ready.append(self._asleep.pop(message))
        self._hand_out_turns()

    def _hand_out_turns(self) -> None:
        while self._turns > 0 and self._ready:
            self._turns -= 1
            self._ready.popleft().release()

    def _stop_if_a_rank_failed(self, rank: int) -> None:
        for dead, error in self._failed.items():
            if dead != rank:
                raise TransportError(
                    f"rank {rank} stopped because rank {dead} failed with {type(error).__name__}: {error}",
                    fix=f"Look at rank {dead}'s error; this one only follows from it.",
                ) from error

    def _gave_up(self, address: _Address, why: str) -> TransportError:
        return TransportError(
            f"rank {address.target} waited for a message from rank {address.source} in lane {address.lane}, {why}",
            fix=f"See what rank {address.source} did instead: all ranks must post the same schedule in the same order.",
            **({} if address.group is None else {"group": list(address.group)}),
        )


class LockstepWorld:
    """W ranks of one process. Give each thread `world.transport(rank)`.

    Args:
        world: number of ranks.
        timeout: seconds after which a rank that waits gives up.
        at_once: ranks that run at the same time, the others waiting for their turn, if each runs within `turn`. One at
            a time is quickest for small tensors, where threads would only get into each other's way.
        link: how fast a rank sends messages; None: as fast as memory. Collectives are not slowed.
    """

    def __init__(self, world: int, timeout: float = 30.0, at_once: int = 1, link: Link | None = None) -> None:
        self.world, self.timeout = world, timeout
        self._hub = _Hub(timeout, at_once, link)
        self._ranks = tuple(range(world))
        self._group: tuple[int, ...] | None = None

    def transport(self, rank: int) -> LockstepTransport:
        """The transport of one rank; `rank` counts within this world or subset."""
        return LockstepTransport(self._hub, self._ranks, rank, self._group)

    def subset(self, ranks: Sequence[int]) -> LockstepWorld:
        """Some of the ranks as a group of their own, numbered anew from 0; its messages never mix with others'."""
        part = LockstepWorld(len(ranks), self.timeout)
        part._hub = self._hub
        part._ranks = part._group = tuple(self._ranks[r] for r in ranks)
        return part

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A rank's turn to run; it is given up during every wait for a message."""
        self._hub.take_turn()
        try:
            yield
        finally:
            self._hub.give_turn()

    def fail(self, rank: int, error: BaseException) -> None:
        """Note that a rank died: all others raise `TransportError`, those that wait now and any that call later."""
        self._hub.fail(self._ranks[rank], error)

    def finish(self, rank: int) -> None:
        """Note that a rank has ended well: who waits for a message it never sent raises at once."""
        self._hub.finish(self._ranks[rank])


class _Pending:
    """Receives under way; sends were copied when they were posted."""

    def __init__(self, transport: LockstepTransport, tickets: list[tuple[_Address, int, Tensor]]) -> None:
        self._transport, self._tickets = transport, tickets

    def wait(self) -> None:
        """Fill what is to be received."""
        tickets, self._tickets = self._tickets, []
        for address, ticket, tensor in tickets:
            message, arrival = self._transport._take(address, ticket)
            self._transport._hub.until(arrival)
            if message.dtype != tensor.dtype or message.numel() != tensor.numel():
                raise TransportError(
                    "what was sent does not fit what is to be received",
                    fix="Both ranks must post the same schedule.",
                    lane=address.lane,
                    source=address.source,
                    target=address.target,
                    sent=(message.dtype, tuple(message.shape)),
                    expected=(tensor.dtype, tuple(tensor.shape)),
                )
            with torch.no_grad():
                tensor.copy_(message.view(tensor.shape))


class LockstepTransport(BaseTransport):
    """One rank of a `LockstepWorld`. See `Transport` for what its methods do."""

    def __init__(self, hub: _Hub, ranks: tuple[int, ...], rank: int, group: tuple[int, ...] | None) -> None:
        super().__init__(rank, len(ranks), LANES + FAR_LANES)
        self._hub, self._ranks, self._group = hub, ranks, group

    def exchange(self, sends: Sequence[Send], recvs: Sequence[Recv], lane: str = "kv") -> Handle:
        """See `Transport.exchange`. What is sent is copied now, so later writes by the sender do not show."""
        sends, recvs = self._to_post(sends, recvs, lane)
        for peer, tensor in sends:
            message = tensor.detach().clone(), self._hub.arrival(self._ranks[self.rank], tensor.nbytes)
            self._hub.put(self._address(lane, self.rank, peer), message)
        addresses = [self._address(lane, peer, self.rank) for peer, _ in recvs]
        return _Pending(self, [(a, self._hub.ticket(a), m.tensor) for a, m in zip(addresses, recvs, strict=True)])

    @alone("a sum")
    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Transport.all_reduce`. Sums in rank order, so the same ranks give the same bits in every run."""
        self.stats.count("control", (self.world - 1) * x.nbytes)
        parts: list[Tensor] = self._gather(x.detach().clone())
        if len({(part.dtype, part.shape) for part in parts}) > 1:
            raise TransportError(
                "the ranks do not sum the same thing",
                fix="Give all_reduce one shape and dtype on all ranks.",
                shapes=[(part.dtype, tuple(part.shape)) for part in parts],
            )
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    @alone("an agreement")
    def agree(self, what: str, record: Mapping[str, object], error: Exception | None = None) -> None:
        """See `Transport.agree`."""
        error = self._or_broken(error)
        claims: list[Claim] = self._gather(claim(what, record, error))
        settle(claims, self.rank, error)

    def _gather(self, item: Any) -> list[Any]:
        """Every rank's item, in rank order; items are shared, not copied."""
        others = [r for r in range(self.world) if r != self.rank]
        for peer in others:
            self._hub.put(self._address("collective", self.rank, peer), item)
        addresses = {r: self._address("collective", r, self.rank) for r in others}
        tickets = {r: self._hub.ticket(address) for r, address in addresses.items()}
        return [item if r == self.rank else self._take(addresses[r], tickets[r]) for r in range(self.world)]

    def _address(self, lane: str, source: int, target: int) -> _Address:
        return _Address(self._group, lane, self._ranks[source], self._ranks[target])

    def _take(self, address: _Address, ticket: int) -> Any:
        started = time.perf_counter()
        try:
            return self._hub.take(address, ticket)
        finally:
            self.stats.seconds_waited += time.perf_counter() - started
