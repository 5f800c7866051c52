"""What a rank computes: its block kernel by size, products of matrices, and sums of partial results.

The kernel is the one that the library would choose, and is called as the executor calls it, on all ranks at once. On a
CPU each rank computes in one thread, as ranks that share cores must.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqpar_ring.geometry import INF
from seqpar_ring.groups import Groups
from seqpar_ring.kernels import Kept, Kernel, Request, Scores, select
from seqpar_ring.kernels.merge import merge_
from seqpar_ring.planner.hardware import BACKWARD, Attention
from seqpar_ring.probe import fit
from seqpar_ring.probe.timing import Effort, device_of, per_call, shared
from seqpar_ring.schedule import Call

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""The dtypes that can be measured, by the names that descriptions use."""

SIZES = (256, 512, 1024, 2048, 4096, 8192)
"""Rows of the blocks; each is taken as causal, as full, and as half as many queries or keys."""

SUMMED = 2048
"""Rows of the partial results that are merged and added."""

MATRIX = 1024
"""Rows and columns of the matrices; eight times as many on a GPU."""


class Shape(NamedTuple):
    """The heads that are measured: H query and G key heads of width D."""

    heads: int
    kv_heads: int
    head_dim: int


class Paced(NamedTuple):
    """Paces in one dtype, the timings behind them, and the kernel's name."""

    attention: Attention
    measured: dict[str, Any]


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for what is computed meanwhile, as ranks that share cores have it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def paces(groups: Groups, dtype: str, shape: Shape, effort: Effort) -> Paced:
    """How fast all ranks compute blocks of attention in a dtype. Collective over the ring."""
    device, kind = device_of(groups), DTYPES[dtype]
    widths = shape.head_dim, shape.head_dim
    kernel, reason = select(Request(device.type, kind, *widths, shape.heads, shape.kv_heads))
    began = time.perf_counter(), time.process_time()
    forward: list[fit.Block] = []
    backward: list[fit.Block] = []
    flop = 4.0 * shape.heads * shape.head_dim
    for size in SIZES:
        half = size // 2
        for q, k, causal in ((size, size, True), (size, size, False), (size, half, False), (half, size, False)):
            calls = _calls(kernel, _tensors(q, k, shape, kind, device), causal)
            pairs = q * (q + 1) // 2 if causal else q * k
            for found, call, passes in zip((forward, backward), calls, (1.0, BACKWARD), strict=True):
                found.append(fit.Block(q, k, pairs, flop * passes, per_call(groups, call, effort)))
        if 4 * max(block.seconds for block in backward) > effort.longest:
            break
    fits = fit.pace(forward), fit.pace(backward)
    busy = (time.process_time() - began[1]) / (time.perf_counter() - began[0])
    measured: dict[str, Any] = {"dtype": dtype, "kernel": kernel.name, "why": reason, "shape": list(shape)}
    measured["share of a core"] = min(row[0] for row in shared(groups, [busy]))
    for name, blocks, found_fit in zip(("forward", "backward"), (forward, backward), fits, strict=True):
        rows = [[b.rows, b.keys, b.pairs, b.seconds] for b in blocks]
        measured[name] = {"rows, keys, pairs, seconds": rows, "error": found_fit.errors._asdict()}
    return Paced(Attention(forward=fits[0].pace, backward=fits[1].pace), measured)


def block_work(groups: Groups, dtype: str, shape: Shape, rows: int) -> Callable[[], object]:
    """A forward pass over a full block, to be called."""
    device, kind = device_of(groups), DTYPES[dtype]
    kernel = select(Request(device.type, kind, shape.head_dim, shape.head_dim, shape.heads, shape.kv_heads)).kernel
    return _calls(kernel, _tensors(rows, rows, shape, kind, device), causal=False)[0]


def bandwidth(groups: Groups, shape: Shape, effort: Effort) -> dict[str, float]:
    """Bytes per second of merging partial results and of adding gradients, as the executor does, three for each number.

    Collective over the ring.
    """
    device = device_of(groups)
    out, part = (torch.randn((1, SUMMED, shape.heads, shape.head_dim), device=device) for _ in range(2))
    lse, part_lse = (torch.randn((1, shape.heads, SUMMED), device=device) for _ in range(2))
    merged = per_call(groups, lambda: merge_(out, lse, part, part_lse), effort)
    added = per_call(groups, lambda: part.add_(out, alpha=0.0), effort)
    nbytes = 3.0 * out.nbytes
    return {"merge": nbytes / merged, "add": nbytes / added, "both": 2 * nbytes / (merged + added)}


def matmul(groups: Groups, dtypes: tuple[str, ...], effort: Effort) -> dict[str, float]:
    """FLOP per second of products of large square matrices, by dtype. Collective over the ring."""
    device, found = device_of(groups), {}
    n = MATRIX if device.type == "cpu" else 8 * MATRIX
    for dtype in dtypes:
        a, b = (torch.randn((n, n), device=device).to(DTYPES[dtype]) for _ in range(2))
        found[dtype] = 2.0 * n**3 / per_call(groups, partial(torch.mm, a, b), effort)
    return found


def _tensors(q: int, k: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """(q, k, v, dout) of one block."""
    rows = ((q, shape.heads), (k, shape.kv_heads), (k, shape.kv_heads), (q, shape.heads))
    return tuple(torch.randn((1, n, h, shape.head_dim), device=device).to(dtype) for n, h in rows)


def _calls(
    kernel: Kernel, tensors: tuple[Tensor, ...], causal: bool
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The forward and the backward pass of one block, to be called."""
    q, k, v, dout = tensors
    call = Call(0, 0, INF, 0 if causal else INF, (0, q.shape[1]), (0, k.shape[1]))
    scores = Scores(q.shape[3] ** -0.5)
    with torch.no_grad():
        out, lse = kernel.forward(q, k, v, call, scores)
    kept = Kept(q, k, v, out.to(q.dtype), lse)
    return partial(kernel.forward, q, k, v, call, scores), partial(kernel.backward, dout, kept, call, scores)
