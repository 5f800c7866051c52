"""Runs under DeepSpeed that are saved, cut off, and go on, perhaps at another size; for worker processes.

Training itself, and the one process that all is compared with, are those of `ds_cases`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from ds_cases import ACCUMULATION, SMALL, VOCAB, Run, engine_of, model, quietly_import_deepspeed, train_steps

from seqpar_ring import SequenceParallel


def resumed(sp: SequenceParallel, folder: str, before: Run, after: Run) -> list[float]:
    """Losses of training with one set-up, a checkpoint, and going on from it with another until `after.steps`."""
    first = engine_of(sp, before)
    losses = train_steps(first, range(before.steps))
    first.save_checkpoint(folder)
    first.destroy()
    second = engine_of(sp, after)
    second.load_checkpoint(folder)
    losses += train_steps(second, range(before.steps, after.steps))
    second.destroy()
    return losses


def saved_after(sp: SequenceParallel, folder: str, run: Run, cut_off: bool = False) -> list[float]:
    """Losses of `run.steps` steps and a checkpoint; then, if so asked, of another step whose save is cut off."""
    engine = engine_of(sp, run)
    from seqpar_ring.integrations import deepspeed_checkpoints as checkpoints

    losses = train_steps(engine, range(run.steps))
    checkpoints.save(engine, folder, client_state={"rows seen": 7})
    if cut_off:
        train_steps(engine, range(run.steps, run.steps + 1))
        written = torch.save

        def dying(thing: Any, where: Any, *args: Any, **kwargs: Any) -> None:
            if "optim_states" in str(where):
                raise OSError("no space left on device")
            written(thing, where, *args, **kwargs)

        torch.save = dying
        try:
            checkpoints.save(engine, folder)
        except OSError:
            pass
        finally:
            torch.save = written
    engine.destroy()
    return losses


def saved_under(sp: SequenceParallel, folder: str, run: Run, tags: tuple[str, ...], by_engine: bool = False) -> None:
    """After `run.steps` steps, checkpoints under these tags; if so asked by DeepSpeed's own method."""
    engine = engine_of(sp, run)
    from seqpar_ring.integrations import deepspeed_checkpoints as checkpoints

    train_steps(engine, range(run.steps))
    for tag in tags:
        engine.save_checkpoint(folder, tag=tag) if by_engine else checkpoints.save(engine, folder, tag)
    engine.destroy()


def gone_on(
    sp: SequenceParallel, folder: str, run: Run, first: int, tag: str | None = None
) -> tuple[list[float], dict[str, Any]]:
    """Losses from step `first` on, after loading the checkpoint; and what was saved with it."""
    engine = engine_of(sp, run)
    from seqpar_ring.integrations import deepspeed_checkpoints as checkpoints

    state = checkpoints.load(engine, folder, tag)
    losses = train_steps(engine, range(first, run.steps))
    engine.destroy()
    return losses, state


def not_loaded(sp: SequenceParallel, folder: str, run: Run, what: str) -> str:
    """The message with which a checkpoint is refused."""
    from seqpar_ring.errors import SeqparError

    engine = engine_of(sp, replace(run, stage=3) if what == "stage" else run)
    from seqpar_ring.integrations import deepspeed_checkpoints as checkpoints

    try:
        if what == "vocabulary":
            engine.module.config.vocab_size = VOCAB + 3
        if what == "width":
            wide = torch.nn.Linear(5, 7)
            wide.weight.ds_shape = wide.weight.shape
            engine.module.model.layers[0].mlp.gate_proj = wide
        if what == "overwritten":
            checkpoints.save(engine, folder, tag=checkpoints._latest(folder))
        elif what == "no sequence group":
            checkpoints.load(object(), folder)
        else:
            checkpoints.load(engine, folder, tag="global_step99" if what == "tag" else None)
    except SeqparError as error:
        return str(error)
    finally:
        engine.destroy()
    return "not refused"


def of_many_kinds(
    sp: SequenceParallel, folder: str, stage: int, first: int, load: bool
) -> tuple[list[float], list[Any]]:
    """Losses of steps `first` to 5 of a model with a frozen parameter and a buffer, under an optimizer with two groups;
    saved after step 2, or loaded there into one with other weights. Then what the buffer and the groups are."""
    quietly_import_deepspeed(sp)
    from seqpar_ring.integrations import deepspeed as integration
    from seqpar_ring.integrations import deepspeed_checkpoints as checkpoints

    made = model()
    made.model.embed_tokens.weight.requires_grad_(False)
    made.register_buffer("seen", torch.full((3,), 7.0 * (not load)))
    if load:
        with torch.no_grad():
            made.model.embed_tokens.weight.zero_()
    trained = [p for p in made.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.5, "lr": 1e-2},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0, "lr": 1e-3},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ACCUMULATION,
        "zero_optimization": {"stage": stage, **SMALL},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "seqpar_ring": {"size": sp.size},
    }
    engine = integration.initialize(model=made, optimizer=torch.optim.AdamW(groups), config=config)[0]
    if load:
        checkpoints.load(engine, folder)
    losses = train_steps(engine, range(first, 2))
    if not load:
        checkpoints.save(engine, folder)
    losses += train_steps(engine, range(2, 5))
    said = [[(group["weight_decay"], group["lr"]) for group in engine.optimizer.param_groups], made.seen.tolist()]
    engine.destroy()
    return losses, said
