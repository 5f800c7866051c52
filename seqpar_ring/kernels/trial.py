"""A trial of kernels on the GPU at hand: whether each computes right there, and how fast.

A library that was built for another GPU, a release with a known fault, an operator that misreads empty segments: all
of them answer, and wrongly. So before a kernel is chosen on a GPU it computes a few small calls of every kind that it
says it can do, forward and backward, and is compared with the reference. Those that pass are timed on a causal block,
and the fastest is taken. It is done once for each kind of tensors and takes less than a second, compilation apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from functools import lru_cache
from itertools import cycle
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from seqpar_ring.errors import UnsupportedError
from seqpar_ring.geometry import INF
from seqpar_ring.kernels.base import Kept, Kernel, Request, Scores
from seqpar_ring.kernels.reference import ReferenceKernel
from seqpar_ring.schedule import Call

SOFTCAPS = 1.0, 2.0
"""So low that they bend the logits of a trial. Two in turn: a library that compiles for one must not use that for the
other."""

LOW = -120.0
"""A logit whose exponential is 0 in fp32, and that of its negative infinite: with all of a row's like it, a backward
that makes exp(0 - lse) for columns that are not there gives nan."""

BOUND = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4, torch.float64: 1e-10}
"""Relative error (L2 of a tensor) that no right answer comes near to; a wrong mask or merge is far above it."""

ROWS = 4096
"""Of the block that is timed."""


class Entry(NamedTuple):
    """What a trial found of a kernel.

    Attributes:
        wrong: what it lacks after all, in a few words; empty if it was right everywhere.
        gaps: what it got wrong of segments that are empty on one side, though it declares them; empty if nothing.
        rate: FLOP/s of forward and backward together; 0 if it was wrong.
    """

    wrong: str
    gaps: str
    rate: float


def tried(kernel: Kernel, request: Request) -> Entry:
    """Try a kernel on the request's device, once for each kind of tensors.

    Raises:
        OutOfMemoryError: there is no room for a trial; nothing is remembered of it.
        UnsupportedError: the kernel broke the device, so that no other can be tried.
    """
    return _tried(cast(Hashable, kernel), request)


@lru_cache(maxsize=256)
def _tried(kernel: Any, request: Request) -> Entry:
    with torch.autocast(request.device.partition(":")[0], enabled=False):  # the truth would be 16 bits wide
        fault = wrong(kernel, request, calls_for(request, kernel)) or fragile(kernel, request)
        gaps = "" if fault else wrong(kernel, request, gaps_for(kernel))
        try:
            return Entry(fault, gaps, 0.0 if fault else rate(kernel, request))
        except Exception as error:
            _stop_if_nothing_was_learned(error, kernel, request)
            return Entry(f"a working call of {ROWS} rows ({_said(error)})", "", 0.0)


def calls_for(request: Request, kernel: Kernel) -> dict[str, Call]:
    """Small calls of every kind that the kernel declares, by what they try."""
    can = kernel.capabilities
    found = {
        "a full block": Call(0, 0, INF, INF, (0, 130), (0, 77)),
        "a causal square": Call(0, 0, INF, 0, (0, 130), (0, 130)),
    }
    if not can.square:
        found["a diagonal with more keys"] = Call(0, 0, INF, 0, (0, 77), (0, 130))
        found["an edge with more queries"] = Call(0, 0, INF, 8, (0, 10), (0, 4))
    if can.varlen:
        found["many segments"] = Call(0, 0, INF, 0, (0, 1, 66, 130, 133), (0, 1, 66, 130, 133))
    if request.window and can.window:
        found["a window"] = Call(0, 0, 20, 0, (0, 130), (0, 130))
        found["a window open above, more queries"] = Call(0, 0, 3, INF, (0, 10), (0, 4))
    return found


def gaps_for(kernel: Kernel) -> dict[str, Call]:
    """Small calls with segments that are empty on one side, if the kernel declares that it takes them."""
    can = kernel.capabilities
    if not can.varlen or not can.empty_segments:
        return {}
    return {
        "empty segments": Call(0, 0, INF, INF, (0, 5, 5, 70, 73), (0, 0, 9, 90, 90)),
        "segments of one query, some empty": Call(0, 0, INF, INF, (0, 1, 2, 3), (0, 0, 9, 12)),
        "empty segments beside long causal ones": Call(0, 0, INF, 0, (0, 5, 5, 305, 308), (0, 0, 9, 309, 312)),
    }


def wrong(kernel: Kernel, request: Request, calls: Mapping[str, Call]) -> str:
    """What the kernel computes wrongly on the request's device, in a few words; empty if nothing."""
    softcaps = cycle(SOFTCAPS)
    for what, call in calls.items():
        scores = Scores(request.head_dim**-0.5, next(softcaps) if request.softcap else None)
        qkv, dout = _inputs(request, call.cu_q[-1], call.cu_k[-1])
        _leave_nan(*qkv, dout)
        try:
            mine = _answers(kernel, qkv, dout, call, scores)
            _synchronize(request.device)  # what fails on the device is said here, or later of something else
        except Exception as error:
            _stop_if_nothing_was_learned(error, kernel, request)
            return f"a working call of {what} ({_said(error)})"
        truth = _answers(ReferenceKernel(), qkv, dout, call, scores)
        for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), mine, truth, strict=True):
            off = _off(x, y)
            if not off <= BOUND[request.dtype]:  # nan too
                return f"right answers here ({name} of {what} is off by {off:.2g})"
    return ""


