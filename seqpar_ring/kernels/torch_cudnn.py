"""cuDNN's flash attention by torch's own operator: dense, so for plans of one document.

A private op of aten, so it is named in this file only. Its causal is aligned top left, so it is taken for full blocks
and square causal ones, as everything else is cut into those (`squares`). Log-sum-exp (B, H, S, 1), before torch 2.9
without the last dimension; its backward wants it as its forward gave it. It reads 16-bit numbers by head and lets query
heads share a key head. q, k and v may have any strides; out and dout not, as there are releases that keep a graph of
backward for the strides of the former only, and read the latter by those of an earlier call. Blocks of one row some
releases refuse, others answer with nan in backward: those go to the reference.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from seqpar_ring.errors import PlanError
from seqpar_ring.kernels.base import Capabilities, Kept, Scores, admit, wide
from seqpar_ring.kernels.delta import stand_in
from seqpar_ring.kernels.library import Aten, Library
from seqpar_ring.kernels.reference import ReferenceKernel
from seqpar_ring.kernels.varlen import ALIGNED, HALVES, readable
from seqpar_ring.schedule import Call

FORWARD, BACKWARD = "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"
LIBRARY = Aten(FORWARD, BACKWARD)

CAN = Capabilities(
    dtypes=HALVES,
    max_head_dim=128,
    max_deterministic_dim=0,
    unequal_value_dim=True,
    window=False,
    square=True,
    varlen=False,
    empty_segments=False,
    architectures=(8, 9, 10, 12),
    priority=250,
    notes="torch's cuDNN attention, full and square causal blocks of one document",
)


class TorchCudnnKernel:
    """aten's cuDNN attention. See the module."""

    name = "torch_cudnn"
    can = CAN

    def __init__(self, library: Library = LIBRARY, devices: tuple[str, ...] = ("cuda",)) -> None:
        self._library, self._devices = library, devices
        self._rows_elsewhere = ReferenceKernel()
        self._lse_dims = 4  # of what forward gave last

    @cached_property
    def capabilities(self) -> Capabilities:
        """What it can do on this machine."""
        return replace(CAN, devices=self._devices, absent=self._library.absent)

    def forward(
        self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, call: Call, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        admit(self, (q_BSHD, k_BSGD, v_BSGE), call, scores)
        if _of_one_row(call):
            return self._rows_elsewhere.forward(q_BSHD, k_BSGD, v_BSGE, call, scores)
        causal, E = _causal(call), v_BSGE.shape[3]
        qkv = _by_head((q_BSHD, k_BSGD, v_BSGE))
        out, lse, *_ = self._library.function(FORWARD)(*qkv, None, True, 0.0, causal, False, scale=scores.scale)
        self._lse_dims = lse.dim()
        return out.transpose(1, 2)[..., :E], lse.reshape(lse.shape[:3])

    def backward(self, dout_BSHE: Tensor, kept: Kept, call: Call, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`. Gradients come in the inputs' dtype."""
        admit(self, kept[:3], call, scores)
        if _of_one_row(call):
            return self._rows_elsewhere.backward(dout_BSHE, kept, call, scores)
        causal, dtype, D, E = _causal(call), kept.q.dtype, kept.q.shape[3], kept.v.shape[3]
        q, k, v = _by_head(kept[:3])
        out = stand_in(dout_BSHE.to(wide(dtype)), kept.delta) if kept.out is None else kept.out
        dout, out = (readable(x.to(dtype), v.shape[3]).contiguous().transpose(1, 2) for x in (dout_BSHE, out))
        lse = kept.lse.to(wide(dtype)).contiguous().masked_fill(kept.lse == -torch.inf, torch.inf)
        lse = lse.unsqueeze(-1) if self._lse_dims == 4 else lse
        seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of a dropout that there is none of
        rest = None, None, None, q.shape[2], k.shape[2], 0.0, causal  # no bias, no lengths
        found = self._library.function(BACKWARD)(dout, q, k, v, out, lse, seed, seed, *rest, scale=scores.scale)
        dq, dk, dv = (x.transpose(1, 2) for x in found)
        return dq[..., :D], dk[..., :D], dv[..., :E]


def _by_head(qkv: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    width = -(-max(x.shape[3] for x in qkv) // ALIGNED) * ALIGNED
    return [readable(x, width).transpose(1, 2) for x in qkv]


def _of_one_row(call: Call) -> bool:
    return min(call.cu_q[-1], call.cu_k[-1]) == 1


def _causal(call: Call) -> bool:
    """Whether the one segment is a causal square; False if it is a full block.

    Raises:
        PlanError: it is neither, or there are several: `squares` cuts calls into such.
    """
    if len(call.cu_q) != 2:
        raise PlanError(
            "a dense kernel takes one segment", fix="Select it by name or auto.", segments=len(call.cu_q) - 1
        )
    return call.right == 0 and call.cu_q[1] > 1
