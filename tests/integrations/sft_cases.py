"""TRL's SFTTrainer over ranks, on text of its own, and one process on the very batches that it made."""

from __future__ import annotations

import math
from typing import Any

import hf_cases
import torch
from torch import nn
from trainer_cases import Run, arguments, as_torchrun, counted, figures_of, model, optimizer_of, summed

from seqpar_ring import SequenceParallel


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
    """SFTTrainer: figures, the evaluation loss before training, the batches it made, and ring forwards in training."""
    with as_torchrun(sp, run):
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
        before = math.nan if run.fsdp is not None else float(trainer.evaluate()["eval_loss"])  # accelerate raises there
        seen: list[Any] = []
        trainer.model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append({**kwargs}), with_kwargs=True, prepend=True
        )
        with counted() as ran:
            trainer.train()
        keys = ("input_ids", "labels", "position_ids", "attention_mask")
        return figures_of(trainer), before, [{k: b[k] for k in keys if k in b} for b in seen], len(ran)


def one_process_on(run: Run, batches: list[Any]) -> list[float]:
    """As `one_process`, on these micro-batches: in packed rows each document alone, counted by its positions."""
    made = model(run)
    optimizer = optimizer_of(run.optimizer, [p for p in made.parameters() if p.requires_grad])
    losses, norms = [], []
    for first in range(0, len(batches), run.accumulation):
        parts = [summed(made, batch) for batch in batches[first : first + run.accumulation]]
        loss = sum((one for one, _ in parts), torch.zeros(())) / sum(n for _, n in parts)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(made.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses + norms
