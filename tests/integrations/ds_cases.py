"""Training runs for the DeepSpeed tests: one process of plain PyTorch, and ranks under DeepSpeed with the block.

The one-process side knows nothing of this package or of DeepSpeed: transformers' sdpa, each document alone, targets
counted by hand. It has a batch of as many rows as there are data ranks at most; fewer data ranks train on the rows
packed into one, so that every set-up sees the same tokens. Worker processes import these functions by name, and only
they import DeepSpeed.
"""

from __future__ import annotations

import copy
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from seqpar_ring import SequenceParallel
from seqpar_ring.batch import IGNORED

LENGTHS = (23, 1, 30, 11)
ROWS = 2
ACCUMULATION = 2
PERIOD = 4  # steps after which the same data comes again, so that there is something to learn
VOCAB = 97
# DeepSpeed leaves weights below a threshold whole: with 0 even tiny ones are sharded in ZeRO 3. And by default it makes
# gigabytes of buffers for each engine, which the tests' deterministic mode fills with NaN, for seconds.
SMALL = {
    "stage3_param_persistence_threshold": 0,
    "reduce_bucket_size": 10_000,
    "allgather_bucket_size": 10_000,
    "stage3_prefetch_bucket_size": 1_000,
}


@dataclass(frozen=True)
class Run:
    """One set-up: ZeRO stage, ranks of a sequence, optimizer, optimizer steps, dtype, and how targets are weighed.

    Of the first step the gradients are kept; with the optimizer "still", which changes nothing, those of every step.
    """

    stage: int
    size: int
    optimizer: str = "sgd"
    steps: int = 20
    bf16: bool = False
    weigh_step: str = ""  # how a token mean over the whole optimizer step is asked for; else over each micro-batch
    clip: float = 1.3  # some steps are clipped, others not
    zero_init: bool = False  # the model is made in shards, under deepspeed.zero.Init
    kind: str = "packed"  # or "padded", "masked": one document a row, of which most has no targets
    layout: str = "zigzag"
    fault: str = ""


