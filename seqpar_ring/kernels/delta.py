"""Delta, the sum of dout * out over a row's width, and an output that a kernel's backward can take in its place.

Where queries travel in backward, `delta = sum(dout * out)` travels with them and `out` does not: half the bytes. Every
flash backward takes out and makes delta of it, and uses it for nothing else; so any out will do whose product with dout
is that delta.
"""

from __future__ import annotations

import torch
from torch import Tensor


def delta_of(dout_BSHE: Tensor, out_BSHE: Tensor, dtype: torch.dtype) -> Tensor:
    """delta_BHS in this dtype, in which it is summed, too."""
    return (dout_BSHE.to(dtype) * out_BSHE.to(dtype)).sum(-1).transpose(1, 2)


def stand_in(dout_BSHE: Tensor, delta_BHS: Tensor | None) -> Tensor:
    """A multiple of dout whose product with it is delta, in dout's dtype.

    Scaled by dout's largest element first, so that no square under- or overflows; a row without gradient has delta 0.
    """
    assert delta_BHS is not None  # one of out and delta is given
    largest = dout_BSHE.abs().amax(-1, keepdim=True)
    unit = torch.where(largest > 0, dout_BSHE / largest, 0.0)
    delta_BSH1 = delta_BHS.transpose(1, 2).unsqueeze(-1)
    found = torch.where(largest > 0, unit * (delta_BSH1 / largest) / (unit * unit).sum(-1, keepdim=True), 0.0)
    return found.to(dout_BSHE.dtype)
