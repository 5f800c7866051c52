"""flash-attention 4 (package flash-attn-4, CuTe DSL), varlen: Hopper and Blackwell, compiled when first called.

Windows are aligned bottom right, and an unbounded side is None. Log-sum-exp (H, T), -inf for an empty row. Its forward
returned two values once, then four, then five: the first two have always been out and lse. The first call with
given widths and window compiles for some ten seconds; FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 keeps that on disk.
Without a GPU `make test-kernels` compiles it through this file, for Hopper and for Blackwell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from seqpar_ring.kernels.base import Capabilities, Scores
from seqpar_ring.kernels.library import Library
from seqpar_ring.kernels.varlen import HALVES, UNBOUNDED, Packed, Results, Rows, VarlenKernel, room

MODULE = "flash_attn.cute.interface"
FORWARD, BACKWARD = "_flash_attn_fwd", "_flash_attn_bwd"
LIBRARY = Library("flash-attn-4", MODULE, (FORWARD, BACKWARD))

LATENT = (192, 128)
"""Widths of keys and values in multi-head latent attention (DeepSeek), which it computes without padding; on Hopper
its backward wants as many key heads as query heads for them, as latent attention has."""

NO_SOFTCAP = range(24)
"""Betas of 4.0.0 whose backward of packed rows takes no softcap: "varlen + score_mod not supported in bwd yet"."""


class Flash4Kernel(VarlenKernel):
    """flash-attention 4. See the module."""

    name = "flash4"
    can = Capabilities(
        dtypes=HALVES,
        max_head_dim=128,
        more_widths=(LATENT,),
        softcap=True,
        unequal_value_dim=True,
        architectures=(9, 10, 11),
        priority=390,
        notes="flash-attention 4; compiled when first called",
    )

    def __init__(self, library: Library = LIBRARY, devices: tuple[str, ...] = ("cuda",)) -> None:
        super().__init__(library, devices)

    @cached_property
    def capabilities(self) -> Capabilities:
        """See `VarlenKernel.capabilities`."""
        beta = re.fullmatch(r"4\.0\.0b(\d+).*", self._library.version)
        return replace(super().capabilities, softcap=not (beta and int(beta[1]) in NO_SOFTCAP))

    def widths(self, head: int, value: int) -> tuple[int, int]:
        """See `VarlenKernel.widths`; those of latent attention as they are."""
        return LATENT if (head, value) == LATENT else super().widths(head, value)

    def attend(self, rows: Rows, packed: Packed, scores: Scores) -> tuple[Tensor, Tensor]:
        """See `VarlenKernel.attend`."""
        out, lse, *_ = self._library.function(FORWARD)(
            rows.q,
            rows.k,
            rows.v,
            cu_seqlens_q=packed.cu_q,
            cu_seqlens_k=packed.cu_k,
            max_seqlen_q=packed.max_q,
            max_seqlen_k=packed.max_k,
            softmax_scale=scores.scale,
            causal=packed.causal,
            softcap=scores.softcap,
            window_size_left=_side(packed, packed.left),
            window_size_right=_side(packed, packed.right),
            return_lse=True,
        )
        return out, lse

    def differentiate(self, rows: Rows, results: Results, packed: Packed, scores: Scores) -> Iterable[Tensor]:
        """See `VarlenKernel.differentiate`."""
        dq, dk, dv = room(rows)
        found = self._library.function(BACKWARD)(
            rows.q,
            rows.k,
            rows.v,
            results.out,
            results.dout,
            results.lse,
            softmax_scale=scores.scale,
            causal=packed.causal,
            softcap=scores.softcap or 0.0,
            window_size_left=_side(packed, packed.left),
            window_size_right=_side(packed, packed.right),
            cu_seqlens_q=packed.cu_q,
            cu_seqlens_k=packed.cu_k,
            max_seqlen_q=packed.max_q,
            max_seqlen_k=packed.max_k,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            dq=dq,
            dk=dk,
            dv=dv,
        )
        return islice(found, 3)


def _side(packed: Packed, side: int) -> int | None:
    """A side of the window; None where it cuts nothing, and where `causal` says it all."""
    return None if side == UNBOUNDED or packed.causal else side
