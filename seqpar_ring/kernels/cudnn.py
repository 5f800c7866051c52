"""cuDNN's flash attention, varlen, by NVIDIA's own Python package (nvidia-cudnn-frontend).

Taken for full blocks and square causal ones only: those mean the same with its diagonal at the top left and at the
bottom right, and with them nothing depends on what a release of cuDNN makes of other bands. Everything else is cut
into those (`squares`). Its log-sum-exp of packed rows is (T, H, 1), and its backward wants it padded to (B, H, max_q,
1), for which its own helper stays on the device. A graph is built for each set of bounds of the lengths, so those are
rounded up; but also for each number of segments, and for backward of rows, to 64: packed batches that all differ build
many, and a trial, which times calls of one kind, does not show what that costs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from seqpar_ring.kernels.base import Capabilities, Scores
from seqpar_ring.kernels.library import Function, Library
from seqpar_ring.kernels.varlen import HALVES, Packed, Results, Rows, VarlenKernel

MODULE = "cudnn.sdpa.fwd.torch_op"
FORWARD, BACKWARD, PAD = "sdpa_fwd", "sdpa_bwd", "thd_lse_to_padded"
BOUND = 512
"""Longest segments are rounded up to multiples of it, so that batches of like lengths share a graph."""


class Cudnn(Library):
    """The operators that importing the package registers, and its helper."""

    def function(self, name: str) -> Function:
        """See `Library.function`."""
        helper = super().function(PAD)  # imports, and so registers
        found: Function = helper if name == PAD else getattr(torch.ops.cudnn, name)
        return found


LIBRARY: Library = Cudnn("nvidia-cudnn-frontend", MODULE, (PAD,), oldest=(1, 32))


class CudnnKernel(VarlenKernel):
    """cuDNN by nvidia-cudnn-frontend. See the module."""

    name = "cudnn"
    can = Capabilities(
        dtypes=HALVES,
        max_head_dim=128,
        unequal_value_dim=True,
        window=False,
        square=True,
        empty_segments=False,
        architectures=(8, 9, 10, 12),
        priority=300,
        notes="cuDNN, full and square causal blocks; others are cut into those",
    )

    def __init__(self, library: Library = LIBRARY, devices: tuple[str, ...] = ("cuda",)) -> None:
        super().__init__(library, devices)

    def attend(self, rows: Rows, packed: Packed, scores: Scores) -> tuple[Tensor, Tensor]:
        """See `VarlenKernel.attend`."""
        out, stats_TH1 = self._library.function(FORWARD)(*rows, scores.scale, **_segments(packed), return_lse=True)
        return out, stats_TH1.squeeze(-1).transpose(0, 1).contiguous()

    def differentiate(self, rows: Rows, results: Results, packed: Packed, scores: Scores) -> Iterable[Tensor]:
        """See `VarlenKernel.differentiate`."""
        segments = _segments(packed)
        padded = self._library.function(PAD)(
            results.lse.transpose(0, 1).contiguous(), packed.cu_q, segments["max_seqlen_q"]
        )
        found: Iterable[Tensor] = self._library.function(BACKWARD)(
            results.dout,
            *rows,
            results.out,
            padded,
            scores.scale,
            **segments,
            is_deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return found


def _segments(packed: Packed) -> dict[str, bool | int | Tensor]:
    return {
        "is_causal": packed.causal,
        "cu_seqlens_q": packed.cu_q,
        "cu_seqlens_kv": packed.cu_k,
        "max_seqlen_q": -(-packed.max_q // BOUND) * BOUND,
        "max_seqlen_kv": -(-packed.max_k // BOUND) * BOUND,
    }
