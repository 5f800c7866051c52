"""Training runs for the Trainer tests: one process of plain PyTorch, and ranks under Trainer or SFTTrainer.

The one-process side knows nothing of this package, of Trainer or of accelerate: transformers' sdpa, each document
alone, targets counted by hand. Worker processes import these functions by name.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import hf_cases
import torch
from ds_cases import as_asked
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils import data as sampling

from seqpar_ring import SequenceParallel, executor
from seqpar_ring.errors import UnsupportedError

STEPS = 20
ROWS = 8  # rows of data, taken in order, again and again
TOKENS = 41


@dataclass(frozen=True)
class Run:
    """One set-up of Trainer."""

    size: int
    kind: str = "packed"  # "packed", "padded", or "masked": one document a row, much of its first half without targets
    steps: int = STEPS
    rows: int = 1  # a micro-batch, on each data rank
    accumulation: int = 2
    optimizer: str = "adamw_torch"
    checkpointing: bool = False
    lora: bool = False
    deepspeed: int | None = None  # ZeRO stage
    offload: bool = False  # of optimizer states, and in stage 3 of parameters
    fsdp: tuple[tuple[str, Any], ...] | None = None  # Trainer's fsdp_config; None: no FSDP
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
            batch["labels"][:, : TOKENS // 2 + 3 if kind == "first half masked" else 5 + 4 * index] = -100
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
    return [loss for loss, _ in losses_and_norms(run, data_ranks)]


def figures(run: Run, data_ranks: int) -> list[float]:
    """The losses, and then the norms of the gradients, which Adam and clipping would not show to be too large."""
    found = losses_and_norms(run, data_ranks)
    norms = [] if run.deepspeed == 0 else [norm for _, norm in found]  # DeepSpeed tells none there
    return [loss for loss, _ in found] + norms


def losses_and_norms(run: Run, data_ranks: int, clip: float = 1.0) -> list[tuple[float, float]]:
    """As `one_process`, and the norm of the gradient before it is clipped."""
    made, data = model(run), rows(run.kind)
    optimizer = optimizer_of(run.optimizer, [p for p in made.parameters() if p.requires_grad])
    a_step, found = run.rows * run.accumulation * data_ranks, []
    for step in range(run.steps):
        total, count = torch.zeros(()), 0
        for i in range(step * a_step, (step + 1) * a_step):
            one, n = summed(made, {key: value[None] for key, value in data[i % ROWS].items()})
            total, count = total + one, count + n
        loss = total / count
        loss.backward()
        norm = nn.utils.clip_grad_norm_(made.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), norm.item()))
    return found


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
def as_torchrun(sp: SequenceParallel, run: Run | None = None) -> Iterator[None]:
    """What torchrun would have set, and no state of accelerate from a run before.

    accelerate knows FSDP on GPUs only (on a CPU it trains by DDP and says nothing), so for a run with it the ranks pose
    as GPUs'.
    """
    rank, world = str(sp.groups.global_rank), str(sp.world_size)
    os.environ.update(LOCAL_RANK=rank, RANK=rank, WORLD_SIZE=world, DS_ACCELERATOR="cpu")
    # The group exists already. accelerate reads the number of threads: without it each rank takes all cores, and spins.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", OMP_NUM_THREADS="1")
    warnings.simplefilter("ignore")
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    known = PartialState._prepare_backend
    if run is not None and run.fsdp is not None:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    AcceleratorState._reset_state(True)
    try:
        yield
    finally:
        PartialState._prepare_backend = known
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]  # a Trainer of later would use DeepSpeed, too
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
    if run.fsdp is not None:
        given |= {"fsdp": True, "fsdp_config": dict(run.fsdp)}
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
    collator = others.pop("data_collator", default_data_collator)
    return ring(Trainer, **settings)(
        model=model(run) if made is None else made,
        args=TrainingArguments(**arguments(run, folder, **others)),
        data_collator=collator,
        **data,
    )


@contextmanager
def counted() -> Iterator[list[int]]:
    """While it is open, each forward run of the ring adds to the list."""
    forward, ran = executor.forward, list[int]()
    executor.forward = lambda *args: ran.append(1) or forward(*args)  # type: ignore[func-returns-value]
    try:
        yield ran
    finally:
        executor.forward = forward


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def figures_of(trainer: Any) -> list[float]:
    """As `figures`."""
    return losses_of(trainer) + [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


@contextmanager
def recomputed(made: nn.Module, run: Run) -> Iterator[None]:
    """While it is open, the first layer's norm runs twice in each micro-batch if layers are checkpointed, else once."""
    first = next(one for name, one in made.named_modules() if name.endswith("input_layernorm"))
    seen = list[int]()
    handle = first.register_forward_hook(lambda *_: seen.append(1))
    yield
    handle.remove()
    again = run.checkpointing or "activation_checkpointing" in dict(run.fsdp or ())
    assert len(seen) == run.steps * run.accumulation * (2 if again else 1)