def model() -> Any:
    """A small Llama, the same each time, with attention that is far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = LlamaForCausalLM(LlamaConfig(**shape, **heads))
        for p in made.parameters():
            p.data.add_(torch.randn_like(p), alpha=0.1)
    return made.train()


def optimizer_of(name: str, parameters: Any) -> torch.optim.Optimizer:
    if name == "still":
        return torch.optim.SGD(parameters, lr=0.0)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.3)
    if name == "amsgrad":
        return torch.optim.AdamW(parameters, lr=3e-3, amsgrad=True)
    return torch.optim.AdamW(parameters, lr=3e-3)


def row(step: int, micro: int, index: int, kind: str = "packed") -> dict[str, Tensor]:
    """One row, (1, 65): the masked prompt differs in length, so that rows hold unequal numbers of targets."""
    generator = torch.Generator().manual_seed(1000 * (step % PERIOD) + 10 * micro + index)
    ids = torch.randint(0, VOCAB, (1, sum(LENGTHS)), generator=generator)
    labels = ids.clone()
    if kind == "padded":
        real = torch.arange(ids.shape[1])[None] < 60 - 17 * index - 9 * micro
        return {"input_ids": ids * real, "labels": labels.masked_fill(~real, IGNORED), "attention_mask": real.long()}
    if kind == "masked":
        labels[:, : 35 + 9 * index + 8 * micro] = IGNORED
        return {"input_ids": ids, "labels": labels}
    labels[:, 4 : 12 + 8 * index + 20 * micro] = IGNORED
    return {"input_ids": ids, "labels": labels, "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]}


def lengths_of(batch: dict[str, Tensor]) -> tuple[int, ...]:
    """Tokens of each document of a row, padding left out."""
    if "position_ids" in batch:
        return LENGTHS
    mask = batch.get("attention_mask")
    return (batch["input_ids"].shape[1] if mask is None else int(mask.sum()),)


def document_sum(made: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Cross entropy summed over the targets of a row, each document alone, and their number."""
    total, targets, at = torch.zeros(()), 0, 0
    for n in lengths_of(batch):
        ids, labels = (batch[key][:, at : at + n] for key in ("input_ids", "labels"))
        at += n
        logits = made(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total = total + functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        targets += int((labels[:, 1:] != IGNORED).sum())
    return total, targets


def one_process(run: Run) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses of every micro-batch, gradient norms of every step, and the gradients that are kept, by name."""
    made = model()
    if run.bf16:
        made = made.bfloat16()
    optimizer = optimizer_of(run.optimizer, made.parameters())
    losses, norms, kept = [], [], []
    for step in range(run.steps):
        micro = [[document_sum(made, row(step, m, i, run.kind)) for i in range(ROWS)] for m in range(ACCUMULATION)]
        counts = [sum(n for _, n in rows) for rows in micro]
        for rows, count in zip(micro, counts, strict=True):
            weight = sum(counts) / ACCUMULATION if run.weigh_step else count
            loss = sum((total for total, _ in rows), torch.zeros(())) / weight
            (loss / ACCUMULATION).backward()
            losses.append(loss.item())
        if step == 0 or run.optimizer == "still":
            kept.append({name: p.grad.float().clone() for name, p in made.named_parameters() if p.grad is not None})
        norms.append(torch.nn.utils.clip_grad_norm_(made.parameters(), run.clip).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, together(kept)


def together(kept: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Gradients of one step as they are, of several as rows of one tensor."""
    return kept[0] if len(kept) == 1 else {name: torch.stack([grads[name] for grads in kept]) for name in kept[0]}


def micro_batches(step: int, sp: SequenceParallel, kind: str = "packed") -> list[dict[str, Tensor]]:
    """This rank's whole micro-batches: its own row where there are data ranks, else all rows, packed into one or as a
    batch of several."""
    out = []
    for m in range(ACCUMULATION):
        mine = [sp.data_rank] if sp.data_size == ROWS else range(ROWS)
        rows = [row(step, m, i, kind) for i in mine]
        out.append({key: torch.cat([r[key] for r in rows], 1 if kind == "packed" else 0) for key in rows[0]})
    return out


def quietly_import_deepspeed(sp: SequenceParallel) -> Any:
    """DeepSpeed in a worker: what torchrun would have set, no state of an engine before, no warnings of its own."""
    rank, world = str(sp.groups.global_rank), str(sp.world_size)
    os.environ.update(LOCAL_RANK=rank, RANK=rank, WORLD_SIZE=world, DS_ACCELERATOR="cpu")
    warnings.simplefilter("ignore")
    import deepspeed
    import transformers  # noqa: F401 - a model of it is made next
    from deepspeed.utils import groups, logger

    logger.setLevel("ERROR")
    groups.mpu = groups.mesh_device = None
    return deepspeed


def engine_of(sp: SequenceParallel, run: Run) -> Any:
    quietly_import_deepspeed(sp)
    from seqpar_ring.integrations import deepspeed as integration

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": run.clip,
        "zero_optimization": {"stage": run.stage, **SMALL},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": run.bf16},
        "seqpar_ring": {"size": run.size, "layout": run.layout},
    }
    made = sharded_model(config) if run.zero_init else model()
    hidden = integration.HiddenSequenceGroup
    if run.fault == "declared sequence group":
        integration.HiddenSequenceGroup = declared(hidden)
    try:
        engine = integration.initialize(
            model=made, optimizer=optimizer_of(run.optimizer, made.parameters()), config=config
        )[0]
    finally:
        integration.HiddenSequenceGroup = hidden
    as_asked(engine, run.stage, run.bf16)
    return engine


def as_asked(engine: Any, stage: int, bf16: bool = False) -> None:
    """That an engine does what the test has asked for: results would be right without it, too."""
    assert engine.zero_optimization_stage() == stage
    assert engine.bfloat16_enabled() == bf16
    parameters = list(engine.module.parameters())
    assert all(hasattr(p, "ds_id") and not p.ds_persist for p in parameters) == (stage == 3)


