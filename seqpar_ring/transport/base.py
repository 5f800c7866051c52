"""What a transport is: messages between the ranks of one group, a few collectives, an agreement, and statistics.

Everything above (the executor, sharding, the loss) speaks to this protocol only, so the same schedule runs over
torch.distributed or over threads of one process. `BaseTransport` holds what both share: checks of what is posted, and
`all_gather`, which follows from `exchange`. A transport knows nothing of attention, plans or layouts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from threading import RLock
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from seqpar_ring.errors import TransportError
from seqpar_ring.transport.stats import TransportStats

Method = TypeVar("Method", bound=Callable[..., Any])

LANES = ("kv", "dkv", "control")
"""Independent streams of messages: none waits for another. Collectives travel in "control"."""

FAR_LANES = ("kv_far", "dkv_far")
"""Lanes for what goes between nodes, so that a slow transfer holds up no fast one; made where a schedule has such."""


class Send(NamedTuple):
    """A message out. `tensor` is contiguous and must stay unchanged until the handle was waited for."""

    peer: int
    tensor: Tensor


class Recv(NamedTuple):
    """A message in. `tensor` is contiguous, filled in place; dtype and number of elements are the `Send`'s."""

    peer: int
    tensor: Tensor


class Handle(Protocol):
    """An exchange under way."""

    def wait(self) -> None:
        """Return when received data is there and sent tensors may be reused (on CUDA: for work queued after this).

        Raises:
            TransportError: a peer died, or did not arrive within the timeout.
        """


class Recorder(Protocol):
    """Takes the time of what a rank does; see `seqpar_ring.trace`."""

    def start(self, label: str) -> None:
        """A pass begins."""

    def span(self, kind: str, stage: int) -> AbstractContextManager[None]:
        """Something that a stage of this pass does, for as long as it lasts."""


class Messenger(Protocol):
    """Ranks numbered 0 .. world-1 that can send each other messages, in some lanes."""

    rank: int
    world: int
    lanes: tuple[str, ...]

    def exchange(self, sends: Sequence[Send], recvs: Sequence[Recv], lane: str = "kv") -> Handle:
        """Post messages and return at once.

        Within a lane, the messages of a pair (from, to) match in posting order. Tensors without elements are skipped on
        both sides.

        Raises:
            TransportError: a peer outside the group, a tensor that is not contiguous, an unknown lane, a dead peer.
        """


