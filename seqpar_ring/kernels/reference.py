"""The reference kernel: block attention written out in plain torch, on any device and in any float dtype.

It is the fallback for what faster kernels lack (softcap, values of another width than the keys), and the oracle they
are tested against: it computes in fp32 (fp64 for fp64), with the formulas of FlashAttention-2 (arXiv 2307.08691) and
no autograd. Logits are made for a slab of query rows at a time, so memory stays bounded, but it is not fast and does
not try to be.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from seqpar_ring.kernels.base import Capabilities, Kept, Scores, admit, wide
from seqpar_ring.kernels.delta import delta_of
from seqpar_ring.schedule import Call

LOGITS = 1 << 24
"""Logits held at a time (64 MiB in fp32): long segments are worked on in slabs of rows."""


class _Slab(NamedTuple):
    """Query rows `q0:q1` against key rows `k0:k1`; allowed where `lo <= j - i <= hi` with i, j local."""

    q0: int
    q1: int
    k0: int
    k1: int
    lo: int
    hi: int

    def hidden_MN(self, device: torch.device) -> Tensor:
        """True where the row must not see the column."""
        i = torch.arange(self.q1 - self.q0, device=device).unsqueeze(1)
        j = torch.arange(self.k1 - self.k0, device=device)
        return (j - i < self.lo) | (j - i > self.hi)


class ReferenceKernel:
    """Plain torch. See the module."""

    name = "reference"
    capabilities = Capabilities(
        dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        softcap=True,
        alibi=True,
        unequal_value_dim=True,
        priority=-100,
        notes="plain torch, for exactness and not for speed",
    )

    def forward(
        self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, call: Call, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        admit(self, (q_BSHD, k_BSGD, v_BSGE), call, scores)
        batch, rows, heads, _ = q_BSHD.shape
        out_BSHE = q_BSHD.new_zeros((batch, rows, heads, v_BSGE.shape[3]), dtype=wide(q_BSHD.dtype))
        lse_BHS = q_BSHD.new_full((batch, heads, rows), -torch.inf, dtype=wide(q_BSHD.dtype))
        for s in _slabs(call, batch * heads):
            q = _grouped(q_BSHD[:, s.q0 : s.q1], k_BSGD.shape[2])
            k, v = _by_head(k_BSGD[:, s.k0 : s.k1]), _by_head(v_BSGE[:, s.k0 : s.k1])
            logits = _logits(q, k, scores, s)[0].masked_fill_(s.hidden_MN(q.device), -torch.inf)
            lse = torch.logsumexp(logits, -1)
            out_BSHE[:, s.q0 : s.q1] = _ungrouped(_weights(logits, lse) @ v)
            lse_BHS[:, :, s.q0 : s.q1] = lse.flatten(1, 2)
        return out_BSHE, lse_BHS

    def backward(self, dout_BSHE: Tensor, kept: Kept, call: Call, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`. Gradients come in fp32 (fp64 for fp64)."""
        admit(self, kept[:3], call, scores)
        groups, dtype = kept.k.shape[2], wide(kept.q.dtype)
        dq_BSHD, dk_BSGD, dv_BSGE = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in kept[:3])
        delta_BHS = kept.delta
        if delta_BHS is None:
            assert kept.out is not None  # one of the two is given
            delta_BHS = delta_of(dout_BSHE, kept.out, dtype)
        for s in _slabs(call, kept.q.shape[0] * kept.q.shape[2]):
            rows, columns = slice(s.q0, s.q1), slice(s.k0, s.k1)
            q, dout = _grouped(kept.q[:, rows], groups), _grouped(dout_BSHE[:, rows], groups)
            k, v = _by_head(kept.k[:, columns]), _by_head(kept.v[:, columns])
            lse, delta = (torch.unflatten(x[:, :, rows].to(dtype), 1, (groups, -1)) for x in (kept.lse, delta_BHS))
            logits, slope = _logits(q, k, scores, s)
            p = _weights(logits.masked_fill_(s.hidden_MN(q.device), -torch.inf), lse)
            ds = p * (dout @ v.mT - delta.unsqueeze(-1)) * slope
            dq_BSHD[:, rows] += _ungrouped(ds @ k)
            dk_BSGD[:, columns] += (ds.mT @ q).sum(2).transpose(1, 2)
            dv_BSGE[:, columns] += (p.mT @ dout).sum(2).transpose(1, 2)
        return dq_BSHD, dk_BSGD, dv_BSGE


def _slabs(call: Call, heads: int) -> Iterator[_Slab]:
    """The call cut into slabs of at most `LOGITS` logits, without the columns that no row of a slab may see."""
    for q0, q1, k0, k1 in zip(call.cu_q, call.cu_q[1:], call.cu_k, call.cu_k[1:], strict=False):
        m, n = q1 - q0, k1 - k0
        lo, hi = n - m - call.left, n - m + call.right
        step = max(1, LOGITS // max(1, n * heads))
        for a in range(0, m if n else 0, step):
            b = min(m, a + step)
            first, last = max(0, a + lo), min(n, b + hi)
            if first < last:
                yield _Slab(q0 + a, q0 + b, k0 + first, k0 + last, lo + a - first, hi + a - first)


def _grouped(x_BSHD: Tensor, groups: int) -> Tensor:
    """(B, G, H/G, S, D) in the precision of computation: the query heads beside the key head they share."""
    return torch.unflatten(x_BSHD.to(wide(x_BSHD.dtype)).transpose(1, 2), 1, (groups, -1))


def _ungrouped(x_BGRSD: Tensor) -> Tensor:
    return x_BGRSD.flatten(1, 2).transpose(1, 2)


def _by_head(x_BSGD: Tensor) -> Tensor:
    """(B, G, 1, S, D), to be broadcast over the query heads that share it."""
    return x_BSGD.to(wide(x_BSGD.dtype)).transpose(1, 2).unsqueeze(2)


def _logits(q: Tensor, k: Tensor, scores: Scores, s: _Slab) -> tuple[Tensor, Tensor | float]:
    """Logits, and their derivative by the bare product q . k: the scale, times 1 - tanh^2 under a softcap."""
    logits = (q @ k.mT) * scores.scale
    slope: Tensor | float = scores.scale
    if scores.softcap is not None:
        bent = torch.tanh(logits / scores.softcap)
        logits, slope = bent * scores.softcap, scores.scale * (1 - bent * bent)
    if scores.slopes is not None:
        assert scores.q_positions is not None  # the executor gives all three or none
        assert scores.k_positions is not None
        rows, columns = scores.q_positions[s.q0 : s.q1], scores.k_positions[s.k0 : s.k1]
        distance = (rows.unsqueeze(1) - columns).abs().to(logits.dtype)
        slopes = torch.unflatten(scores.slopes.to(logits.dtype), -1, (q.shape[1], -1))  # (G, H/G) or (B, G, H/G)
        logits = logits - slopes[..., None, None] * distance
    return logits, slope


def _weights(logits: Tensor, lse: Tensor) -> Tensor:
    """`exp(logits - lse)`; 0 everywhere in a row that sees nothing, whose lse is -inf."""
    return torch.exp(logits - lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1))