def sharded_model(config: dict[str, Any]) -> Any:
    """`model()`, but sharded over the ranks from the moment each weight is made."""
    import deepspeed

    whole = model()
    with deepspeed.zero.Init(config_dict_or_path=config):
        made = type(whole)(copy.deepcopy(whole.config))
    for mine, its in zip(made.parameters(), whole.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([mine], modifier_rank=0):
            mine.data.copy_(its)
    return made.train()


def declared(hidden: type) -> type:
    """The mistake that hiding avoids: an mpu that tells DeepSpeed of the sequence group."""

    class Declared(hidden):
        def get_sequence_parallel_world_size(self) -> int:
            return int(self._sp.size)

        def get_sequence_parallel_rank(self) -> int:
            return int(self._sp.rank)

        def get_sequence_parallel_group(self) -> Any:
            return self._sp.groups.mesh.get_group("ring")

    return Declared


def train(sp: SequenceParallel, run: Run) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """The same as `one_process` returns, on every rank, trained by DeepSpeed over sequence groups of `run.size`."""
    from deepspeed.utils import safe_get_full_grad

    engine = engine_of(sp, run)
    ring: SequenceParallel = engine.seqpar_ring
    losses, norms, kept = [], [], []
    for step in range(run.steps):
        batches = micro_batches(step, ring, run.kind)
        items = ring.count_targets(batches) if run.weigh_step else None
        for m, batch in enumerate(batches):
            loss = step_loss(engine, ring, batch, items, run)
            engine.backward(loss)
            losses.append(loss.item())
            if m == ACCUMULATION - 1:
                get = safe_get_full_grad if run.stage else lambda p: p.grad
                if step == 0 or run.optimizer == "still":
                    kept.append({n: get(p).float().clone() for n, p in engine.module.named_parameters()})
                by_hand = total_norm(engine.module) if run.stage == 0 else 0.0
            engine.step()
        norm = engine.get_global_grad_norm()
        norms.append(by_hand if norm is None else float(norm))
    engine.destroy()
    return losses, norms, together(kept)


def step_loss(engine: Any, sp: SequenceParallel, batch: dict[str, Tensor], items: int | None, run: Run) -> Tensor:
    """The loss of one micro-batch."""
    if run.fault == "mean of means":  # what each rank's own mean, averaged by the engine, comes to
        part = sp.shard_batch(batch)
        labels = part.pop("labels")
        part.pop("shift_labels")
        logits = engine(**part).logits.float()
        sums = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return sums / (labels != IGNORED).sum().clamp(min=1)
    if items is None:
        return engine(**batch).loss
    if run.weigh_step == "num_items_in_batch":
        return engine(**batch, num_items_in_batch=items).loss * ACCUMULATION
    part = sp.shard_batch(batch)
    labels, plan = part.pop("labels"), part["seqpar_plan"]
    part.pop("shift_labels")
    return sp.loss(engine(**part).logits, labels, plan, num_items=items, accumulation=ACCUMULATION)


def total_norm(module: torch.nn.Module) -> float:
    return torch.stack([p.grad.float().norm() for p in module.parameters() if p.grad is not None]).norm().item()


def train_steps(engine: Any, steps: range) -> list[float]:
    """Losses of every micro-batch of these steps."""
    losses = []
    for step in steps:
        for batch in micro_batches(step, engine.seqpar_ring):
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def two_engines(sp: SequenceParallel, run: Run) -> tuple[list[float], int, int]:
    """Losses with the block, while one without it is made and trained in between; and the batch sizes of both."""
    engine = engine_of(sp, run)
    from seqpar_ring.integrations.deepspeed import initialize

    losses = train_steps(engine, range(1))
    plain, config = model(), {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
    other = initialize(None, plain, optimizer_of("sgd", plain.parameters()), config=config)[0]
    other.backward(other(**row(0, 0, 0)).loss)
    other.step()
    losses += train_steps(engine, range(1, run.steps))
    return losses, engine.train_batch_size(), other.train_batch_size()