def fragile(kernel: Kernel, request: Request) -> str:
    """Where the kernel gives something infinite or nan for logits that are all very low, in a few words; "" if nowhere.

    Blocks of 192 and of 1 are those that cuDNN has been wrong with on Hopper: columns that fill half of its tile.
    """
    shapes = {"a full block": (192, 192, INF), "a causal square": (192, 192, 0), "one query": (1, 128, INF)}
    for what, (m, n, right) in shapes.items():
        call, (qkv, dout) = Call(0, 0, INF, right, (0, m), (0, n)), _inputs(request, m, n)
        scores = Scores(request.head_dim**-0.5)
        qkv[0][..., 0], qkv[1][..., 0] = 1.0, LOW / scores.scale
        try:
            found = _answers(kernel, qkv, dout, call, scores)
            _synchronize(request.device)
        except Exception as error:
            _stop_if_nothing_was_learned(error, kernel, request)
            return f"a working call of {what} of low logits ({_said(error)})"
        for name, x in zip(("out", "lse", "dq", "dk", "dv"), found, strict=True):
            if not bool(x.isfinite().all()):
                return f"finite answers here ({name} of {what} of low logits is not)"
    return ""


def rate(kernel: Kernel, request: Request, clock: Callable[[Callable[[], object], str], float] | None = None) -> float:
    """FLOP/s of forward and backward together on a causal block."""
    qkv, dout = _inputs(request, ROWS, ROWS)
    call, scores = Call(0, 0, INF, 0, (0, ROWS), (0, ROWS)), Scores(request.head_dim**-0.5)
    work = 3.5 * 2 * (request.head_dim + request.value_dim) * request.heads * ROWS * (ROWS + 1) / 2
    return work / (clock or seconds)(lambda: _answers(kernel, qkv, dout, call, scores), request.device)


def seconds(work: Callable[[], object], device: str, repeats: int = 3) -> float:
    """The least time of a few runs, by the device's own clock, after one that is not timed."""
    work()
    times = []
    for _ in range(repeats):
        _synchronize(device)
        begin = time.perf_counter()
        work()
        _synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times)


def _leave_nan(*like: Tensor) -> None:
    """Free memory of these sizes full of nan, which an allocator hands out next: what a kernel leaves unwritten would
    often be 0, and right by chance."""
    held = [torch.full_like(x, torch.nan) for x in like for _ in range(2)]
    del held


def _stop_if_nothing_was_learned(error: Exception, kernel: Kernel, request: Request) -> None:
    """That memory is full says nothing of a kernel. An access to memory that is not there ends all work on the device:
    every kernel after this one would be found wrong, and nothing could be computed with the one that is left."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    try:
        _touch(request.device)
    except torch.OutOfMemoryError:
        raise
    except Exception as broken:
        raise UnsupportedError(
            f'kernel "{kernel.name}" broke the device when it was tried, and nothing runs there until the process ends',
            fix='Start again with "kernel" set to another one, or remove the package that this one is of.',
            device=request.device,
            said=_said(error),
        ) from broken


def _touch(device: str) -> None:
    """Compute something; raises where the device can no more."""
    torch.ones(1, device=device).add_(1)
    _synchronize(device)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _inputs(request: Request, rows: int, columns: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    generator = torch.Generator("cpu").manual_seed(7)
    D, E, H, G = request.head_dim, request.value_dim, request.heads, request.kv_heads
    shapes = (rows, H, D), (columns, G, D), (columns, G, E), (rows, H, E)
    q, k, v, dout = (
        torch.randn(1, *shape, generator=generator, device="cpu").to(request.device, request.dtype) for shape in shapes
    )
    return (q, k, v), dout


def _answers(
    kernel: Kernel, qkv: tuple[Tensor, Tensor, Tensor], dout: Tensor, call: Call, scores: Scores
) -> tuple[Tensor, ...]:
    out, lse = kernel.forward(*qkv, call, scores)
    final = out.to(dout.dtype)
    return (final, lse, *kernel.backward(dout, Kept(*qkv, final, lse), call, scores))


def _off(x: Tensor, truth: Tensor) -> float:
    """Relative L2 of what is finite; nan if other places are infinite."""
    hidden = truth == -torch.inf
    if not torch.equal(x == -torch.inf, hidden):
        return float("nan")
    x, truth = (y.double().masked_fill(hidden, 0.0) for y in (x, truth))
    return float((x - truth).norm() / truth.norm().clamp(min=1.0))