def train(sp: SequenceParallel, run: Run, folder: str) -> tuple[list[float], float, int]:
    """Figures of the steps, the evaluation loss after them, and forward runs of the ring in training."""
    with as_torchrun(sp, run):
        trainer = trainer_of(run, folder)
        assert trainer.is_deepspeed_enabled == (run.deepspeed is not None)
        with counted() as ran, recomputed(trainer.model, run):
            trainer.train()
        assert isinstance(trainer.model, FSDPModule) == (run.fsdp is not None)
        if run.deepspeed is not None:
            as_asked(trainer.model_wrapped, run.deepspeed)
            assert bool(trainer.model_wrapped.zero_offload_optimizer()) == run.offload
            assert bool(trainer.model_wrapped.zero_offload_param()) == (run.offload and run.deepspeed == 3)
        return figures_of(trainer), trainer.evaluate()["eval_loss"], len(ran)


def eval_loss(run: Run, batch_rows: int, count: int = ROWS) -> float:
    """Of the model as it is made: the mean of batches' means, each batch counted by its rows, as Trainer has it."""
    made, data, total = model(run), rows(run.kind)[:count], 0.0
    for first in range(0, count, batch_rows):
        batch = data[first : first + batch_rows]
        with torch.no_grad():
            parts = [summed(made, {key: value[None] for key, value in one.items()}) for one in batch]
        total += len(batch) * float(sum(loss for loss, _ in parts)) / sum(count for _, count in parts)
    return total / count


def evaluate(sp: SequenceParallel, run: Run, folder: str, count: int = ROWS, split: bool = False) -> list[float]:
    """Trainer's evaluation losses of the model as it is made: twice, as it must not change."""
    with as_torchrun(sp):
        config = {"split_batches": split}
        trainer = trainer_of(run, folder, eval_dataset=rows(run.kind)[:count], accelerator_config=config)
        return [trainer.evaluate()["eval_loss"] for _ in range(2)]


