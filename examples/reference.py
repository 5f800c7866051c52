"""One process as the reference: plain transformers that know nothing of seqpar_ring, each document of a row alone.

Its own attention (sdpa), losses summed and divided by the number of targets. So packing, masks, positions, shifted
labels, the ring, the loss and what ZeRO does to gradients all stand inside a comparison with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from longtext import Row
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

Result = TypeVar("Result")


class Step(NamedTuple):
    """One step's loss, and the gradient of each parameter by its name."""

    loss: float
    gradients: Mapping[str, Tensor]


def one_process(model: Any, row: Row) -> Step:
    """The step of a plain transformers model: each document alone, forward and backward."""
    loss = document_losses(model, row)
    return Step(loss, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})


def plain(folder: Path, dtype: torch.dtype) -> Any:
    """A model from its folder as transformers loads it, with transformers' own attention."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")


def document_losses(model: Any, row: Row) -> float:
    """The mean loss over the row's targets, each document on its own; adds to gradients where they are enabled."""
    targets = len(row.input_ids) - len(row.lengths)
    total = 0.0
    for ids in torch.tensor([row.input_ids]).split(row.lengths, dim=1):
        if ids.shape[1] < 2:
            continue  # its only token predicts nothing
        logits_SV = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        loss = functional.cross_entropy(logits_SV, ids[0, 1:], reduction="sum") / targets
        if torch.is_grad_enabled():
            loss.backward()
        total += float(loss.detach())
    return total


def alone(work: Callable[[], Result]) -> Result:
    """The result of work that rank 0 does with all cores while the others wait, on every rank. Collective."""
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        threads = torch.get_num_threads()
        torch.set_num_threads(cores())
        found = [work()]
        torch.set_num_threads(threads)
    dist.broadcast_object_list(found, src=0)
    result: Result = found[0]
    return result


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
