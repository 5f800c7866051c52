"""Training runs for the Trainer tests: one process of plain PyTorch, and ranks under Trainer or SFTTrainer.

The one-process side knows nothing of this package, of Trainer or of accelerate: transformers' sdpa, each document alone,
targets counted by hand. Worker processes import these functions by name.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import hf_cases
import torch
from torch import Tensor, nn

from seqpar_ring import SequenceParallel, executor

STEPS = 20
ROWS = 8  # rows of data, taken in order, again and again
TOKENS = 41


@dataclass(frozen=True)
class Run:
    """One set-up of Trainer."""

    size: int
    kind: str = "packed"  # "packed", "padded", or "masked": one document a row, most of it without targets
    steps: int = STEPS
    rows: int = 1  # a micro-batch, on each data rank
    accumulation: int = 2
    optimizer: str = "adamw_torch"
    checkpointing: bool = False
    lora: bool = False
    deepspeed: int | None = None  # ZeRO stage
    fault: str = ""
    settings: tuple[tuple[str, Any], ...] = ()


def rows(kind: str) -> list[dict[str, Tensor]]:
    """Samples, each (tokens,): documents packed, padded, or masked."""
    out = []
    for index in range(ROWS):
        if kind == "packed":
            batch = hf_cases.packed([7 + index, 1, TOKENS - 8 - index], seed=index)
        elif kind == "padded":
            batch = hf_cases.padded([TOKENS - 3 * index], TOKENS)
            batch["input_ids"] = (batch["input_ids"] + index) % hf_cases.VOCAB * batch["attention_mask"]
        else:
            batch = hf_cases.packed([TOKENS], seed=index)
            batch["labels"][:, : 5 + 4 * index] = -100
        out.append({key: value[0] for key, value in batch.items()})
    return out


def model(run: Run) -> Any:
    made = hf_cases.build("Llama", num_hidden_layers=2)
    return lora(made) if run.lora else made


def lora(made: nn.Module) -> Any:
    """LoRA on attention and MLP, its matrices such that gradients of both are far from zero."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        wrapped = get_peft_model(made, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.data.normal_(std=0.2)
    return wrapped


def optimizer_of(name: str, parameters: Any) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.05)
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)


def one_process(run: Run, data_ranks: int) -> list[float]:
    """The loss of every optimizer step: the mean over the targets of all its rows, each document alone."""
    made, data = model(run), rows(run.kind)
    optimizer = optimizer_of(run.optimizer, [p for p in made.parameters() if p.requires_grad])
    a_step, losses = run.rows * run.accumulation * data_ranks, []
    for step in range(run.steps):
        total, count = torch.zeros(()), 0
        for i in range(step * a_step, (step + 1) * a_step):
            one, n = summed(made, {key: value[None] for key, value in data[i % ROWS].items()})
            total, count = total + one, count + n
        loss = total / count
        loss.backward()
        nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def summed(made: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Cross entropy summed over the targets of a row, each document alone, and their number."""
    total, count = torch.zeros(()), 0
    for piece in hf_cases.documents(batch):
        labels = piece.pop("labels")[:, 1:]
        logits = made(**piece, use_cache=False).logits[:, :-1].float()
        total = total + nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        count += int((labels != -100).sum())
    return total, count


@contextmanager
def as_torchrun(sp: SequenceParallel) -> Iterator[None]:
    """What torchrun would have set, and no state of accelerate from a run before."""
    rank, world = str(sp.groups.global_rank), str(sp.world_size)
    os.environ.update(LOCAL_RANK=rank, RANK=rank, WORLD_SIZE=world, DS_ACCELERATOR="cpu", ACCELERATE_USE_CPU="true")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # the group exists already
    warnings.simplefilter("ignore")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(True)


def arguments(run: Run, folder: str, **others: Any) -> dict[str, Any]:
    """Of TrainingArguments."""
    given = {
        **{"output_dir": folder, "max_steps": run.steps, "per_device_train_batch_size": run.rows},
        **{"gradient_accumulation_steps": run.accumulation, "max_grad_norm": 1.0, "weight_decay": 0.0},
        **{"learning_rate": 0.05 if run.optimizer == "sgd" else 3e-3, "lr_scheduler_type": "constant"},
        **{"optim": run.optimizer, "train_sampling_strategy": "sequential", "logging_steps": 1, "report_to": []},
        **{"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False},
        **{"gradient_checkpointing": run.checkpointing, "per_device_eval_batch_size": run.rows},
    }
    if run.deepspeed is not None:
        given["deepspeed"] = deepspeed_config(run)
    return {**given, **others}


def deepspeed_config(run: Run) -> dict[str, Any]:
    from ds_cases import SMALL

    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {
        **dict.fromkeys(sizes, "auto"),
        "zero_optimization": {"stage": run.deepspeed, **SMALL},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "seqpar_ring": {"size": run.size, **dict(run.settings)},
    }


def trainer_of(run: Run, folder: str, made: Any = None, **others: Any) -> Any:
    from seqpar_ring.integrations.trainer import ring
    from transformers import Trainer, TrainingArguments, default_data_collator

    settings = {} if run.deepspeed is not None else {"size": run.size, **dict(run.settings)}
    names = ("train_dataset", "eval_dataset")
    data = {name: others.pop(name, rows(run.kind)) for name in names}
    return ring(Trainer, **settings)(
        model=model(run) if made is None else made,
        args=TrainingArguments(**arguments(run, folder, **others)),
        data_collator=default_data_collator,
        **data,
    )


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train(sp: SequenceParallel, run: Run, folder: str) -> tuple[list[float], float, int]:
    """Losses of the steps, the evaluation loss after them, and forward runs of the ring in training."""
    with as_torchrun(sp):
        trainer = trainer_of(run, folder)
        forward, ran = executor.forward, []
        executor.forward = lambda *args: ran.append(1) or forward(*args)  # type: ignore[func-returns-value]
        try:
            trainer.train()
        finally:
            executor.forward = forward
        return losses_of(trainer), trainer.evaluate()["eval_loss"], len(ran)