def evaluate_flattened(sp: SequenceParallel, run: Run, folder: str, count: int) -> list[float] | str:
    """The same with a collator that makes one row of a batch, of samples without their padding; or what it is refused
    with."""
    data = [
        {key: value[row["attention_mask"].bool()] if "attention_mask" in row else value for key, value in row.items()}
        for row in rows(run.kind)[:count]
    ]

    def flatten(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        positions = [one.get("position_ids", torch.arange(len(one["labels"]))) for one in samples]
        joined = {key: torch.cat([one[key] for one in samples])[None] for key in ("input_ids", "labels")}
        return {**joined, "position_ids": torch.cat(positions)[None]}

    with as_torchrun(sp):
        try:
            trainer = trainer_of(run, folder, eval_dataset=data, data_collator=flatten)
            return [trainer.evaluate()["eval_loss"] for _ in range(2)]
        except UnsupportedError as error:
            return str(error)


def tokens_seen(sp: SequenceParallel, run: Run, folder: str, which: str) -> int:
    """Tokens of training as Trainer counts them."""
    with as_torchrun(sp):
        trainer = trainer_of(run, folder, include_num_input_tokens_seen=which)
        trainer.train()
        return int(trainer.state.num_input_tokens_seen)


def work_counted(sp: SequenceParallel, run: Run, folder: str) -> tuple[float, float, float]:
    """Operations of training as Trainer counts them, over those of one token; and steps of an evaluation, twice: as its
    metrics say in a second, and as many as its batches."""
    with as_torchrun(sp):
        trainer = trainer_of(run, folder)
        trainer.train()
        each = 6 * trainer.model.num_parameters(exclude_embeddings=True)
        found = trainer.evaluate()
        per_second = found["eval_steps_per_second"] / found["eval_samples_per_second"]
        return trainer.state.total_flos / each, per_second * ROWS, len(trainer.get_eval_dataloader())


SAMPLERS: dict[str, Callable[[range], dict[str, Any]]] = {
    "shuffle": lambda data: {"shuffle": True},
    "batches": lambda data: {"batch_sampler": sampling.BatchSampler(sampling.RandomSampler(data), 1, False)},
    "a subset": lambda data: {"sampler": sampling.SubsetRandomSampler(data)},
}


def shuffled(sp: SequenceParallel, count: int, how: str = "shuffle") -> list[int]:
    """What a rank sees of `count` samples in an epoch of our data loader, where the ranks' generators differ."""
    with as_torchrun(sp):
        from accelerate import Accelerator
        from seqpar_ring.integrations.trainer import data_loader

        Accelerator(cpu=True)
        torch.manual_seed(42 + sp.groups.global_rank)  # as accelerate's set_seed(42, device_specific=True) does
        loader = torch.utils.data.DataLoader(range(count), **SAMPLERS[how](range(count)))  # type: ignore[arg-type]
        return [int(i) for i in data_loader(loader, sp)]


def train_after_evaluation(sp: SequenceParallel, run: Run, folder: str) -> list[float] | str:
    """Losses of training after an evaluation; with the fault, the message where accelerate's mark stays."""
    from seqpar_ring.integrations import trainer as integration

    from seqpar_ring.errors import UnsupportedError

    with as_torchrun(sp, run):
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
        return figures_of(trainer)


def resume(sp: SequenceParallel, before: Run, after: Run, folder: str, at: int) -> list[float]:
    """Losses of a run that saves a checkpoint and of another that goes on from it, both as long as the second."""
    with as_torchrun(sp, before):
        first = trainer_of(before, folder, save_strategy="steps", save_steps=at)
        first.train()
        found = losses_of(first)[:at]
    with as_torchrun(sp, after):
        second = trainer_of(after, folder)
        second.train(resume_from_checkpoint=f"{folder}/checkpoint-{at}")
        return found + losses_of(second)[at:]


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
        return figures_of(trainer)


def by_length(sp: SequenceParallel, run: Run, folder: str) -> int:
    """Steps done with samples grouped by length, at random: the ranks of a group draw the same, or it is refused."""
    with as_torchrun(sp):
        return int(trainer_of(run, folder, train_sampling_strategy="group_by_length").train().global_step)


def plain_loop(sp: SequenceParallel, run: Run) -> tuple[list[float], int]:
    """Figures of a loop of one's own with accelerate: its DDP, its backward, our data loader; and ring forwards."""
    with as_torchrun(sp):
        from accelerate import Accelerator
        from seqpar_ring.integrations.trainer import data_loader
        from seqpar_ring.integrations.transformers import parallelize

        accelerator = Accelerator(cpu=True)
        own = SequenceParallel.over(sp.groups, sp.settings)
        made = parallelize(model(run), own)
        if run.checkpointing:
            made.activation_checkpointing_enable({"use_reentrant": False})
        made, optimizer = accelerator.prepare(made, optimizer_of(run.optimizer, made.parameters()))
        loader = data_loader(torch.utils.data.DataLoader(rows(run.kind), batch_size=run.rows), own)  # type: ignore[arg-type]
        losses, norms = [], []
        batches = [batch for _ in range(run.steps) for batch in loader][: run.steps]
        with counted() as ran, recomputed(made, run):
            for batch in batches:
                loss = made(**batch).loss
                accelerator.backward(loss)
                norms.append(accelerator.clip_grad_norm_(made.parameters(), 1.0).item())
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        return losses + norms, len(ran)


def plain_loop_of_deepspeed(sp: SequenceParallel, run: Run) -> tuple[list[float], int]:
    """As `plain_loop`, where accelerate has a DeepSpeedPlugin and the block in its config turns the ring on."""
    with as_torchrun(sp):
        from accelerate import Accelerator, DeepSpeedPlugin, PartialState
        from seqpar_ring.integrations import deepspeed
        from seqpar_ring.integrations.trainer import data_loader

        deepspeed.install()
        sizes = {"train_micro_batch_size_per_gpu": run.rows, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
        config = {name: value for name, value in deepspeed_config(run).items() if name != "train_batch_size"} | sizes
        PartialState(cpu=True)  # Accelerator(cpu=True) would forget DeepSpeed
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
        made = model(run)
        if run.checkpointing:
            made.gradient_checkpointing_enable({"use_reentrant": False})
        engine, _ = accelerator.prepare(made, optimizer_of(run.optimizer, made.parameters()))
        loader = data_loader(torch.utils.data.DataLoader(rows(run.kind), batch_size=run.rows), engine.seqpar_ring)  # type: ignore[arg-type]
        losses, norms = [], []
        batches = [batch for _ in range(run.steps) for batch in loader][: run.steps]
        with counted() as ran, recomputed(made, run):
            for batch in batches:
                loss = engine(**batch).loss
                accelerator.backward(loss)  # the engine's step, too
                losses.append(loss.item())
                norms.append(engine.get_global_grad_norm())
        as_asked(engine, run.deepspeed)
        return losses + (norms if run.deepspeed else []), len(ran)


def fully_sharded(sp: SequenceParallel, run: Run) -> tuple[list[float], int]:
    """Figures of a loop with torch's FSDP2, each layer and the whole sharded over all ranks; and ring forwards."""
    from seqpar_ring.integrations.transformers import parallelize
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    warnings.simplefilter("ignore")
    made = parallelize(model(run), sp)
    if run.checkpointing:
        made.activation_checkpointing_enable({"use_reentrant": False})
    policy = MixedPrecisionPolicy(torch.bfloat16 if run.bf16 else None, torch.float32)
    over: dict[str, Any] = {"mesh": torch.distributed.init_device_mesh("cpu", (sp.world_size,)), "mp_policy": policy}
    for layer in made.model.layers:
        fully_shard(layer, **over)
    fully_shard(made, **over)
    optimizer, data = optimizer_of(run.optimizer, made.parameters()), rows(run.kind)
    losses, norms = [], []
    with counted() as ran, recomputed(made, run):
        for step in range(run.steps):
            row = data[(step * sp.data_size + sp.data_rank) % ROWS]
            loss = made(**{key: value[None] for key, value in row.items()}).loss
            loss.backward()
            norms.append(nn.utils.clip_grad_norm_(made.parameters(), 1.0).full_tensor().item())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses + norms, len(ran)
