"""Training runs for the Trainer tests: one process of plain PyTorch, and ranks under Trainer or SFTTrainer.

The one-process side knows nothing of this package, of Trainer or of accelerate: transformers' sdpa, each document
alone, targets counted by hand. Worker processes import these functions by name.
"""

from __future__ import annotations

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

NONE = torch.zeros(0, dtype=torch.long)


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
    offload: bool = False  # of optimizer states, and in stage 3 of parameters
    bf16: bool = False
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
        "bf16": run.bf16,
    }
    if run.deepspeed is not None:
        given["deepspeed"] = deepspeed_config(run)
    return {**given, **others}


def deepspeed_config(run: Run) -> dict[str, Any]:
    from ds_cases import SMALL

    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    to_cpu: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}} if run.offload else {}
    if run.offload and run.deepspeed == 3:
        to_cpu["offload_param"] = {"device": "cpu"}
    # torch's own AdamW, since DeepSpeed's for the CPU would have to be compiled
    parameters = {"lr": 3e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "torch_adam": True}
    return {
        **dict.fromkeys(sizes, "auto"),
        **({"optimizer": {"type": "AdamW", "params": parameters}} if run.offload else {}),
        "zero_optimization": {"stage": run.deepspeed, **SMALL, **to_cpu},
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


def eval_loss(run: Run, batch_rows: int) -> float:
    """Of the model as it is made: the mean of batches' means, each batch counted by its rows, as Trainer has it."""
    made, data, total = model(run), rows(run.kind), 0.0
    for first in range(0, ROWS, batch_rows):
        batch = data[first : first + batch_rows]
        with torch.no_grad():
            parts = [summed(made, {key: value[None] for key, value in one.items()}) for one in batch]
        total += len(batch) * float(sum(loss for loss, _ in parts)) / sum(count for _, count in parts)
    return total / ROWS


def evaluate(sp: SequenceParallel, run: Run, folder: str) -> float:
    """Trainer's evaluation loss of the model as it is made."""
    with as_torchrun(sp):
        return float(trainer_of(run, folder).evaluate()["eval_loss"])


def train_after_evaluation(sp: SequenceParallel, run: Run, folder: str) -> list[float] | str:
    """Losses of training after an evaluation; with the fault, the message where accelerate's mark stays."""
    from seqpar_ring.integrations import trainer as integration

    from seqpar_ring.errors import UnsupportedError

    with as_torchrun(sp):
        trainer = trainer_of(run, folder)
        trainer.evaluate()
        mark = integration.PREPARED
        integration.PREPARED = "another name" if run.fault else mark
        try:
            trainer.train()
        except UnsupportedError as error:
            return str(error)
        finally:
            integration.PREPARED = mark
        return losses_of(trainer)


def resume(sp: SequenceParallel, before: Run, after: Run, folder: str, at: int) -> list[float]:
    """Losses of a run that saves a checkpoint and of another that goes on from it, both as long as the second."""
    with as_torchrun(sp):
        first = trainer_of(before, folder, save_strategy="steps", save_steps=at)
        first.train()
        found = losses_of(first)[:at]
    with as_torchrun(sp):
        second = trainer_of(after, folder)
        second.train(resume_from_checkpoint=f"{folder}/checkpoint-{at}")
        return found + losses_of(second)[at:]


def refused(sp: SequenceParallel, run: Run, folder: str, what: str) -> str:
    """The message with which a Trainer is refused, or a step of it."""
    from accelerate import ParallelismConfig
    from seqpar_ring.integrations.trainer import ring
    from transformers import Trainer, TrainingArguments, default_data_collator

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
        elif what == "rebalance":
            arguments_of["train_sampling_strategy"] = "batch_rebalance"
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
            if what == "cp_size":
                training.parallelism_config = ParallelismConfig(cp_size=2)
            trainer = ring(Trainer, **settings)(model=made, args=training, **keywords)
            if what == "predict":
                trainer.predict(rows(run.kind))
            trainer.train()
        except SeqparError as error:
            return f"{type(error).__name__}: {error}"
    return "not refused"


class Stream(torch.utils.data.IterableDataset[Any]):
    """So many rows, one after the other."""

    def __init__(self, data: list[Any], count: int) -> None:
        self.data, self.count = data, count

    def __iter__(self) -> Iterator[Any]:
        return iter([self.data[i % len(self.data)] for i in range(self.count)])


def stream(sp: SequenceParallel, run: Run, folder: str) -> list[float]:
    """Losses of training on a stream: the ranks of a group read the same rows of it."""
    with as_torchrun(sp):
        trainer = trainer_of(run, folder, train_dataset=Stream(rows(run.kind), 100))
        trainer.train()
        return losses_of(trainer)


def by_length(sp: SequenceParallel, run: Run, folder: str) -> int:
    """Steps done with samples grouped by length, at random: the ranks of a group draw the same, or it is refused."""
    with as_torchrun(sp):
        trainer = trainer_of(run, folder, train_sampling_strategy="group_by_length")
        trainer.train()
        return int(trainer.state.global_step)


def plain_loop(sp: SequenceParallel, run: Run) -> list[float]:
    """Losses of a loop of one's own with accelerate: its DDP, its backward, our data loader."""
    with as_torchrun(sp):
        from accelerate import Accelerator
        from seqpar_ring.integrations.trainer import data_loader
        from seqpar_ring.integrations.transformers import parallelize

        accelerator = Accelerator(cpu=True)
        own = SequenceParallel.over(sp.groups, sp.settings)
        made = parallelize(model(run), own)
        made, optimizer = accelerator.prepare(made, optimizer_of(run.optimizer, made.parameters()))
        loader = data_loader(torch.utils.data.DataLoader(rows(run.kind), batch_size=run.rows), own)  # type: ignore[arg-type]
        losses = []
        batches = [batch for _ in range(run.steps) for batch in loader][: run.steps]
        for batch in batches:
            loss = made(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(made.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses


def words() -> Any:
    """A tokenizer of as many words as the model has: w0, w1, .."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(hf_cases.VOCAB)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="w2", pad_token="w3")


def texts(prompts: bool) -> list[dict[str, str]]:
    """Documents of unequal length, as text, or as prompt and completion, of which the completion alone is learnt."""
    generator = torch.Generator().manual_seed(2)
    lengths = [9, 31, 4, 17, 24, 6, 28, 12, 20, 3, 33, 15, 8, 27, 5, 19]
    draw = [torch.randint(4, hf_cases.VOCAB, (n,), generator=generator).tolist() for n in lengths]
    words_of = [[f"w{i}" for i in ids] for ids in draw]
    if prompts:
        return [{"prompt": " ".join(some[:2]) + " ", "completion": " ".join(some[2:])} for some in words_of]
    return [{"text": " ".join(some)} for some in words_of]


def sft(
    sp: SequenceParallel, run: Run, folder: str, packing: bool, prompts: bool = False
) -> tuple[list[float], float, list[Any], int]:
    """SFTTrainer: losses, the evaluation loss before training, the batches it made, and ring forwards in training."""
    with as_torchrun(sp):
        from datasets import Dataset
        from seqpar_ring.integrations.trainer import ring
        from trl import SFTConfig, SFTTrainer

        others = {"packing": packing, "max_length": 64, "dataset_num_proc": None, "bf16": False}
        trainer = ring(SFTTrainer, size=run.size, **dict(run.settings))(
            model=model(run),
            args=SFTConfig(**arguments(run, folder, **others, remove_unused_columns=True)),
            processing_class=words(),
            train_dataset=Dataset.from_list(texts(prompts)),
            eval_dataset=Dataset.from_list(texts(prompts)),
        )
        before = float(trainer.evaluate()["eval_loss"])
        seen, forward, ran = [], executor.forward, []
        trainer.model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append({**kwargs}), with_kwargs=True, prepend=True
        )
        executor.forward = lambda *args: ran.append(1) or forward(*args)  # type: ignore[func-returns-value]
        try:
            trainer.train()
        finally:
            executor.forward = forward
        keys = ("input_ids", "labels", "position_ids", "attention_mask")
        return losses_of(trainer), before, [{k: b[k] for k in keys if k in b} for b in seen], len(ran)


def one_process_on(run: Run, batches: list[Any]) -> list[float]:
    """As `one_process`, on these micro-batches: in packed rows each document alone, counted by its positions."""
    made = model(run)
    optimizer = optimizer_of(run.optimizer, [p for p in made.parameters() if p.requires_grad])
    losses = []
    for first in range(0, len(batches), run.accumulation):
        parts = [summed(made, batch) for batch in batches[first : first + run.accumulation]]
        loss = sum((one for one, _ in parts), torch.zeros(())) / sum(n for _, n in parts)
        loss.backward()
        nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def fully_sharded(sp: SequenceParallel, run: Run) -> tuple[list[float], int]:
    """Losses of a loop with torch's FSDP2, each layer and the whole sharded over all ranks; and ring forwards."""
    from seqpar_ring.integrations.transformers import parallelize
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("ignore")
    made = parallelize(model(run), sp)
    if run.checkpointing:
        made.activation_checkpointing_enable({"use_reentrant": False})
    mesh = torch.distributed.init_device_mesh("cpu", (sp.world_size,))
    for layer in made.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(made, mesh=mesh)
    optimizer, data = optimizer_of(run.optimizer, made.parameters()), rows(run.kind)
    forward, ran, losses = executor.forward, [], []
    executor.forward = lambda *args: ran.append(1) or forward(*args)  # type: ignore[func-returns-value]
    try:
        for step in range(run.steps):
            row = data[(step * sp.data_size + sp.data_rank) % ROWS]
            loss = made(**{key: value[None] for key, value in row.items()}).loss
            loss.backward()
            nn.utils.clip_grad_norm_(made.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    finally:
        executor.forward = forward
    return losses, len(ran)


