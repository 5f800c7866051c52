"""Regrouped: a kernel that cannot take every call, given others that amount to the same.

A call becomes some calls on rows of its own, which are gathered (views where they are one range) and computed one after
the other; what comes back is merged where it belongs, and gradients are added there. How calls are cut is a kernel's
lack: `gapless` leaves out segments that are empty on one side, `squares` cuts into full and square causal blocks. A
call that needs nothing goes through untouched. It copies rows, so it is done only for kernels that say so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from seqpar_ring.kernels.base import Capabilities, Kept, Kernel, Scores, admit, wide
from seqpar_ring.kernels.merge import merge_
from seqpar_ring.schedule import Call

Ranges = tuple[tuple[int, int], ...]
"""Rows `a:b` of a call's slices, one range after the other."""


class Part(NamedTuple):
    """A call on some query rows and some key rows of another; no query row is in it twice."""

    q: Ranges
    k: Ranges
    call: Call

    def whole(self, call: Call) -> bool:
        """Whether these are all rows of that call, in order."""
        return self.q == ((0, call.cu_q[-1]),) and self.k == ((0, call.cu_k[-1]),)


def part(segments: Iterable[tuple[int, int, int, int]], left: int, right: int) -> Part:
    """The call of these segments, (first query, end, first key, end) each, on their rows alone."""
    some, cu_q, cu_k = list(segments), [0], [0]
    for a, b, c, d in some:
        cu_q.append(cu_q[-1] + b - a)
        cu_k.append(cu_k[-1] + d - c)
    q, k = _joined((a, b) for a, b, _, _ in some), _joined((c, d) for _, _, c, d in some)
    return Part(q, k, Call(0, 0, left, right, tuple(cu_q), tuple(cu_k)))


class Regrouped:
    """The kernel it is made of, for calls of more kinds. A subclass says how they are `cut`."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.name = kernel.name

    @property
    def capabilities(self) -> Capabilities:
        """Those of the kernel."""
        return self._kernel.capabilities

    def cut(self, call: Call) -> tuple[Part, ...]:
        """The calls that a call amounts to; none where nothing is seen."""
        raise NotImplementedError

    def forward(
        self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, call: Call, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        admit(self, (q_BSHD, k_BSGD, v_BSGE), call, scores)  # with its window, which the parts may not have
        found = self.cut(call)
        if len(found) == 1 and found[0].whole(call):
            return self._kernel.forward(q_BSHD, k_BSGD, v_BSGE, found[0].call, scores)
        B, S, H, _ = q_BSHD.shape
        out_BSHE = q_BSHD.new_zeros((B, S, H, v_BSGE.shape[3]), dtype=wide(q_BSHD.dtype))
        lse_BHS = q_BSHD.new_full((B, H, S), -torch.inf, dtype=wide(q_BSHD.dtype))
        for one in found:
            k, v = _picked(k_BSGD, one.k), _picked(v_BSGE, one.k)
            out, lse = self._kernel.forward(_picked(q_BSHD, one.q), k, v, one.call, _placed(scores, one))
            at = 0
            for a, b in one.q:
                rows = slice(at, at + b - a)
                merge_(out_BSHE[:, a:b], lse_BHS[:, :, a:b], out[:, rows], lse[:, :, rows])
                at += b - a
        return out_BSHE, lse_BHS

    def backward(self, dout_BSHE: Tensor, kept: Kept, call: Call, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        admit(self, kept[:3], call, scores)
        found = self.cut(call)
        if len(found) == 1 and found[0].whole(call):
            return self._kernel.backward(dout_BSHE, kept, found[0].call, scores)
        dtype = wide(kept.q.dtype)
        dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in kept[:3])
        for one in found:
            rows = Kept(
                _picked(kept.q, one.q),
                _picked(kept.k, one.k),
                _picked(kept.v, one.k),
                None if kept.out is None else _picked(kept.out, one.q),
                _picked(kept.lse, one.q, 2),
                None if kept.delta is None else _picked(kept.delta, one.q, 2),
            )
            dout = _picked(dout_BSHE, one.q)
            gradients = self._kernel.backward(dout, rows, one.call, _placed(scores, one))
            for total, ranges, gradient in zip((dq, dk, dv), (one.q, one.k, one.k), gradients, strict=True):
                _add(total, ranges, gradient)
        return dq, dk, dv


def _placed(scores: Scores, one: Part) -> Scores:
    """The scores for a part: with the positions of its rows, where there are any."""
    scores = scores._replace(resting=None)  # rows that are gathered lie in memory of this call
    if scores.q_positions is None or scores.k_positions is None:
        return scores
    q, k = _picked(scores.q_positions, one.q, 0), _picked(scores.k_positions, one.k, 0)
    return scores._replace(q_positions=q, k_positions=k)


def _joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Ranges that follow one another as one."""
    found: list[tuple[int, int]] = []
    for a, b in ranges:
        if found and found[-1][1] == a:
            found[-1] = (found[-1][0], b)
        else:
            found.append((a, b))
    return tuple(found)


def _picked(x: Tensor, ranges: Ranges, dim: int = 1) -> Tensor:
    """Rows of some ranges; a view where they are one."""
    parts = [x.narrow(dim, a, b - a) for a, b in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _add(total: Tensor, ranges: Ranges, gradient: Tensor) -> None:
    at = 0
    for a, b in ranges:
        total[:, a:b].add_(gradient[:, at : at + b - a])
        at += b - a
