"""Some steps of Megatron's own loop over a ring: its schedules, DDP, optimizers and pipelines, and the losses."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import mcore_shim
import torch
import torch.distributed as dist
from mcore_cases import counted, faults, local
from mcore_models import Case, Dense, config_of, model_of, mpu, parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from seqpar_ring.groups import Groups

STEPS, MICRO_BATCHES = 4, 4


class Engine(NamedTuple):
    """What Megatron is asked for beside the ring.

    Attributes:
        pp: stages of the pipeline, each with one layer.
        distributed: the distributed optimizer.
        overlap: gradients are reduced while backward goes on.
    """

    pp: int = 1
    distributed: bool = False
    overlap: bool = False


def train(_: Groups, case: Case, asked: dict[str, Any], plain: bool = False) -> tuple[list[float], int]:
    """The token mean of each step, the same on all ranks, and how often the ring ran forward on this one.

    `asked` is as in `Engine`; `plain`: with plain attention.
    """
    engine = Engine(**asked)
    parallel(case.tp, case.cp, engine.pp)
    config = config_of(case, case.cp, case.tp)
    config.finalize_model_grads_func = finalize_model_grads
    config.pipeline_model_parallel_size, config.pipeline_dtype = engine.pp, torch.float32
    config.variable_seq_lengths = False
    stage = {"pre_process": mpu.is_pipeline_first_stage(), "post_process": mpu.is_pipeline_last_stage()}
    with mcore_shim.OnTheCpu(), faults(case.fault), counted() as rings:
        model = model_of(case, config, Dense if plain else None, **stage)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=engine.distributed,
            overlap_grad_reduce=engine.overlap,
        )
        same_in_every_pipeline(model)
        wrapped = DistributedDataParallel(config, ddp, model)
        if engine.overlap:
            config.no_sync_func, config.grad_sync_func = wrapped.no_sync, wrapped.start_grad_sync
        options = OptimizerConfig(
            optimizer="adam", lr=3e-3, clip_grad=0.0, use_distributed_optimizer=engine.distributed
        )
        optimizer = get_megatron_optimizer(options, [wrapped], use_gloo_process_groups=False)
        losses = [one_step(wrapped, optimizer, case, step) for step in range(STEPS)]
    return losses, rings[0]


def same_in_every_pipeline(model: Any) -> None:
    """Weights by the name that a parameter has in the whole model, whichever stage holds it."""
    numbers = {str(i): str(layer.layer_number) for i, layer in enumerate(model.decoder.layers)}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = numbers[parts[2]]
        made = torch.Generator().manual_seed(zlib.crc32(".".join(parts).encode()))
        parameter.data.copy_(torch.randn(parameter.shape, generator=made) * 0.3 + (parameter.dim() == 1))


def one_step(model: Any, optimizer: Any, case: Case, step: int) -> float:
    model.zero_grad_buffer()
    optimizer.zero_grad()
    seeds = iter(range(step * MICRO_BATCHES, (step + 1) * MICRO_BATCHES))
    tokens = case.rows * case.cp or sum(case.padded or case.lengths) or case.tokens
    done = get_forward_backward_func()(
        forward_step_func=partial(forward_step, case),
        data_iterator=seeds,
        model=[model],
        num_microbatches=MICRO_BATCHES,
        seq_length=tokens,
        micro_batch_size=1 if case.lengths else 2,
    )
    optimizer.step()
    total = torch.stack(done).sum(0) if done else torch.zeros(2)  # only the last stage of a pipeline has losses
    for group in (mpu.get_context_parallel_group(), mpu.get_pipeline_model_parallel_group()):
        dist.all_reduce(total, group=group)
    return (total[0] / total[1]).item()


def forward_step(case: Case, seeds: Iterator[int], model: Any) -> tuple[Tensor, Any]:
    here, params = local(case, next(seeds))
    out = model(here["tokens"], here["position_ids"], None, labels=here["labels"], packed_seq_params=params)
    return out, partial(loss_of, here["loss_mask"])


def loss_of(mask: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total, count = (out * mask).sum(), mask.sum()
    return total, count.to(torch.int), torch.stack([total.detach(), count])
