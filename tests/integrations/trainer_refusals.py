"""Trainers that are refused, or a step of theirs, and what is said; for worker processes."""

from __future__ import annotations

import os
from typing import Any

import hf_cases
import torch
from torch import nn
from trainer_cases import Run, Stream, arguments, as_torchrun, model, rows, trainer_of
from transformers import Trainer, TrainerCallback

from seqpar_ring import SequenceParallel


class Given(Trainer):  # type: ignore[misc]
    """A subclass that takes what comes, and gives more."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, compute_loss_func=lambda *_: 0, **kwargs)


class SaysItIsNotScaled(Trainer):  # type: ignore[misc]
    """As a base class of somebody's own may, or one made for another loss."""

    loss_is_scaled_for_ga = False


class Unfreezes(TrainerCallback):  # type: ignore[misc]
    """Trains the first layers from the second step on."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            for parameter in kwargs["model"].parameters():
                parameter.requires_grad_(True)


NONE = torch.zeros(0, dtype=torch.long)


def refused(sp: SequenceParallel, run: Run, folder: str, what: str) -> str:
    """The message with which a Trainer is refused, or a step of it."""
    from accelerate import ParallelismConfig
    from seqpar_ring.integrations.trainer import ring
    from transformers import TrainingArguments, default_data_collator

    from seqpar_ring.errors import SeqparError

    with as_torchrun(sp):
        arguments_of = arguments(run, folder)
        keywords: dict[str, Any] = {"train_dataset": rows(run.kind), "data_collator": default_data_collator}
        made, settings = model(run), {"size": run.size}
        if what == "metrics":
            keywords["compute_metrics"] = lambda _: {}
        elif what == "loss function":
            keywords["compute_loss_func"] = lambda *_: 0
        elif what == "smoothing":
            arguments_of["label_smoothing_factor"] = 0.1
        elif what == "noise":
            arguments_of["neftune_noise_alpha"] = 5.0
        elif what == "dispatch":
            arguments_of["accelerator_config"] = {"dispatch_batches": True}
        elif what == "unequal evaluations":
            keywords["eval_dataset"] = Stream(rows(run.kind), 4 + sp.groups.global_rank // run.size)
        elif what == "unequal batches":
            arguments_of["accelerator_config"] = {"even_batches": False}
        elif what == "rebalance":
            arguments_of["train_sampling_strategy"] = "batch_rebalance"
        elif what == "one rank's rows are empty":
            other = sp.groups.global_rank // run.size
            keywords["train_dataset"] = Stream([{"input_ids": NONE, "labels": NONE}] if other else rows(run.kind), 4)
        elif what == "unequal streams":
            keywords["train_dataset"] = Stream(rows(run.kind), 4 + sp.groups.global_rank // run.size)
        elif what == "other rows":
            keywords["train_dataset"] = Stream(rows(run.kind)[sp.groups.global_rank :], 4)
        elif what == "empty rows":
            keywords["train_dataset"] = [{"input_ids": NONE, "labels": NONE}] * 4
        elif what == "all masked":
            for row in keywords["train_dataset"]:
                row["labels"][:] = -100
        elif what == "size not dividing":
            settings = {"size": 3}
        elif what == "no size":
            settings = {}
        elif what == "accelerate launch --cpu":
            arguments_of["deepspeed"] = {"zero_optimization": {"stage": 1}, "seqpar_ring": {"size": 2}}
            os.environ["ACCELERATE_USE_CPU"] = "true"
            settings = {}
        elif what == "open size":
            arguments_of["deepspeed"] = {"zero_optimization": {"stage": 1}, "seqpar_ring": {"size": "auto"}}
        elif what == "unfrozen":
            for parameter in made.model.layers[0].parameters():
                parameter.requires_grad_(False)
            keywords["callbacks"] = [Unfreezes()]
        elif what == "wrapped":
            made = nn.Sequential(made)
        elif what == "prompt tuning":
            from peft import PromptTuningConfig, get_peft_model

            made = get_peft_model(made, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
        elif what == "dropout in LoRA":
            from peft import LoraConfig, get_peft_model

            made = get_peft_model(made, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))
        try:
            training = TrainingArguments(**arguments_of)
            if what in ("cp_size", "sp_size"):
                training.parallelism_config = ParallelismConfig(**{what: 2})
            kind = Given if what == "subclass" else Trainer
            trainer = ring(kind, **settings)(model=made, args=training, **keywords)
            if what == "loss function, later":
                trainer.compute_loss_func = lambda *_: 0
            if what == "smoothing, later":
                trainer.args.label_smoothing_factor = 0.5
            if what == "predict":
                trainer.predict(rows(run.kind))
            if what == "unequal evaluations":
                trainer.evaluate()
            trainer.train()
        except SeqparError as error:
            return f"{type(error).__name__}: {error}"
    return "not refused"


def losses(sp: SequenceParallel, run: Run, folder: str, kind: type) -> list[tuple[float, float | None]]:
    """Loss and norm of the gradient, where it is told, in each step of a Trainer class."""
    from seqpar_ring.integrations.trainer import ring
    from transformers import TrainingArguments, default_data_collator

    with as_torchrun(sp, run):
        training = TrainingArguments(**arguments(run, folder, max_grad_norm=1e9))
        given = {"train_dataset": rows(run.kind), "data_collator": default_data_collator}
        trainer = ring(kind, size=run.size)(model=model(run), args=training, **given)
        trainer.train()
    return [(entry["loss"], entry.get("grad_norm")) for entry in trainer.state.log_history if "loss" in entry]


def another_vocabulary(sp: SequenceParallel, run: Run, folder: str) -> str:
    """What is said where a checkpoint of Trainer's is to go on with a model of more words."""
    with as_torchrun(sp):
        trainer_of(run, folder, save_strategy="steps", save_steps=run.steps).train()
    with as_torchrun(sp):
        other = trainer_of(run, folder, made=hf_cases.build("Llama", num_hidden_layers=2, vocab_size=100))
        try:
            other.train(resume_from_checkpoint=f"{folder}/checkpoint-{run.steps}")
        except RuntimeError as error:
            return str(error)
    return "not refused"
