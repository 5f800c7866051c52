"""Gapless: a kernel that cannot take empty segments, given calls that have none.

Calls cover what lies between two tiles with segments without queries or without keys (`schedule.calls`). Some kernels
answer those wrongly or crash (flash-attention issues 1537, 2421, 2562). For such a kernel the rows that take part are
gathered, and what comes back is put where it belongs. That copies rows, so it is done only where a kernel says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqpar_ring.kernels.base import Capabilities, Kept, Kernel, Scores, wide
from seqpar_ring.schedule import Call


class Gapless:
    """The kernel it is made of, for calls of any kind. See the module."""

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
        rows, columns, packed = without_gaps(call)
        if packed is call:
            return self._kernel.forward(q_BSHD, k_BSGD, v_BSGE, call, scores)
        B, S, H, _ = q_BSHD.shape
        out_BSHE = q_BSHD.new_zeros((B, S, H, v_BSGE.shape[3]), dtype=wide(q_BSHD.dtype))
        lse_BHS = q_BSHD.new_full((B, H, S), -torch.inf, dtype=wide(q_BSHD.dtype))
        if rows.numel():
            rows, columns = rows.to(q_BSHD.device), columns.to(q_BSHD.device)
            gathered = q_BSHD[:, rows], k_BSGD[:, columns], v_BSGE[:, columns]
            out, lse = self._kernel.forward(*gathered, packed, _gathered(scores, rows, columns))
            out_BSHE[:, rows], lse_BHS[:, :, rows] = out.to(out_BSHE.dtype), lse
        return out_BSHE, lse_BHS

    def backward(self, dout_BSHE: Tensor, kept: Kept, call: Call, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        rows, columns, packed = without_gaps(call)
        if packed is call:
            return self._kernel.backward(dout_BSHE, kept, call, scores)
        dtype = wide(kept.q.dtype)
        dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in kept[:3])
        if rows.numel():
            rows, columns = rows.to(kept.q.device), columns.to(kept.q.device)
            part = Kept(
                kept.q[:, rows],
                kept.k[:, columns],
                kept.v[:, columns],
                None if kept.out is None else kept.out[:, rows],
                kept.lse[:, :, rows],
                None if kept.delta is None else kept.delta[:, :, rows],
            )
            found = self._kernel.backward(dout_BSHE[:, rows], part, packed, _gathered(scores, rows, columns))
            for whole, index, gradient in zip((dq, dk, dv), (rows, columns, columns), found, strict=True):
                whole[:, index] = gradient.to(dtype)
        return dq, dk, dv


def without_gaps(call: Call) -> tuple[Tensor, Tensor, Call]:
    """The query rows and the key rows of the segments that have both, and the call on those rows alone.

    A call without empty segments is returned as it is, with index tensors of all its rows.
    """
    segments = list(zip(call.cu_q, call.cu_q[1:], call.cu_k, call.cu_k[1:], strict=False))
    some = [s for s in segments if s[0] < s[1] and s[2] < s[3]]
    rows, columns = (_ranges([(s[i], s[i + 1]) for s in some]) for i in (0, 2))
    if len(some) == len(segments):
        return rows, columns, call
    cu_q, cu_k = [0], [0]
    for a, b, c, d in some:
        cu_q.append(cu_q[-1] + b - a)
        cu_k.append(cu_k[-1] + d - c)
    return rows, columns, call._replace(cu_q=tuple(cu_q), cu_k=tuple(cu_k))


def _ranges(bounds: list[tuple[int, int]]) -> Tensor:
    return torch.cat([torch.arange(a, b) for a, b in bounds]) if bounds else torch.zeros(0, dtype=torch.int64)


def _gathered(scores: Scores, rows: Tensor, columns: Tensor) -> Scores:
    if scores.q_positions is None or scores.k_positions is None:
        return scores
    return scores._replace(q_positions=scores.q_positions[rows], k_positions=scores.k_positions[columns])
