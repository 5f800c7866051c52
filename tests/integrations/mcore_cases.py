"""Cases of Megatron over a ring: one step compared with one rank, faults on purpose, and what is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import mcore_shim
import torch
import torch.distributed as dist
from mcore_models import Case, Dense, batch_of, config_of, model_of, mpu, parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from seqpar_ring.integrations import megatron
from torch import Tensor

from seqpar_ring import executor
from seqpar_ring.geometry import Mask
from seqpar_ring.groups import Groups
from seqpar_ring.testing import relative_error
from seqpar_ring.transport import DistributedTransport


class Compared(NamedTuple):
    """How far a step over a ring is from one on one rank.

    Attributes:
        loss: relative difference of the token mean.
        gradient: the largest relative L2 difference of a parameter's gradient, and its name.
        rings: forward passes of the ring on this rank.
        mean_of_means: what Megatron's default would have averaged, and the true mean.
    """

    loss: float
    gradient: float
    name: str
    rings: int
    mean_of_means: tuple[float, float]


Step = tuple[float, dict[str, Any]]
"""The token mean of a step, and every gradient as an array: newer versions change how torch pickles a tensor, and who
reads one imports megatron-core."""


def compare(_: Groups, case: Case, reference: Step) -> tuple[Any, ...]:
    """One step of some micro-batches, as `Compared`: loss, and every gradient through DDP and finalize_model_grads."""
    truth, expected = reference[0], {name: torch.from_numpy(x) for name, x in reference[1].items()}
    parallel(case.tp, case.cp)
    config = config_of(case, case.cp, case.tp)
    scale_other_losses(1.0)
    with faults(case.fault), counted() as rings:
        model = model_of(case, config)
        engine = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
        sums, counts = torch.zeros(2), torch.zeros(2)
        losses = [forward(engine, case, seed) for seed in range(case.micro_batches)]
        for loss, count in losses:  # all forward passes come first, as in a pipeline
            loss.backward()
            sums, counts = sums + loss.detach(), counts + count
        finalize_model_grads([engine], counts[0].to(torch.int))
    mine = torch.stack([sums[0], counts[0], sums[0] / counts[0].clamp(min=1)])
    dist.all_reduce(mine, group=mpu.get_context_parallel_group())
    found = {name: p.main_grad for name, p in model.named_parameters()}
    away = {name: relative_error(found[name], part_of(p, expected[name])) for name, p in model.named_parameters()}
    worst = max(away, key=lambda name: away[name])
    mean = (mine[0] / mine[1]).item()
    assert expected.keys() == found.keys()
    means = mine[2].item() / case.cp, truth
    # A plain tuple: those who unpickle this module's own class would import the shim.
    return tuple(Compared(abs(mean - truth) / abs(truth), away[worst], worst, rings[0], means))


def alone(_: Groups, case: Case) -> Step:
    """The same on one rank, with plain attention."""
    parallel(1, 1)
    model = model_of(case, config_of(case, 1), Dense)
    batches = [batch_of(case, seed) for seed in range(case.micro_batches)]
    count = sum(batch["loss_mask"].sum() for batch, _ in batches)
    total = 0.0
    scale_other_losses(1 / count)
    for batch, params in batches:
        loss = summed(model, batch, params) / count
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.numpy() for name, p in model.named_parameters()}


def trains(groups: Groups, case: Case, other: tuple[tuple[str, Any], ...] = ()) -> tuple[Any, ...]:
    """`compare` with one rank's step that each rank does for itself, with some `other` options."""
    options = tuple({**dict(case.options), **dict(other)}.items())
    return compare(groups, case, alone(groups, replace(case, cp=1, tp=1, recompute="", options=options)))


def forward(model: Any, case: Case, seed: int) -> tuple[Tensor, Tensor]:
    """The loss of a micro-batch summed over this rank's tokens, and their number."""
    here, params = local(case, seed)
    rows = here["tokens"].shape[1] // (case.tp if case.spec == "sequence parallel" else 1)
    with rows_of_layers(model, rows):
        return summed(model, here, params), here["loss_mask"].sum()


