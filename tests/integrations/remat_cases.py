"""One training step under DeepSpeed with activation checkpointing, and how often the ring ran; for worker processes."""

from __future__ import annotations

from functools import partial
from typing import Any

import ds_cases
import torch
from torch import Tensor

from seqpar_ring import SequenceParallel, executor, remat, ring_attention


def step(sp: SequenceParallel, stage: int, mode: str) -> tuple[list[float], int]:
    """Losses of two optimizer steps (the second depends on the first's gradients), and forward runs of the ring."""
    ds_cases.quietly_import_deepspeed(sp)
    from seqpar_ring.integrations.deepspeed import initialize

    model = ds_cases.model()
    if mode != "none":
        model.activation_checkpointing_enable({"use_reentrant": "reentrant" in mode})
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ds_cases.ACCUMULATION,
        "zero_optimization": {"stage": stage, **ds_cases.SMALL},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "seqpar_ring": {"size": sp.world_size, "remat": "attention" if "kept" in mode else "none"},
    }
    optimizer = ds_cases.optimizer_of("sgd", model.parameters())
    engine = initialize(model=model, optimizer=optimizer, config=config)[0]
    forward, runs, losses = executor.forward, [], []

    def counting(*args: Any) -> Any:
        runs.append(1)
        return forward(*args)

    executor.forward = counting
    try:
        for number in range(2):
            for batch in ds_cases.micro_batches(number, engine.seqpar_ring):
                loss = engine(**batch).loss
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
    finally:
        executor.forward = forward
        engine.destroy()
    return losses, len(runs)


def partitioned(sp: SequenceParallel, partition: bool, keep: bool) -> tuple[list[Tensor], int]:
    """Gradients through layers under DeepSpeed's own checkpointing, with its inputs flattened as for a split over the
    hidden mpu's one model-parallel rank, or without any; and forward runs of the ring."""
    deepspeed = ds_cases.quietly_import_deepspeed(sp)
    from seqpar_ring.integrations.deepspeed import _start_torch_distributed
    from seqpar_ring.integrations.deepspeed_mpu import HiddenSequenceGroup, WholeModel

    _start_torch_distributed({})
    deepspeed.checkpointing.configure(HiddenSequenceGroup(sp, WholeModel()), partition_activations=True)
    plan, generator = sp.plan([13, 6]), torch.Generator().manual_seed(0)
    weights = [torch.randn(8, 24, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]
    h = plan.shard(torch.randn(1, 19, 8, dtype=torch.float64, generator=generator)).requires_grad_()
    h = h * 1  # DeepSpeed replaces the data of what it splits, which a leaf does not survive

    def layer(weight: Tensor, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)) for part in (x @ weight).chunk(3, -1))
        out = ring_attention(q, k, v, plan)
        assert isinstance(out, Tensor)
        return x + out.flatten(2)

    forward, ran = executor.forward, []
    executor.forward = lambda *args: ran.append(1) or forward(*args)  # type: ignore[func-returns-value]
    try:
        for weight in weights:
            one = partial(layer, weight)  # weights are no activations: only h is an argument
            how = remat.keeping(one) if keep else one
            h = deepspeed.checkpointing.checkpoint(how, h) if partition else one(h)
        h.square().sum().backward()
    finally:
        executor.forward = forward
        deepspeed.checkpointing.configure(None, partition_activations=False)
    return [sp.groups.ring.all_reduce(w.grad) for w in weights], len(ran)


def refused(sp: SequenceParallel) -> str:
    """What is said of cpu_checkpointing on a CPU."""
    ds_cases.quietly_import_deepspeed(sp)
    from seqpar_ring.integrations.deepspeed import initialize

    from seqpar_ring.errors import UnsupportedError

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "activation_checkpointing": {"cpu_checkpointing": True},
        "seqpar_ring": {"size": sp.world_size},
    }
    try:
        initialize(model=ds_cases.model(), config=config)
    except UnsupportedError as error:
        return str(error)
    return "not refused"
