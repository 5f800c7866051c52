"""Activation checkpointing that never runs the ring twice.

Attention is one operator that returns (out, lse). A `Kept` keeps both when a checkpointed layer first runs and hands
them back when it is recomputed, so that this costs the projections and sends no keys and no gradients again. It is no
checkpointing of its own: it works under any that runs a function again, torch's (reentrant or not), transformers',
DeepSpeed's. torch's selective checkpointing would do the same in one of these, but refuses a recompute whose other
operators differ from the forward's, and under ZeRO-3 they may: which parameters are gathered and freed inside a layer
depends on what is still there. What it costs: one hidden state and one fp32 number per head and token, for each layer,
in device memory or (`offload`) in the host's. A checkpointed layer that changes attention's output in place is refused.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, wraps
from typing import Any, Literal, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqpar_ring.errors import UnsupportedError
from seqpar_ring.operator import OPERATOR

Result = tuple[Tensor, ...]
"""What attention returned: out and lse."""

P = ParamSpec("P")
R = TypeVar("R")

KEYS_WORTH_KEEPING = 512
"""With fewer keys for each query than this, on average, "auto" runs attention again: see `choose`."""


class Choice(NamedTuple):
    """What becomes of attention's results in a checkpointed layer, and why."""

    value: Literal["attention", "none"]
    reason: str


def choose(asked: Literal["auto", "attention", "none"], keys_per_query: float) -> Choice:
    """Whether to keep attention's results.

    What is saved grows with the keys that a query sees, what is spent is one hidden state a layer, whatever the length.

    Args:
        asked: the setting `remat`.
        keys_per_query: keys that a query sees, on average: area of the mask / tokens.
    """
    if asked != "auto":
        return Choice(asked, "asked for")
    seen = f"{keys_per_query:.0f} keys a query on average, and {KEYS_WORTH_KEEPING} are worth keeping"
    return Choice("attention" if keys_per_query >= KEYS_WORTH_KEEPING else "none", seen)


class Versions:
    """Of a result's tensors: whether one is changed in place after this was made. Holds no memory of theirs."""

    def __init__(self, result: Result) -> None:
        self._counting = tuple(_alias(x) for x in result)
        for x in self._counting:
            x.data = x.new_empty(0)  # which leaves the counter shared
        self._before = [x._version for x in self._counting]

    def expect_unchanged(self) -> None:
        """Before the result is handed back.

        Raises:
            UnsupportedError: it was changed, so that the recompute would go on with a wrong one.
        """
        if [x._version for x in self._counting] != self._before:
            raise UnsupportedError(
                "attention's result was changed in place, and its checkpoint keeps what it was",
                fix="Write `out = out * x` and not `out.mul_(x)`, or do not keep attention.",
            )


class Shelf(Protocol):
    """Where results lie between forward and backward."""

    def put(self, key: Hashable, result: Result) -> None:
        """Store a result."""

    def take(self, key: Hashable) -> Result | None:
        """Give a result back, once; None if there is none."""

    def drop(self, key: Hashable) -> None:
        """Forget a result."""


class InPlace:
    """Results stay where they are."""

    def __init__(self) -> None:
        self._results: dict[Hashable, tuple[Result, Versions]] = {}

    def put(self, key: Hashable, result: Result) -> None:
        """Store a result."""
        self._results[key] = tuple(_alias(x) for x in result), Versions(result)

    def drop(self, key: Hashable) -> None:
        """Forget a result."""
        self._results.pop(key, None)

    def take(self, key: Hashable) -> Result | None:
        """Give a result back, once, so that its memory is free after it.

        Raises:
            UnsupportedError: it was changed in place meanwhile.
        """
        kept, versions = self._results.pop(key, (None, None))
        if versions is not None:
            versions.expect_unchanged()
        return kept


def _alias(x: Tensor) -> Tensor:
    """The same tensor outside of the graph, which counts the same changes in place.

    Inside of a dispatch mode `detach` gives one that counts its own: torch leaves out what makes views of it, and has
    no public way to put that back. Where the private one is missing, changes are not seen.
    """
    if not hasattr(torch._C, "_dispatch_tls_set_dispatch_key_excluded"):
        return x.detach()
    key = torch._C.DispatchKey.ADInplaceOrView
    before = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        return x.detach()
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, before)


