"""Is it exact? One step's loss and gradients over all ranks, against one process of plain transformers (reference.py).

In fp32 the differences left are those of rounding. Nothing is trained.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from deepspeed.utils import safe_get_full_grad
from reference import Step, alone, one_process, plain
from smollm2 import checkpointed

if TYPE_CHECKING:
    from training import Run

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


class Difference(NamedTuple):
    """How far a step is from the reference, relative; of the gradients the worst, with its parameter."""

    ours: float
    reference: float
    loss: float
    gradient: float
    parameter: str
    parameters: int


def difference(ours: Step, reference: Step) -> Difference:
    """Compare two steps: losses, and gradients parameter by parameter, by L2 norm relative to the reference's.

    A gradient that only one side has, or that is not finite, is infinitely far.
    """
    apart = dict.fromkeys(ours.gradients.keys() ^ reference.gradients.keys(), math.inf)
    for name in ours.gradients.keys() & reference.gradients.keys():
        one, other = ours.gradients[name].double(), reference.gradients[name].double()
        far = float((one - other).norm() / other.norm().clamp_min(torch.finfo(torch.float64).tiny))
        apart[name] = math.inf if math.isnan(far) else far
    worst = max(apart, key=lambda name: apart[name])
    loss = abs(ours.loss - reference.loss) / abs(reference.loss)
    return Difference(ours.loss, reference.loss, loss, apart[worst], worst, len(apart))


def verify(run: Run) -> bool:
    """One step's loss and gradients over all ranks against one process. Returns whether they agree to rounding."""
    row = run.rows[0]
    loss = run.engine(**row.batch()).loss
    run.engine.backward(loss)
    weights = run.engine.module.named_parameters()
    ours = Step(float(loss.detach()), {name: safe_get_full_grad(weight).clone() for name, weight in weights})
    found = alone(lambda: difference(ours, one_process(checkpointed(plain(run.folder, torch.float32)), row)))
    run.out.line()
    run.out.table(
        [
            ("loss", f"{found.ours:.7f} over {run.sp.world_size} ranks, {found.reference:.7f} on one process"),
            (
                "gradients",
                f"{found.parameters} parameters; the largest difference is that of {found.parameter}",
            ),
        ]
    )
    return run.out.verdict(
        [
            (
                found.loss <= LOSS_TOLERANCE,
                f"loss: relative difference {found.loss:.1e}, at most {LOSS_TOLERANCE:g}",
            ),
            (
                found.gradient <= GRADIENT_TOLERANCE,
                f"gradients: relative difference {found.gradient:.1e}, at most {GRADIENT_TOLERANCE:g}",
            ),
        ]
    )
