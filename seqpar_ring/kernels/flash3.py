"""flash-attention 3 (built from `hopper/` of its repository), varlen: the fastest kernel of its family on Hopper.

Its windows are aligned bottom right and mean what they say: sides that cut nothing are dropped by the right rule (read
in hopper/flash_api.cpp), so lengths go as they are. Log-sum-exp (H, T), -inf for an empty row. It sums no dropout and
knows no position biases. Its package has no version that could be asked for, so its functions are looked for by name,
and how they take a window by their signature: as a pair in the repository of 2.8.3 and before, as two numbers since.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor

from seqpar_ring.kernels.base import Capabilities, Scores
from seqpar_ring.kernels.library import Function, Library
from seqpar_ring.kernels.varlen import HALVES, Packed, Results, Rows, VarlenKernel, room

MODULE = "flash_attn_interface"
FORWARD, BACKWARD = "_flash_attn_forward", "_flash_attn_backward"
LIBRARY = Library("flash-attn-3", MODULE, (FORWARD, BACKWARD))

DETERMINISTIC_WIDTH = 192
"""The widest head whose backward can be deterministic."""


class Flash3Kernel(VarlenKernel):
    """flash-attention 3. See the module."""

    name = "flash3"
    can = Capabilities(
        dtypes=HALVES,
        max_head_dim=256,
        max_deterministic_dim=DETERMINISTIC_WIDTH,
        softcap=True,
        unequal_value_dim=True,
        architectures=(9,),
        priority=400,
        notes="flash-attention 3; values of another width than keys are padded",
    )

    def __init__(self, library: Library = LIBRARY, devices: tuple[str, ...] = ("cuda",)) -> None:
        super().__init__(library, devices)

    def attend(self, rows: Rows, packed: Packed, scores: Scores) -> tuple[Tensor, Tensor]:
        """See `VarlenKernel.attend`."""
        function = self._library.function(FORWARD)
        same = _arguments(function, packed, scores)
        out, lse, *_ = function(**{**same, **rows._asdict(), "causal": packed.causal})
        return out, lse

    def differentiate(self, rows: Rows, results: Results, packed: Packed, scores: Scores) -> Iterable[Tensor]:
        """See `VarlenKernel.differentiate`."""
        dq, dk, dv = room(rows)
        function = self._library.function(BACKWARD)
        mask = "is_causal" if _without_default(function) is None else "causal"
        same = _arguments(function, packed, scores)
        mine = {"dout": results.dout, "out": results.out, "softmax_lse": results.lse, "dq": dq, "dk": dk, "dv": dv}
        deterministic = torch.are_deterministic_algorithms_enabled() and rows.q.shape[2] <= DETERMINISTIC_WIDTH
        function(**{**same, **rows._asdict(), **mine, mask: packed.causal, "deterministic": deterministic})
        return dq, dk, dv


def _arguments(function: Function, packed: Packed, scores: Scores) -> dict[str, Any]:
    """What both functions take, as this build of them spells it."""
    unused = _without_default(function)
    if unused is None:
        window: dict[str, Any] = {"window_size_left": packed.left, "window_size_right": packed.right}
    else:
        window = {**unused, "window_size": (packed.left, packed.right)}
    return {
        **window,
        "cu_seqlens_q": packed.cu_q,
        "cu_seqlens_k": packed.cu_k,
        "max_seqlen_q": packed.max_q,
        "max_seqlen_k": packed.max_k,
        "softmax_scale": scores.scale,
        "softcap": scores.softcap or 0.0,
    }


@lru_cache(maxsize=16)
def _without_default(function: Function) -> dict[str, None] | None:
    """The arguments of an older build that must be given, as None; None for a build since, where all that may be left
    out has a default. Newer ones are operators of torch, whose signatures name nothing."""
    known = signature(function).parameters
    if "window_size" not in known:
        return None
    return {name: None for name, parameter in known.items() if parameter.default is Parameter.empty}
