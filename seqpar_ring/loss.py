"""The token-weighted loss over the whole world.

A mean of per-rank means is wrong as soon as ranks hold unequal numbers of targets, and with sharded documents they
do. Here the sum over all ranks is divided by the count over all ranks, and the backward is scaled so that averaging
gradients over all ranks of the world, as DDP and ZeRO do, gives the very gradient of one device. Reduction and
scaling only; the model's head and its memory are `tiling`'s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from seqpar_ring.batch import IGNORED
from seqpar_ring.errors import BatchError, PlanError, SeqparError
from seqpar_ring.transport import Transport


def token_mean(
    logits_BSV: Tensor,
    labels_BS: Tensor,
    everyone: Transport,
    *,
    num_items: int | None = None,
    accumulation: int = 1,
) -> Tensor:
    """Cross entropy, averaged over the targets of all ranks. Collective over the world.

    Args:
        logits_BSV: this rank's logits, any float dtype; reduced in fp32 (fp64 for fp64).
        labels_BS: this rank's targets, already shifted; -100 where there is none.
        everyone: transport of all ranks of the world, sequence groups and data ranks alike.
        num_items: targets of the whole optimizer step over the world; if not given, those of this call.
        accumulation: micro-batches of the optimizer step, by which the engine divides the gradient; only with
            `num_items`.

    Returns:
        The global mean, the same scalar on every rank. Its gradient with respect to this rank's logits is `world`
        times that of the true mean, so that the average over the ranks is the true gradient.

    Raises:
        PlanError: logits and labels differ in shape; `accumulation` without `num_items`.
        BatchError: not one target on any rank; `num_items` or `accumulation` below 1 or not whole; `num_items`, seen
            where no GPU would have to be waited for, below this call's targets; raised on every rank.
        DisagreementError: the ranks give different `num_items` or `accumulation`: each its own targets, say. Compared
            in every call, on a GPU in the first only.
    """
    if logits_BSV.shape[:-1] != labels_BS.shape:
        raise PlanError(
            "logits and labels differ in shape",
            fix="Give the labels of this rank's tokens, shifted and sharded: shard_batch returns them.",
            logits=tuple(logits_BSV.shape),
            labels=tuple(labels_BS.shape),
        )
    wide = logits_BSV if logits_BSV.dtype is torch.float64 else logits_BSV.float()
    flat = labels_BS.reshape(-1)
    by_token = wide.reshape(flat.numel(), wide.shape[-1])
    local = functional.cross_entropy(by_token, flat, ignore_index=IGNORED, reduction="sum")
    return mean_of_sums(local, labels_BS, everyone, num_items=num_items, accumulation=accumulation)


def mean_of_sums(
    local: Tensor, labels_BS: Tensor, everyone: Transport, *, num_items: int | None = None, accumulation: int = 1
) -> Tensor:
    """The same of a sum that is computed already, for instance in tiles. Collective over the world.

    Args:
        local: cross entropy summed over this rank's targets; a scalar in fp32 or fp64.
        labels_BS: this rank's targets, of which those are counted that are not -100.
        everyone, num_items, accumulation: as in `token_mean`.

    Returns, Raises: as `token_mean`.
    """
    if accumulation != 1 and num_items is None:
        raise PlanError(
            "accumulation without num_items has nothing to weigh by",
            fix="Give num_items, the targets of the whole optimizer step (count_targets), or leave accumulation out.",
            accumulation=accumulation,
        )
    problem: SeqparError | None = None
    try:
        num_items = None if num_items is None else _whole("num_items", num_items)
        accumulation = _whole("accumulation", accumulation, least=1)
    except SeqparError as error:
        problem = error
    # On a GPU the host has to wait.
    if problem or not labels_BS.is_cuda or everyone.agreed.first_time("weights of the loss"):
        everyone.agree("the loss", {"num_items": num_items, "accumulation": accumulation}, problem)
    targets = (labels_BS != IGNORED).sum()
    total, seen = everyone.all_reduce(torch.stack([local.detach().double(), targets.double()])).unbind()
    count = int(seen) if num_items is None else num_items
    if count < 1:
        raise BatchError(
            "no token of the batch has a target, on any rank",
            fix="Check the labels: all are -100.",
            targets=int(seen),
            num_items=num_items,
        )
    if not seen.is_cuda and int(seen) > count:  # on a GPU the host would have to wait to see it
        raise BatchError(
            "there are more targets in this batch than num_items says are in the whole step",
            fix="Count the targets of all ranks and micro-batches: count_targets does.",
            targets=int(seen),
            num_items=count,
        )
    factor = accumulation / count if num_items is not None else 1 / count
    value = (total * factor).to(local.dtype)
    mean: Tensor = _Valued.apply(local, value, factor * everyone.world)
    return mean


def _whole(name: str, number: Any, least: int | None = None) -> int:
    """A whole number, given as one of Python, numpy or torch.

    Raises:
        BatchError: it is none, or too small.
    """
    try:
        found = int(number)
        if found == number and not isinstance(number, bool) and (least is None or found >= least):
            return found
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    fix = "Give what count_targets returns as num_items, and the number of micro-batches as accumulation."
    what = "targets" if name == "num_items" else "micro-batches"
    raise BatchError(f"{name} is no number of {what}", fix=fix, **{name: number})


class _Valued(torch.autograd.Function):
    """A given value with a scaled gradient: the global mean to look at, this rank's share of it to differentiate."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.factor, None, None
