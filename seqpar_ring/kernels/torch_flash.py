"""torch's own varlen flash kernel on a GPU: flash-attention 2 inside of torch, which needs nothing installed.

A private op of aten, so it is named in this file only; called with what all releases from 2.6 on share. It is the same
code as the package's and has the same traps, closed by the same `bounded`. It has no softcap. Before 2.7 its
log-sum-exp of packed rows was padded: the trial passes it over there.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from seqpar_ring.kernels.base import Capabilities, Scores
from seqpar_ring.kernels.flash2 import bounded
from seqpar_ring.kernels.library import Aten, Library
from seqpar_ring.kernels.varlen import HALVES, UNBOUNDED, Packed, Results, Rows, VarlenKernel

FORWARD, BACKWARD = "_flash_attention_forward", "_flash_attention_backward"


LIBRARY = Aten(FORWARD, BACKWARD)


class TorchFlashKernel(VarlenKernel):
    """aten's varlen flash attention. See the module."""

    name = "torch_flash"
    can = Capabilities(
        dtypes=HALVES,
        max_head_dim=256,
        unequal_value_dim=True,
        architectures=(8, 9, 10, 12),
        priority=150,
        notes="torch's own flash-attention 2; values of another width than keys are padded",
    )

    def __init__(self, library: Library = LIBRARY, devices: tuple[str, ...] = ("cuda",)) -> None:
        super().__init__(library, devices)

    def as_read(self, packed: Packed) -> Packed:
        """See `VarlenKernel.as_read`."""
        return bounded(packed)

    def attend(self, rows: Rows, packed: Packed, scores: Scores) -> tuple[Tensor, Tensor]:
        """See `VarlenKernel.attend`."""
        out, lse, *_ = self._library.function(FORWARD)(
            *rows,
            packed.cu_q,
            packed.cu_k,
            packed.max_q,
            packed.max_k,
            0.0,
            packed.causal,
            False,
            scale=scores.scale,
            window_size_left=_side(packed.left),
            window_size_right=_side(packed.right),
        )
        return out, lse

    def differentiate(self, rows: Rows, results: Results, packed: Packed, scores: Scores) -> Iterable[Tensor]:
        """See `VarlenKernel.differentiate`."""
        found: Iterable[Tensor] = self._library.function(BACKWARD)(
            results.dout,
            *rows,
            results.out,
            results.lse,
            packed.cu_q,
            packed.cu_k,
            packed.max_q,
            packed.max_k,
            0.0,
            packed.causal,
            *_no_dropout(rows.q.device),
            scale=scores.scale,
            window_size_left=_side(packed.left),
            window_size_right=_side(packed.right),
        )
        return found


@lru_cache(maxsize=64)
def _no_dropout(device: torch.device) -> tuple[Tensor, Tensor]:
    """The seed and the offset of a dropout that there is none of."""
    return torch.zeros(2, dtype=torch.uint64, device=device), torch.empty(0, device=device)


def _side(side: int) -> int | None:
    return None if side == UNBOUNDED else side
