"""A number for a tensor, by which ranks find out whether they were given the same batch.

One number travels in place of the batch. It is no hash against an adversary, and says nothing about what differs.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIX = 0x1E3779B97F4A7C15, 0x14D049BB133111EB, 0x3F58476D1CE4E5B9
"""Odd numbers of many bits, for `fingerprint`: those of splitmix64 (Steele, Lea, Flood 2014), below 2**63."""

def fingerprint(x: Tensor | None) -> int | None:
    """A number that two tensors of the same shape share only if they are the same, but for rare coincidence."""
    if x is None:
        return None
    if x.is_floating_point():  # their bits: numbers between 0 and 1 have one whole part
        x = x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])
    values = x.reshape(-1).to(torch.int64)
    mixed = values * MIX[0] + torch.arange(values.numel(), device=values.device) * MIX[1]  # each wraps around
    mixed ^= mixed >> 31  # what is linear only, [5, 5, 9] and [7, 4, 9] have in common
    mixed *= MIX[2]
    mixed ^= mixed >> 29
    return int(mixed.sum())