@contextlib.contextmanager
def rows_of_layers(model: Any, rows: int) -> Iterator[None]:
    """While it is open, layers get so many rows: results would be right without sequence parallelism, too."""

    def expect(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert (args[0] if args else kwargs["hidden_states"]).shape[0] == rows

    layers = next(one.layers for one in model.modules() if hasattr(one, "layers"))
    handle = layers[0].register_forward_pre_hook(expect, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def summed(model: Any, batch: dict[str, Tensor], params: Any) -> Tensor:
    mask = batch["loss_mask"]
    known = {"labels": batch["labels"], "loss_mask": mask, "packed_seq_params": params}
    return (model(batch["tokens"], batch["position_ids"], None, **known) * mask).sum()


def scale_other_losses(factor: Any) -> None:
    """What Megatron's schedules tell losses that join in backward: of the balance of experts, of tokens after next."""
    for scaler in (MoEAuxLossAutoScaler, MTPLossAutoScaler):
        scaler.set_loss_scale(torch.as_tensor(factor, dtype=torch.float32))


def local(case: Case, seed: int) -> tuple[dict[str, Tensor], Any]:
    """This rank's part of a micro-batch, in the layout that is its turn."""
    (batch, params), group = batch_of(case, seed), mpu.get_context_parallel_group()
    layout = case.layouts[seed % len(case.layouts)] if case.layouts else ""
    if layout:
        lengths = case.lengths or case.tokens
        here, params = megatron.shard_batch(batch, group, lengths, layout, rows=case.rows or None)
        if case.fault == "rope":
            dist.broadcast(params.positions, group_src=0, group=group)
        return here, params
    if case.fault == "contiguous":
        return {key: x.chunk(group.size(), 1)[group.rank()] for key, x in batch.items()}, params
    return megatron.batch_on_this_rank(batch, group, params), params


def part_of(parameter: Any, whole: Tensor) -> Tensor:
    """This tensor-parallel rank's part of a whole gradient."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    parts = mpu.get_tensor_model_parallel_world_size()
    return whole.chunk(parts, parameter.partition_dim)[mpu.get_tensor_model_parallel_rank()]


# ---------------------------------------------------------------------------------------------------- seams


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """How often the ring runs forward."""
    count, run = [0], executor.forward

    def forward(*args: Any) -> Any:
        count[0] += 1
        return run(*args)

    with mock.patch.object(executor, "forward", forward):
        yield count


@contextlib.contextmanager
def faults(fault: str) -> Iterator[None]:
    """Something done wrongly."""
    with contextlib.ExitStack() as stack:
        if fault == "rope":
            mcore_shim.FAULTS.add(fault)
            stack.callback(mcore_shim.FAULTS.clear)
        if fault == "leak":
            stack.enter_context(
                mock.patch.object(megatron.RingCoreAttention, "_mask", return_value=Mask.make(prefix=5))
            )
        if fault == "lost":
            faulty = losing(DistributedTransport.exchange)
            stack.enter_context(mock.patch.object(DistributedTransport, "exchange", faulty))
        yield


def losing(exchange: Callable[..., Any]) -> Callable[..., Any]:
    """A transport in which gradients of keys and values arrive as zeros."""

    class Zeroing:
        def __init__(self, handle: Any, recvs: Any) -> None:
            self._handle, self._recvs = handle, recvs

        def wait(self) -> None:
            self._handle.wait()
            for message in self._recvs:
                message.tensor.zero_()

    def faulty(self: Any, sends: Any, recvs: Any, lane: str = "kv") -> Any:
        handle = exchange(self, sends, recvs, lane)
        return Zeroing(handle, recvs) if lane.startswith("dkv") else handle

    return faulty
