"""flash-attention 2 (package flash-attn), varlen: the kernel that most GPUs of the field run.

Three traps of its interface, read in csrc/flash_attn/flash_api.cpp, are closed in `bounded`. A right side of the
window that is not below the longest key segment is dropped, though with more queries than keys it still cuts; a side
that is unbounded beside one that is not becomes as wide as the keys, which then cuts; and segments of one query each
take a path of their own, which goes wrong beside empty segments (flash-attention issue 1537). Its log-sum-exp of an
empty row is +inf.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from seqpar_ring.kernels.base import Capabilities, Scores
from seqpar_ring.kernels.library import Library
from seqpar_ring.kernels.varlen import HALVES, UNBOUNDED, Packed, Results, Rows, VarlenKernel, room

MODULE = "flash_attn.flash_attn_interface"
FORWARD, BACKWARD = "_flash_attn_varlen_forward", "_flash_attn_varlen_backward"
LIBRARY = Library("flash-attn", MODULE, (FORWARD, BACKWARD), oldest=(2, 7))


def bounded(packed: Packed) -> Packed:
    """What to tell flash-attention 2 about a call. Longer bounds than the segments' cost blocks that end at once."""
    max_q = max(packed.max_q, 2)  # not 1: see the module
    left, right = packed.left, packed.right
    if packed.causal or (left == UNBOUNDED and right == UNBOUNDED):
        return packed._replace(max_q=max_q)
    right = packed.max_q if right == UNBOUNDED else right  # so wide that it cuts nothing, and said
    return packed._replace(max_q=max_q, max_k=max(packed.max_k, right + 1), right=right)


class Flash2Kernel(VarlenKernel):
    """flash-attn 2.7 or newer. See the module."""

    name = "flash2"
    can = Capabilities(
        dtypes=HALVES,
        max_head_dim=256,
        softcap=True,
        unequal_value_dim=True,
        architectures=(8, 9, 10, 12),
        priority=200,
        notes="flash-attention 2; values of another width than keys are padded",
    )

    def __init__(self, library: Library = LIBRARY, devices: tuple[str, ...] = ("cuda",)) -> None:
        super().__init__(library, devices)

    def as_read(self, packed: Packed) -> Packed:
        """See `VarlenKernel.as_read`."""
        return bounded(packed)

    def attend(self, rows: Rows, packed: Packed, scores: Scores) -> tuple[Tensor, Tensor]:
        """See `VarlenKernel.attend`."""
        same = _arguments(packed, scores)
        out, lse, *_ = self._library.function(FORWARD)(**rows._asdict(), **same, return_softmax=False)
        return out, lse

    def differentiate(self, rows: Rows, results: Results, packed: Packed, scores: Scores) -> Iterable[Tensor]:
        """See `VarlenKernel.differentiate`."""
        dq, dk, dv = room(rows)
        self._library.function(BACKWARD)(
            dout=results.dout,
            out=results.out,
            softmax_lse=results.lse,
            dq=dq,
            dk=dk,
            dv=dv,
            **rows._asdict(),
            **_arguments(packed, scores),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv


def _arguments(packed: Packed, scores: Scores) -> dict[str, Any]:
    """What both functions take."""
    return {
        "cu_seqlens_q": packed.cu_q,
        "cu_seqlens_k": packed.cu_k,
        "max_seqlen_q": packed.max_q,
        "max_seqlen_k": packed.max_k,
        "dropout_p": 0.0,
        "softmax_scale": scores.scale,
        "causal": packed.causal,
        "window_size_left": packed.left,
        "window_size_right": packed.right,
        "softcap": scores.softcap or 0.0,
        "alibi_slopes": None,
    }
