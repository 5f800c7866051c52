"""One training step under DeepSpeed with activation checkpointing, and how often the ring ran; for worker processes."""

from __future__ import annotations

from typing import Any

import ds_cases

from seqpar_ring import SequenceParallel, executor


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
