"""Merging partial attention: blocks of one row, each normalised by itself, become the row's answer.

A pair (out, lse) is an element of a commutative monoid: merging is associative, and (0, -inf), a block that saw
nothing, is its identity. So blocks may land in any order and any grouping. Done in place on the accumulator, in its
precision (fp32, or fp64), with weights by the sigmoid of the difference of the two lse, which overflows nowhere;
never `log(1 + exp(x))`, which does from x = 89 on. This is the split-KV combination of Flash-Decoding and of Ring
Attention (arXiv 2310.01889). It knows nothing of masks or calls.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_(out_BSHE: Tensor, lse_BHS: Tensor, part_out_BSHE: Tensor, part_lse_BHS: Tensor) -> None:
    """Merges a part into an accumulator, in place.

    Args:
        out_BSHE: the accumulator, fp32 or fp64; may be a view of some rows.
        lse_BHS: its log-sum-exp, natural log, same dtype; may be a view.
        part_out_BSHE: the part, any float dtype, finite (0 where it saw nothing).
        part_lse_BHS: its log-sum-exp, -inf where it saw nothing. The part is not changed.
    """
    part_out, part_lse = part_out_BSHE.to(out_BSHE.dtype), part_lse_BHS.to(lse_BHS.dtype)
    # Two rows that saw nothing differ by inf - inf = nan; a part that saw nothing weighs 0. Other nan stay visible.
    weight_BHS = torch.sigmoid(part_lse - lse_BHS).masked_fill_(part_lse == -torch.inf, 0.0)
    out_BSHE.lerp_(part_out, weight_BHS.transpose(1, 2).unsqueeze(-1))
    lse_BHS.copy_(torch.logaddexp(lse_BHS, part_lse))
