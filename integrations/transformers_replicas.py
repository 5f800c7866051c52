"""Do all ranks hold the same weights? A rank with others computes its shard of another model.

The commonest ways there: random weights that were not seeded alike, an adapter that was added on each rank, and a loop
in which nothing averages the gradients, so that every rank trains a model of its own. No loss shows it. So a number
that follows from all weights is compared in training, in the forwards 1, 2, 4, 8 and so on. Where an engine has spread
the weights over ranks (ZeRO-3, FSDP) there are no replicas, and nothing is compared.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from seqpar_ring.errors import DisagreementError
from seqpar_ring.transport import Transport

SPREAD = ("ds_id", "_fsdp_flattened")
"""Attributes by which ZeRO-3 and FSDP mark parameters of which a rank holds a part."""

AGREEMENT = 1e-9
"""Largest relative difference: the same sum in fp64, on another device perhaps."""


def check(model: nn.Module, everyone: Transport, forward: int) -> None:
    """Compare the ranks' weights in some of the forwards. Collective over the ranks with the same part of the model.

    Args:
        model: with its weights.
        everyone: those ranks.
        forward: its number, from 1.

    Raises:
        DisagreementError: on every rank.
    """
    if everyone.world == 1 or forward & (forward - 1):
        return
    mine = torch.tensor([summary(model)], dtype=torch.float64)
    known = everyone.all_gather(mine, [1] * everyone.world)
    if bool(known.isnan().any()) or float(known.max() - known.min()) <= AGREEMENT * float(known.abs().max()):
        return
    raise DisagreementError(
        "the ranks hold different weights",
        fix="Load them alike, or seed alike before they are made; and train under DDP, FSDP or DeepSpeed, or average "
        "the gradients over all ranks yourself: without that every rank trains a model of its own.",
        sums_of_weights=known.tolist(),
        forward=forward,
    )


@torch.no_grad()
def summary(model: nn.Module) -> float:
    """A number that follows from all weights; nan where a rank holds a part of some."""
    total = torch.zeros((), dtype=torch.float64)
    for i, x in enumerate(model.parameters()):
        if x.is_meta or isinstance(x, DTensor) or any(hasattr(x, name) for name in SPREAD):
            return math.nan
        if x.is_floating_point():
            total = total.to(x.device) + x.sum(dtype=torch.float64) * (1 + i % 97)  # else two could be exchanged
    return float(total)