def _in_backward() -> bool:
    """Whether a backward pass is under way in this thread; True where torch does not say."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is None or task() != -1


class InHostMemory:
    """Results go to the host's memory and come back, on a stream of their own beside the computation.

    Backward wants them in the opposite order of forward: when one is taken, the one before it starts on its way. On a
    device without streams (the CPU) the copies are plain ones.
    """

    def __init__(self) -> None:
        self._away: dict[Hashable, tuple[torch.device, Result]] = {}
        self._coming: dict[Hashable, Result] = {}
        self._versions: dict[Hashable, Versions] = {}

    def put(self, key: Hashable, result: Result) -> None:
        """Start copying a result to pinned memory."""
        device = result[0].device
        self._versions[key] = Versions(result)
        with self._beside(device, result):
            self._away[key] = device, tuple(_to_host(x.detach()) for x in result)

    def drop(self, key: Hashable) -> None:
        """Forget a result."""
        self._away.pop(key, None)
        self._versions.pop(key, None)

    def take(self, key: Hashable) -> Result | None:
        """Wait for a result to be back on its device, and start fetching the one that was put before it.

        Raises:
            UnsupportedError: it was changed in place meanwhile, perhaps while it was copied.
        """
        if key in self._versions:
            self._versions.pop(key).expect_unchanged()
        self._fetch(key)
        found = self._coming.pop(key, None)
        if found is not None and found[0].is_cuda:
            now = torch.cuda.current_stream(found[0].device)
            now.wait_stream(_copying(found[0].device))  # before the next one's copy is in that stream
            for x in found:
                x.record_stream(now)
        if found is not None and self._away:
            self._fetch(next(reversed(self._away)))
        return found

    def _fetch(self, key: Hashable) -> None:
        if key in self._away:
            device, host = self._away.pop(key)
            with self._beside(device, ()):
                self._coming[key] = tuple(x.to(device, non_blocking=True, copy=True) for x in host)

    @contextmanager
    def _beside(self, device: torch.device, used: Result) -> Iterator[None]:
        """On the copying stream of a device, after what its computing stream has been asked to do so far."""
        if device.type != "cuda":
            yield
            return
        stream = _copying(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        for x in used:
            x.record_stream(stream)
        with torch.cuda.stream(stream):
            yield


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """One stream a device: memory that was handed out on a stream is used again on that stream alone."""
    return torch.cuda.Stream(device)


def _to_host(x: Tensor) -> Tensor:
    host = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
    return host.copy_(x, non_blocking=True)


class Kept:
    """Attention's results of one run of a model, or of a part of it, for the recompute in its backward.

    While it is open, calls of attention are kept under the names that their callers give; once closed, a call of a
    kept name gets the result back, once. A call of a name that is not kept (any more) runs: a second backward pass over
    the same graph is right, and pays for the ring again.
    """

    def __init__(self, offload: bool = False) -> None:
        self._shelf: Shelf = InHostMemory() if offload else InPlace()
        self._closed = False
        self._names: Counter[Hashable] = Counter()
        self.bytes = 0
        """Of all results that were kept."""

    def close(self) -> None:
        """The run is over; what comes now is its recompute."""
        self._closed = True

    def around(self, name: Hashable) -> AbstractContextManager[object]:
        """A context for one call of attention (`ring_attention`), which keeps its result or reuses it."""
        if self._closed and not _in_backward():
            raise UnsupportedError(
                "a function that keeps attention was called in forward for the second time",
                fix="Wrap it anew for each call: checkpoint(keeping(layer), x).",
            )
        if self._closed:
            result = self._shelf.take(name)
            return nullcontext() if result is None else _AtAttention(lambda run: result)
        return _AtAttention(lambda run: self._keep(name, run()))

    def _keep(self, name: Hashable, result: Result) -> Result:
        """One name may be that of several calls, as where layers share a module: which of them is recomputed cannot be
        told then, and they run again. What was made in inference mode is not differentiated, so nothing is kept."""
        if any(x.is_inference() for x in result):
            return result
        self._names[name] += 1
        if self._names[name] == 1:
            self.bytes += sum(x.nbytes for x in result)
            self._shelf.put(name, result)
        elif self._names[name] == 2:
            self.bytes -= sum(x.nbytes for x in result)
            self._shelf.drop(name)
        return result


def keeping(function: Callable[P, R], offload: bool = False) -> Callable[P, R]:
    """The function that a checkpoint is given, with attention kept: `checkpoint(keeping(layer), x)`.

    For `torch.utils.checkpoint.checkpoint`, reentrant or not, `deepspeed.checkpointing.checkpoint`, and whatever else
    runs a function once in forward and again in backward. Wrap it anew for each call.

    Args:
        function: calls `ring_attention` any number of times, in the same order each time.
        offload: keep the results in the host's memory instead of the device's.
    """
    kept = Kept(offload)

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with _InOrder(kept):
            out = function(*args, **kwargs)
        kept.close()
        return out

    return run


def context_fn() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The `context_fn` for `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`, where only that can be given.

    Parallelized transformers models need none: they keep attention's results by themselves.
    """
    kept = Kept()
    return _InOrder(kept), _InOrder(kept, closing=True)


class _AtAttention(TorchDispatchMode):
    """Hands each call of attention to a function, which may run it; every other operator runs as ever."""

    def __init__(self, then: Callable[[Callable[[], Result]], Result]) -> None:
        super().__init__()
        self._then = then

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        def run() -> Any:
            return func(*args, **(kwargs or {}))

        return self._then(run) if func is OPERATOR else run()


class _InOrder(TorchDispatchMode):
    """Around a function whose calls of attention come in the same order each time: their names are 0, 1, 2, ..

    Each time it is entered the count begins anew; with `closing`, what comes then is the recompute.
    """

    def __init__(self, kept: Kept, closing: bool = False) -> None:
        super().__init__()
        self._kept, self._closing = kept, closing
        self._count = itertools.count()

    def __enter__(self) -> _InOrder:
        self._count = itertools.count()
        if self._closing:
            self._kept.close()
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is not OPERATOR:
            return func(*args, **(kwargs or {}))
        with self._kept.around(next(self._count)):
            return func(*args, **(kwargs or {}))
