"""Merging partial attention: blocks of one row, each normalised by itself, become the row's answer.

A pair (out, lse) is an element of a commutative monoid: merging is associative, and (0, -inf), a block that saw
nothing, is its identity. So blocks may land in any order and any grouping. Done in place on the accumulator, in its
precision (fp32, or fp64), with weights by the sigmoid of the difference of the two lse, which overflows nowhere;
never `log(1 + exp(x))`, which does from x = 89 on. This is the split-KV combination of Flash-Decoding and of Ring
Attention (arXiv 2310.01889). It knows nothing of masks or calls. On a GPU several parts are merged in one pass by a
kernel of our own (`merge_triton`), where triton is there, as it is with torch's builds for CUDA.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from seqpar_ring.views import in_dtype, rows_of

LOG = logging.getLogger(__name__)
"""Says at WARNING, once, why parts are not merged by the kernel that is made for it."""

AT_ONCE = 4
"""Parts that one launch of the GPU's kernel merges."""


class Part(NamedTuple):
    """(out_BSHE, lse_BHS) of an accumulator's rows from `q0` on; see `merge_`."""

    q0: int
    out: Tensor
    lse: Tensor


def merge_(out_BSHE: Tensor, lse_BHS: Tensor, part_out_BSHE: Tensor, part_lse_BHS: Tensor) -> None:
    """Merges a part into an accumulator, in place.

    Args:
        out_BSHE: the accumulator, fp32 or fp64; may be a view of some rows.
        lse_BHS: its log-sum-exp, natural log, same dtype; may be a view.
        part_out_BSHE: the part, any float dtype, finite (0 where it saw nothing).
        part_lse_BHS: its log-sum-exp, -inf where it saw nothing. The part is not changed.
    """
    part_out, part_lse = in_dtype(part_out_BSHE, out_BSHE.dtype), in_dtype(part_lse_BHS, lse_BHS.dtype)
    # Two rows that saw nothing would differ by inf - inf = nan; so the accumulator's lse counts as finite here, and the
    # part's, -inf, makes its weight 0. Other nan stay visible.
    weight_BHS = (part_lse - lse_BHS.clamp(min=torch.finfo(lse_BHS.dtype).min)).sigmoid_()
    out_BSHE.lerp_(part_out, weight_BHS.transpose(1, 2).unsqueeze(-1))
    torch.logaddexp(lse_BHS, part_lse, out=lse_BHS)


def at_once(out_BSHE: Tensor) -> int:
    """How many parts are worth waiting for, to merge them into this accumulator in one pass."""
    return AT_ONCE if out_BSHE.is_cuda and out_BSHE.dtype == torch.float32 and fused() else 1


def merge_parts_(out_BSHE: Tensor, lse_BHS: Tensor, parts: Sequence[Part]) -> None:
    """Merges some parts into an accumulator of all rows, in place; their rows may overlap.

    Args:
        out_BSHE: the accumulator, fp32 or fp64; contiguous where parts are merged at once.
        lse_BHS: its log-sum-exp, same dtype; contiguous where parts are merged at once.
        parts: as `merge_` takes them.
    """
    if at_once(out_BSHE) > 1:
        import_module("seqpar_ring.kernels.merge_triton").merge_parts_(out_BSHE, lse_BHS, parts)
        return
    for q0, out, lse in parts:
        q1 = q0 + lse.shape[2]
        merge_(rows_of(out_BSHE, q0, q1), rows_of(lse_BHS, q0, q1, dim=2), out, lse)


@cache
def fused() -> bool:
    """Whether parts are merged by our own kernel on a GPU: Triton is there, and has what it compiles with."""
    if find_spec("triton") is None:
        return False
    out, lse = torch.zeros(1, 1, 1, 1, device="cuda"), torch.zeros(1, 1, 1, device="cuda")
    try:
        import_module("seqpar_ring.kernels.merge_triton").merge_parts_(out, lse, [Part(0, out.clone(), lse.clone())])
    except Exception as error:  # no C compiler, no headers of Python: Triton raises what it meets
        said = (str(error).splitlines() or [""])[0]
        LOG.warning("parts are merged by plain torch, as Triton cannot compile: %s: %s", type(error).__name__, said)
        return False
    return True
