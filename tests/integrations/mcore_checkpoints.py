"""Megatron's distributed checkpoints of a model over a ring: saved by so many ranks, and gone on with by others."""

from __future__ import annotations

import gc
import multiprocessing
from typing import Any

import mcore_shim
import torch
from mcore_cases import part_of
from mcore_models import Case, config_of, parallel
from mcore_training import Engine, built, one_step
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from seqpar_ring.groups import Groups

STEPS = 2
"""Trained before a checkpoint, and after it."""

Saved = tuple[list[float], dict[str, Any]]
"""The losses behind a checkpoint, and the weights in it as arrays, of this tensor-parallel rank."""


class Job:
    """A model, its optimizer, and Megatron's loop; with learnable sinks, which only attention holds."""

    def __init__(self, case: Case, distributed: bool) -> None:
        parallel(case.tp, case.cp)
        self.distributed = distributed
        self.case, config = case, config_of(case, case.cp, case.tp)
        config.finalize_model_grads_func, config.variable_seq_lengths = finalize_model_grads, False
        self.chunks = built(case, config, Engine(distributed=distributed), None)
        self.model = self.chunks[0].module
        options = OptimizerConfig(optimizer="adam", lr=3e-3, clip_grad=0.0, use_distributed_optimizer=distributed)
        self.optimizer = get_megatron_optimizer(options, self.chunks, use_gloo_process_groups=False)

    def train(self, first: int) -> list[float]:
        """Loss and norm of the gradient, one after the other, in each step."""
        steps = [one_step(self.chunks, self.optimizer, self.case, step) for step in range(first, first + STEPS)]
        return [figure for step in steps for figure in step]

    def state(self, loading: bool) -> dict[str, Any]:
        """What goes into a checkpoint. A distributed optimizer saves what it knows only with Apex's or other Adams."""
        model = self.model.sharded_state_dict()
        if self.distributed:
            return {"model": model}
        return {"model": model, "optimizer": self.optimizer.sharded_state_dict(model, loading)}


def save(_: Groups, case: Case, folder: str, distributed: bool) -> Saved:
    """Train, save, and train on."""
    with mcore_shim.OnTheCpu():
        job = Job(case, distributed)
        job.train(0)
        multiprocessing.current_process().daemon = False  # Megatron writes in processes of its own
        dist_checkpointing.save(job.state(loading=False), folder)
        filesystem_async._results_queue = None  # and keeps one of them, which would live longer than this one
        gc.collect()
        weights = {name: p.detach().clone().numpy() for name, p in job.model.named_parameters()}
        return job.train(STEPS), weights


def load(_: Groups, case: Case, folder: str, distributed: bool, weights: dict[str, Any]) -> tuple[list[float], float]:
    """The losses when others go on, and the largest difference of a weight from the saved ones, where we know these."""
    with mcore_shim.OnTheCpu():
        job = Job(case, distributed)
        for parameter in job.model.parameters():
            parameter.data.fill_(0.5)
        assert not weights or furthest(job.model, weights) > 0.1
        loaded = dist_checkpointing.load(job.state(loading=True), folder)
        job.model.load_state_dict(loaded["model"])
        if not distributed:
            job.optimizer.load_state_dict(loaded["optimizer"])
        away = furthest(job.model, weights) if weights else 0.0
        return job.train(STEPS), away


def furthest(model: Any, weights: dict[str, Any]) -> float:
    """The largest difference of a weight."""
    pairs = [(p, part_of(p, torch.from_numpy(weights[name]))) for name, p in model.named_parameters()]
    return max((mine - whole).abs().max().item() for mine, whole in pairs)