class Transport(Messenger, Protocol):
    """The ranks of one group, and all ways to move tensors between them.

    `recorder`, where somebody records, is told what is done with this transport; `agreed` remembers what its ranks need
    not compare again; `broken` says what left messages under way that would be taken for others; `calls` counts
    calls of attention.
    """

    stats: TransportStats
    recorder: Recorder | None
    agreed: Agreed
    broken: str
    calls: int

    def groups(self) -> Sequence[Any]:
        """The process groups that messages go over; none where ranks are threads."""

    def carries(self, device: torch.device) -> bool:
        """Whether messages may be tensors on such a device."""

    def in_one_go(self, what: str) -> AbstractContextManager[None]:
        """While this rank does something that is many messages: an error in the middle makes the transport `broken`.

        Args:
            what: "attention", for messages.

        Raises:
            TransportError: another thread of this rank is in the middle of something here.
        """

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        """All ranks' tensors, concatenated along `dim` in rank order; not differentiable.

        Args:
            x: this rank's part; the ranks' shapes are equal but for `dim`.
            sizes: each rank's size along `dim`; 0 is allowed.
            dim: the dimension that is concatenated.
        """

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks as a new tensor, with the same bits on all of them; not differentiable."""

    def agree(self, what: str, record: Mapping[str, object], error: Exception | None = None) -> None:
        """Return if all ranks hold the same record and none has an error; else raise on every rank. Collective.

        Args:
            what: the point all ranks are at, for messages: "plan", "batch".
            record: field names to values with a stable repr: numbers, strings, tuples, dtypes.
            error: what went wrong on this rank, if anything; then every rank raises.

        Raises:
            DisagreementError: records differ; names the field and the values by rank.
            Exception: `error` itself here; elsewhere one that names the failing rank, of the same class where possible.
            TransportError: an earlier pass failed in the middle on some rank.
        """

    def agree_at_first(
        self,
        what: str,
        record: Mapping[str, object],
        error: Exception | None = None,
        always: bool = False,
        known_as: str = "",
    ) -> None:
        """The same, but only of what has not been agreed on before, or `always`: on a GPU the host would have to wait.
        A rank with an error that others have not is then alone, where they have agreed on their record before.

        `known_as` is for records that differ each time, of which the first is compared; else each of them is known.
        """


class Agreed:
    """What the ranks of a group have agreed on lately. All of them ask the same in the same order (what comes between
    may differ), so all forget the same.

    Args:
        kept: how much is remembered.
    """

    def __init__(self, kept: int = 4096) -> None:
        self._kept, self._known = kept, OrderedDict[object, None]()

    def knows(self, what: object) -> bool:
        """Whether this was added, and not so long ago that it was forgotten."""
        known = what in self._known
        if known:
            self._known.move_to_end(what)
        return known

    def add(self, what: object) -> None:
        """The ranks have agreed on this. Not before: a rank that could not agree would think otherwise."""
        self._known[what] = None
        self._known.move_to_end(what)
        if len(self._known) > self._kept:
            self._known.popitem(last=False)


def alone(what: str) -> Callable[[Method], Method]:
    """Marks a collective of a transport, which one thread of a rank at a time may be in the middle of.

    Args:
        what: "an agreement", for messages.
    """

    def marked(method: Method) -> Method:
        @wraps(method)
        def with_turn(self: BaseTransport, *args: Any, **kwargs: Any) -> Any:
            if self.world == 1:  # no messages, and nothing for a compiler to stumble over
                return method(self, *args, **kwargs)
            with self._alone(what):
                return method(self, *args, **kwargs)

        return with_turn  # type: ignore[return-value]

    return marked


class BaseTransport(ABC):
    """Rank, statistics, checks of what is posted, and `all_gather`, which needs nothing but `exchange`."""

    anew = "Make a new SequenceParallel on all ranks before the step is tried again."
    """How a transport that is `broken` is replaced."""

    def __init__(self, rank: int, world: int, lanes: Iterable[str]) -> None:
        self.rank, self.world, self.stats = rank, world, TransportStats()
        self.lanes = tuple(lanes)
        self.recorder: Recorder | None = None
        self.agreed = Agreed()
        self.broken = ""
        self.calls = 0
        self._turn, self._doing = RLock(), ""

    @abstractmethod
    def exchange(self, sends: Sequence[Send], recvs: Sequence[Recv], lane: str = "kv") -> Handle:
        """See `Transport.exchange`."""

    @abstractmethod
    def agree(self, what: str, record: Mapping[str, object], error: Exception | None = None) -> None:
        """See `Transport.agree`."""

    def groups(self) -> Sequence[Any]:
        """See `Transport.groups`."""
        return ()

    def carries(self, device: torch.device) -> bool:
        """See `Transport.carries`."""
        return True

    def agree_at_first(
        self,
        what: str,
        record: Mapping[str, object],
        error: Exception | None = None,
        always: bool = False,
        known_as: str = "",
    ) -> None:
        """See `Transport.agree_at_first`."""
        key = what, known_as or repr(record)
        if error is None and not always and not self.broken and self.agreed.knows(key):
            return
        self.agree(what, record, error)
        self.agreed.add(key)

    @contextmanager
    def in_one_go(self, what: str) -> Iterator[None]:
        """See `Transport.in_one_go`."""
        if self.world == 1:  # there is nobody to have sent anything
            yield
            return
        with self._alone(what):
            try:
                yield
            except BaseException as error:
                told = f"{type(error).__name__}: {error}"
                self.broken = f"{what} failed in the middle of a pass on this rank ({told})"
                raise

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """Messages are told apart by their order, and two threads of a rank have none that all ranks share."""
        if not self._turn.acquire(blocking=False):
            self.broken = f"{what} was begun by one thread of this rank while another was in {self._doing}"
            raise TransportError(
                self.broken,
                fix="Call everything of a SequenceParallel in one thread at a time: what ranks send each other is told "
                "apart by its order alone.",
                rank=self.rank,
            )
        before, self._doing = self._doing, what
        try:
            yield
        finally:
            self._doing = before
            self._turn.release()

    def _or_broken(self, error: Exception | None) -> Exception | None:
        """What is wrong on this rank: what ended in the middle has left messages that the next would take."""
        if error is not None or not self.broken:
            return error
        return TransportError(f"{self.broken}, so messages may be on their way", fix=self.anew)

    @alone("a gather")
    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        """See `Transport.all_gather`.

        Raises:
            TransportError: as many sizes as ranks are needed, and this rank's must be its tensor's.
        """
        dim %= x.dim()
        if len(sizes) != self.world or sizes[self.rank] != x.shape[dim]:
            raise TransportError(
                "all_gather was given sizes that do not fit",
                fix="Give one size for each rank, and the tensor of this rank's size.",
                rank=self.rank,
                sizes=list(sizes),
                shape=tuple(x.shape),
                dim=dim,
            )
        mine = x.detach().resolve_conj().resolve_neg().contiguous()  # backends send what lies in memory
        shapes = [[*x.shape[:dim], size, *x.shape[dim + 1 :]] for size in sizes]
        parts = [mine if r == self.rank else mine.new_empty(shape) for r, shape in enumerate(shapes)]
        others = [r for r in range(self.world) if r != self.rank]
        sends, recvs = [Send(r, _bytes(mine)) for r in others], [Recv(r, _bytes(parts[r])) for r in others]
        self.exchange(sends, recvs, lane="control").wait()
        return torch.cat(parts, dim)

    def _to_post(
        self, sends: Sequence[Send], recvs: Sequence[Recv], lane: str
    ) -> tuple[list[Send], list[Recv]]:
        """The messages that have something in them, checked, and counted in the statistics."""
        if lane not in self.lanes:
            raise TransportError("unknown lane", fix=f"Use one of {', '.join(self.lanes)}.", lane=lane)
        for peer, tensor in (*sends, *recvs):
            if not 0 <= peer < self.world or peer == self.rank:
                raise TransportError(
                    "a message needs another rank of this group as its peer",
                    fix="Keep what stays on a rank out of the exchange.",
                    peer=peer,
                    rank=self.rank,
                    world=self.world,
                )
            if not tensor.is_contiguous():
                raise TransportError(
                    "a message's tensor is not contiguous",
                    fix="Send tensor.contiguous(); receive into an empty tensor and copy.",
                    lane=lane,
                    peer=peer,
                    shape=tuple(tensor.shape),
                    stride=tensor.stride(),
                )
        sends, recvs = [m for m in sends if m.tensor.numel()], [m for m in recvs if m.tensor.numel()]
        for message in sends:
            self.stats.count(lane, message.tensor.nbytes)
        return sends, recvs


def _bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor, uint8 (bytes,): NCCL knows no 16-bit integers, nor some unsigned ones."""
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)  # where a size is 1, strides may be any
