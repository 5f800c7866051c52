"""Do all ranks hold the same weights? A rank with others computes its shard of another model.

The commonest ways there: random weights that were not seeded alike, an adapter that was added on each rank, and a loop
in which nothing averages the gradients, so that every rank trains a model of its own. No loss shows it. So a number
that follows from all weights is compared in training, in the forwards 1, 2, 4, 8 and so on. Where an engine has spread
the weights over ranks (ZeRO-3, FSDP) there are none, and nothing is compared.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from seqpar_ring.errors import DisagreementError
from seqpar_ring.transport import Transport

SPREAD = ("ds_id", "_fsdp_flattened")
"""Attributes by which ZeRO-3 and FSDP mark parameters of which a rank holds a part."""

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights that are summed; what is quantized is frozen, and came from a file."""

AT_ONCE = 2**24
"""Numbers that are summed at once, as torch makes a copy of them in fp64."""

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
    try:
        mine = summary(model)
    except Exception:  # a rank that cannot sum, for want of memory say, must not leave the others alone
        mine = None
    said = torch.tensor([[float(mine is not None), 0.0 if mine is None else mine]], dtype=torch.float64)
    whole, known = everyone.all_gather(said, [1] * everyone.world).unbind(1)
    known = known.nan_to_num(nan=0.0) + known.isnan()  # a rank alone with them is another one, too
    if not bool(whole.all()) or float(known.max() - known.min()) <= AGREEMENT * float(known.abs().max()):
        return
    raise DisagreementError(
        "the ranks hold different weights",
        fix="Load them alike, or seed alike before they are made; and train under DDP, FSDP or DeepSpeed, or average "
        "the gradients over all ranks yourself: without that every rank trains a model of its own.",
        sums_of_weights=known.tolist(),
        forward=forward,
    )


def is_spread(parameter: Tensor) -> bool:
    """Whether a rank holds a part of it only."""
    return isinstance(parameter, DTensor) or any(hasattr(parameter, name) for name in SPREAD)


@torch.no_grad()
def summary(model: nn.Module) -> float | None:
    """A number that follows from all weights; None where a rank holds a part of some."""
    total = torch.zeros((), dtype=torch.float64)
    for i, parameter in enumerate(model.parameters()):
        x = parameter.detach()
        if x.is_meta or is_spread(parameter):
            return None
        if type(x) is Tensor and x.dtype in PLAIN:
            for part in x.flatten().split(AT_ONCE):
                total = total.to(x.device) + part.sum(dtype=torch.float64) * (1 + i % 97)  # else two may be exchanged
    return float(total)
