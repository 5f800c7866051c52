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
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from seqpar_ring.groups import Groups

STEPS, MICRO_BATCHES = 4, 4


class Engine(NamedTuple):
    """What Megatron is asked for beside the ring.

    Attributes:
        pp: stages of the pipeline.
        virtual: chunks of layers in each stage, interleaved; none: one.
        distributed: the distributed optimizer.
        overlap: gradients are reduced while backward goes on.
    """

    pp: int = 1
    virtual: int | None = None
    distributed: bool = False
    overlap: bool = False


def train(_: Groups, case: Case, asked: dict[str, Any], plain: bool = False) -> tuple[list[float], int]:
    """The token mean of each step and the norm of its gradient, one after the other, the same on all ranks, and how
    often the ring ran forward on this one.

    `asked` is as in `Engine`; `plain`: with plain attention.
    """
    engine = Engine(**asked)
    parallel(case.tp, case.cp, engine.pp, engine.virtual)
    config = config_of(case, case.cp, case.tp)
    config.finalize_model_grads_func = finalize_model_grads
    config.pipeline_model_parallel_size, config.pipeline_dtype = engine.pp, torch.float32
    config.variable_seq_lengths, config.virtual_pipeline_model_parallel_size = False, engine.virtual
    if engine.virtual:  # two stages are neighbours on both sides: Megatron asks for separate messages then
        config.overlap_p2p_comm, config.batch_p2p_comm = True, False
        config.microbatch_group_size_per_vp_stage = engine.pp
    with mcore_shim.OnTheCpu(), faults(case.fault), counted() as rings:
        chunks = built(case, config, engine, Dense if plain else None)
        options = OptimizerConfig(
            optimizer="adam", lr=3e-3, clip_grad=1e9, use_distributed_optimizer=engine.distributed
        )
        optimizer = get_megatron_optimizer(options, chunks, use_gloo_process_groups=False)
        assert isinstance(optimizer.chained_optimizers[0], DistributedOptimizer) == engine.distributed
        figures = [figure for step in range(STEPS) for figure in one_step(chunks, optimizer, case, step)]
    return figures, rings[0]


def built(case: Case, config: Any, engine: Engine, attention: Any) -> list[Any]:
    """The chunks of the model that this rank holds, in Megatron's DDP."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=engine.distributed,
        overlap_grad_reduce=engine.overlap,
    )
    chunks = []
    for chunk in range(engine.virtual or 1):
        at: dict[str, Any] = {} if engine.virtual is None else {"ignore_virtual": False, "vp_stage": chunk}
        ends = {
            "pre_process": mpu.is_pipeline_first_stage(**at),
            "post_process": mpu.is_pipeline_last_stage(**at),
        }
        model = model_of(case, config, attention, **ends, vp_stage=at.get("vp_stage"))
        same_in_every_pipeline(model)
        chunks.append(DistributedDataParallel(config, ddp, model, disable_bucketing=chunk > 0))
    if engine.overlap:
        functions = [chunk.no_sync for chunk in chunks], [chunk.start_grad_sync for chunk in chunks]
        config.no_sync_func, config.grad_sync_func = (one if engine.virtual else one[0] for one in functions)
    return chunks


def same_in_every_pipeline(model: Any) -> None:
    """Weights by the name that a parameter has in the whole model, whichever stage holds it."""
    numbers = {str(i): str(layer.layer_number) for i, layer in enumerate(model.decoder.layers)}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = numbers[parts[2]]
        made = torch.Generator().manual_seed(zlib.crc32(".".join(parts).encode()))
        parameter.data.copy_(torch.randn(parameter.shape, generator=made) * 0.3 + (parameter.dim() == 1))


def one_step(chunks: list[Any], optimizer: Any, case: Case, step: int) -> tuple[float, float]:
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    seeds = [iter(range(step * MICRO_BATCHES, (step + 1) * MICRO_BATCHES)) for _ in chunks]
    tokens = case.rows * case.cp or sum(case.padded or case.lengths) or case.tokens
    done = get_forward_backward_func()(
        forward_step_func=partial(forward_step, case),
        data_iterator=seeds if len(chunks) > 1 else seeds[0],
        model=chunks,
        num_microbatches=MICRO_BATCHES,
        seq_length=tokens,
        micro_batch_size=1 if case.lengths else 2,
    )
    _, norm, _ = optimizer.step()  # Adam alone would not show a factor before all gradients
    total = torch.stack(done).sum(0) if done else torch.zeros(2)  # only the last stage of a pipeline has losses
    for group in (mpu.get_context_parallel_group(), mpu.get_pipeline_model_parallel_group()):
        dist.all_reduce(total, group=group)
    return (total[0] / total[1]).item(), float(norm)


def forward_step(case: Case, seeds: Iterator[int], model: Any) -> tuple[Tensor, Any]:
    here, params = local(case, next(seeds))
    out = model(here["tokens"], here["position_ids"], None, labels=here["labels"], packed_seq_params=params)
    return out, partial(loss_of, here["loss_mask"])


def loss_of(mask: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total, count = (out * mask).sum(), mask.sum()
    return total, count.to(torch.int), torch.stack([total.detach(), count])
