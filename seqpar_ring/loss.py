"""The token-weighted loss over the whole world.

A mean of per-rank means is wrong as soon as ranks hold unequal numbers of targets, and with sharded documents they
do. Here the sum over all ranks is divided by the count over all ranks, and the backward is scaled so that averaging
gradients over all ranks of the world, as DDP and ZeRO do, gives the very gradient of one device. Reduction and
scaling only; the model's head and its memory are `tiling`'s.
"""

from __future__ import annotations

from collections.abc import Callable
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
    problem: SeqparError | None = None,
) -> Tensor:
    """Cross entropy, averaged over the targets of all ranks. Collective over the world.

    Args:
        logits_BSV: this rank's logits, any float dtype; reduced in fp32 (fp64 for fp64).
        labels_BS: this rank's targets, already shifted; -100 where there is none.
        everyone: transport of all ranks of the world, sequence groups and data ranks alike.
        num_items: targets of the whole optimizer step over the world; if not given, those of this call.
        accumulation: micro-batches of the optimizer step, by which the engine divides the gradient; only with
            `num_items`.
        problem: what the caller found wrong already, for all ranks to raise.

    Returns:
        The global mean, the same scalar on every rank. Its gradient with respect to this rank's logits is `world`
        times that of the true mean, so that the average over the ranks is the true gradient.

    Raises:
        PlanError: logits and labels differ in shape; `accumulation` without `num_items`; raised on every rank.
        BatchError: not one target on any rank; `num_items` or `accumulation` below 1 or not whole; and, seen where no
            GPU would have to be waited for, a label beyond the vocabulary, or `num_items` below this call's targets;
            raised on every rank.
        DisagreementError: the ranks give different `num_items` or `accumulation`: each its own targets, say. Compared
            in every call, on a GPU in the first only.
    """
    def summed() -> Tensor | Exception:
        try:
            return cross_entropy()
        except Exception as error:  # want of memory, say
            return error

    def cross_entropy() -> Tensor:
        wide = logits_BSV if logits_BSV.dtype is torch.float64 else logits_BSV.float()
        flat = labels_BS.reshape(-1)
        by_token = wide.reshape(flat.numel(), wide.shape[-1])
        return functional.cross_entropy(by_token, flat, ignore_index=IGNORED, reduction="sum")

    problem = problem or misfit(logits_BSV, labels_BS, "logits", logits_BSV.shape[-1])
    return mean_of_sums(
        summed, labels_BS, everyone, num_items=num_items, accumulation=accumulation, problem=problem
    )


def mean_of_sums(
    summed: Callable[[], Tensor | Exception],
    labels_BS: Tensor,
    everyone: Transport,
    *,
    num_items: int | None = None,
    accumulation: int = 1,
    problem: SeqparError | None = None,
    **record: object,
) -> Tensor:
    """The same of a sum that is computed otherwise, for instance in tiles. Collective over the world.

    Args:
        summed: computes the cross entropy summed over this rank's targets, a scalar in fp32 or fp64, once ranks agree;
            or its error, for all ranks to raise, where it surely talks to none (a head of gathered weights does).
        labels_BS: this rank's targets, of which those are counted that are not -100.
        everyone, num_items, accumulation, problem: as in `token_mean`.
        **record: what else the ranks must have in common.

    Returns, Raises: as `token_mean`.
    """
    try:
        if accumulation != 1 and num_items is None:
            raise PlanError(
                "accumulation without num_items has nothing to weigh by",
                fix="Give num_items, the targets of the whole step (count_targets), or leave accumulation out.",
                accumulation=accumulation,
            )
        num_items = None if num_items is None else _whole("num_items", num_items)
        accumulation = _whole("accumulation", accumulation, least=1)
    except SeqparError as error:
        problem = problem or error
    weights = {"num_items": num_items, "accumulation": accumulation, **record}
    known = f"weights of the loss, {'of the batch' if num_items is None else 'of the step'}"
    on_gpu = problem is None and labels_BS.is_cuda  # weights differ from step to step, and the host would have to wait
    everyone.agree_at_first("the loss", weights, problem, always=not on_gpu, known_as=known)
    waits = num_items is None or not labels_BS.is_cuda
    local, total, seen = _over_all(summed(), labels_BS, everyone, waits)
    count = int(seen) if num_items is None else num_items
    if count < 1:
        masked = int(seen) == 0
        raise BatchError(
            "no token of the batch has a target, on any rank" if masked else "num_items says no targets",
            fix="Check the labels: all are -100." if masked else "Give what count_targets returns.",
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


def _over_all(
    done: Tensor | Exception, labels_BS: Tensor, everyone: Transport, waits: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(this rank's sum, the sum over all ranks, the targets of all ranks). Collective.

    A rank whose sum failed takes part nevertheless, as the others are on their way to it. They see it where the host
    waits for the result anyhow, as `waits` says.
    """
    failure = done if isinstance(done, Exception) else None
    local = labels_BS.new_zeros((), dtype=torch.float32) if isinstance(done, Exception) else done
    targets = (labels_BS != IGNORED).sum()
    failed = targets.new_full((), failure is not None)
    sums = torch.stack([x.detach().double() for x in (local, targets, failed)])
    try:
        total, seen, failed = everyone.all_reduce(sums).unbind()
        if waits and int(failed):
            everyone.agree("the loss", {}, failure)  # raises it, here and on every other rank
    except SeqparError as error:
        if failure is not None and error is not failure:
            raise failure from error
        raise
    if failure is not None:
        raise failure
    return local, total, seen


def misfit(x_BSN: Tensor, labels_BS: Tensor, what: str, words: int | None) -> SeqparError | None:
    """What is wrong with labels, as far as the host need not wait for a GPU to see it; None if nothing.

    Args:
        x_BSN: what has a row for each of them.
        labels_BS: this rank's targets.
        what: what that is, for messages: "logits", "hidden states".
        words: of the vocabulary; None where nobody knows.
    """
    if not isinstance(labels_BS, Tensor) or labels_BS.dtype is not torch.int64:
        given = labels_BS.dtype if isinstance(labels_BS, Tensor) else type(labels_BS).__name__
        return BatchError("labels are not int64", fix="Use those that shard_batch returned.", labels=given)
    if x_BSN.shape[:-1] != labels_BS.shape:
        return PlanError(
            f"{what} and labels differ in shape",
            fix="Give the labels of this rank's tokens, shifted and sharded: shard_batch returns them.",
            **{what.partition(" ")[0]: tuple(x_BSN.shape)},
            labels=tuple(labels_BS.shape),
        )
    if words is not None and not labels_BS.is_cuda and labels_BS.numel() and not torch.compiler.is_compiling():
        least, most = (int(x) for x in labels_BS.masked_fill(labels_BS == IGNORED, 0).aminmax())
        if most >= words:
            fix = "Use the tokenizer of this model, or resize its embeddings."
            return BatchError("a label is beyond the vocabulary", fix=fix, label=most, vocabulary=words)
        if least < 0:
            fix = "Mark what is no target with -100."
            return BatchError("a label is below 0, and not -100", fix=fix, label=least)
    return None


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
