"""Trainers that are refused, or a step of theirs, and what is said; for worker processes."""

from __future__ import annotations

from typing import Any

import hf_cases
import torch
from torch import nn
from trainer_cases import Run, Stream, arguments, as_torchrun, model, rows, trainer_of
from transformers import Trainer

from seqpar_ring import SequenceParallel


class Given(Trainer):  # type: ignore[misc]
    """A subclass that takes what comes, and gives more."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, compute_loss_func=lambda *_: 0, **kwargs)


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
            if what == "predict":
                trainer.predict(rows(run.kind))
            if what == "unequal evaluations":
                trainer.evaluate()
            trainer.train()
        except SeqparError as error:
            return f"{type(error).__name__}: {error}"
    return "not refused"


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
