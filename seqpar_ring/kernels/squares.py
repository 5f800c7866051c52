"""Squares: a kernel that knows full and square causal blocks, given calls of any kind without a window.

Some libraries align a causal diagonal top left, some refuse one with more queries than keys, some change their mind
with a release. All agree on full blocks and on causal squares. So the segments of a call are cut into those
(`geometry.split`), the parts of a kind make one call on gathered rows (or one each, where a kernel takes no varlen
calls), and what comes back is merged where it belongs. Calls that are of one kind already go through untouched: most
of contiguous and zigzag layouts are. It copies rows, so it is done only for kernels that say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from seqpar_ring.geometry import INF, Part, split
from seqpar_ring.kernels.base import Capabilities, Kept, Kernel, Scores, admit, wide
from seqpar_ring.kernels.merge import merge_
from seqpar_ring.schedule import Call


class Gathered(NamedTuple):
    """Parts of one kind as one call: on which query and key rows of the call they come from."""

    q: tuple[tuple[int, int], ...]
    k: tuple[tuple[int, int], ...]
    call: Call

    def whole(self, call: Call) -> bool:
        """Whether these are all rows of that call, in order."""
        return self.q == ((0, call.cu_q[-1]),) and self.k == ((0, call.cu_k[-1]),)


@lru_cache(maxsize=1024)  # of some plans; pure
def cut(call: Call, varlen: bool) -> tuple[Gathered, ...]:
    """A call without a window as calls of full blocks and of causal squares."""
    parts: list[Part] = []
    for q0, q1, k0, k1 in zip(call.cu_q, call.cu_q[1:], call.cu_k, call.cu_k[1:], strict=False):
        found = split(q1 - q0, k1 - k0, call.left, call.right)
        parts += [p._replace(q0=p.q0 + q0, q1=p.q1 + q0, k0=p.k0 + k0, k1=p.k1 + k0) for p in found]
    return tuple(
        _gathered(some, right)
        for right in (0, INF)
        for some in _groups([p for p in parts if (p.kind == "causal") == (right == 0)], varlen)
    )


def _groups(parts: list[Part], varlen: bool) -> Iterator[list[Part]]:
    """Parts that make one call: no query row twice, or its results would overwrite each other."""
    while parts:
        taken: list[Part] = []
        rest: list[Part] = []
        end = -1
        for p in parts:
            if p.q0 >= end and (varlen or not taken):
                taken.append(p)
                end = p.q1
            else:
                rest.append(p)
        yield taken
        parts = rest


def _gathered(parts: list[Part], right: int) -> Gathered:
    cu_q, cu_k = [0], [0]
    for p in parts:
        cu_q.append(cu_q[-1] + p.q1 - p.q0)
        cu_k.append(cu_k[-1] + p.k1 - p.k0)
    return Gathered(
        _joined((p.q0, p.q1) for p in parts),
        _joined((p.k0, p.k1) for p in parts),
        Call(0, 0, INF, right, tuple(cu_q), tuple(cu_k)),
    )


def _joined(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges that follow one another as one."""
    found: list[tuple[int, int]] = []
    for a, b in ranges:
        if found and found[-1][1] == a:
            found[-1] = (found[-1][0], b)
        else:
            found.append((a, b))
    return tuple(found)


class Squares:
    """The kernel it is made of, for calls of any kind without a window. See the module."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.name = kernel.name

    @property
    def capabilities(self) -> Capabilities:
        """Those of the kernel."""
        return self._kernel.capabilities

    def forward(
        self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, call: Call, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        admit(self, (q_BSHD, k_BSGD, v_BSGE), call, scores)  # with its window, which the parts have not
        found = self._cut(call, q_BSHD)
        if len(found) == 1 and found[0].whole(call):
            return self._kernel.forward(q_BSHD, k_BSGD, v_BSGE, found[0].call, scores)
        B, S, H, _ = q_BSHD.shape
        out_BSHE = q_BSHD.new_zeros((B, S, H, v_BSGE.shape[3]), dtype=wide(q_BSHD.dtype))
        lse_BHS = q_BSHD.new_full((B, H, S), -torch.inf, dtype=wide(q_BSHD.dtype))
        for part in found:
            k, v = _picked(k_BSGD, part.k), _picked(v_BSGE, part.k)
            out, lse = self._kernel.forward(_picked(q_BSHD, part.q), k, v, part.call, scores)
            at = 0
            for a, b in part.q:
                rows = slice(at, at + b - a)
                merge_(out_BSHE[:, a:b], lse_BHS[:, :, a:b], out[:, rows], lse[:, :, rows])
                at += b - a
        return out_BSHE, lse_BHS

    def backward(self, dout_BSHE: Tensor, kept: Kept, call: Call, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        admit(self, kept[:3], call, scores)
        found = self._cut(call, kept.q)
        if len(found) == 1 and found[0].whole(call):
            return self._kernel.backward(dout_BSHE, kept, found[0].call, scores)
        dtype = wide(kept.q.dtype)
        dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in kept[:3])
        for part in found:
            rows = Kept(
                _picked(kept.q, part.q),
                _picked(kept.k, part.k),
                _picked(kept.v, part.k),
                None if kept.out is None else _picked(kept.out, part.q),
                _picked(kept.lse, part.q, 2),
                None if kept.delta is None else _picked(kept.delta, part.q, 2),
            )
            part_dq, part_dk, part_dv = self._kernel.backward(_picked(dout_BSHE, part.q), rows, part.call, scores)
            _add(dq, part.q, part_dq)
            _add(dk, part.k, part_dk)
            _add(dv, part.k, part_dv)
        return dq, dk, dv

    def _cut(self, call: Call, q_BSHD: Tensor) -> tuple[Gathered, ...]:
        return cut(call._replace(q0=0, k0=0), self.capabilities.varlen) if q_BSHD.numel() else ()


def _picked(x: Tensor, ranges: tuple[tuple[int, int], ...], dim: int = 1) -> Tensor:
    """Rows of some ranges; a view where they are one."""
    parts = [x.narrow(dim, a, b - a) for a, b in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _add(total: Tensor, ranges: tuple[tuple[int, int], ...], part: Tensor) -> None:
    at = 0
    for a, b in ranges:
        total[:, a:b].add_(part[:, at : at + b - a])
        at += b - a
