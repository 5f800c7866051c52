"""The trained model as a checkpoint that plain transformers load, and its loss when they do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import deepspeed
import torch
import torch.distributed as dist
from longtext import Row
from reference import document_losses, plain

if TYPE_CHECKING:
    from training import Run

LOADED_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""How far, relative, the loaded checkpoint's loss may be: rounding, for one process computes in another order."""


def save(run: Run) -> None:
    """The trained model and its tokenizer in an ordinary folder; under ZeRO-3 the weights are brought together."""
    weights = list(run.engine.module.parameters())
    with deepspeed.zero.GatheredParameters(weights, enabled=run.engine.zero_optimization_stage() == 3):
        if dist.get_rank() == 0:
            run.engine.module.save_pretrained(run.job.output)
            run.tokenizer.save_pretrained(run.job.output)
    dist.barrier()


def load_back(run: Run, row: Row) -> float:
    """The loss of the saved checkpoint in plain transformers, on one process."""
    model = plain(run.job.output, run.engine.module.dtype).eval()
    with torch.no_grad():
        return document_losses(model, row)
