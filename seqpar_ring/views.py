"""Parts of tensors, and tensors in another dtype, made only where they differ from what is there.

A step calls several of these for each kernel, and each operator of torch takes the host a microsecond or more even
where it changes nothing: at a few thousand tokens a rank that adds up to what the kernels themselves take.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rows_of(x: Tensor, a: int, b: int, dim: int = 1) -> Tensor:
    """Rows `a` to `b` along `dim`, as a view; the tensor itself where those are all."""
    return x if b - a == x.shape[dim] else x.narrow(dim, a, b - a)


def columns_of(x: Tensor, width: int) -> Tensor:
    """The first `width` columns (the last dim), as a view; the tensor itself where those are all."""
    return x if x.shape[-1] == width else x[..., :width]


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in this dtype; itself where that is its own."""
    return x if x.dtype == dtype else x.to(dtype)
