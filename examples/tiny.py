"""What the short examples share: a tiny model with random weights, and rows of text to train on, at once and offline.

The text is that of Python's own help, as bytes, so that no tokenizer is needed: 256 words. For a model and a text of
your own replace these functions.
"""

from __future__ import annotations

from itertools import cycle, islice
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor


def model(seed: int = 0) -> Any:
    """A Llama of 0.3 M parameters, the same on every rank, ready to train with activation checkpointing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 256}
    made = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=6, num_key_value_heads=3))
    made.activation_checkpointing_enable({"use_reentrant": False})
    return made.train()


def texts() -> list[str]:
    """Documents of many lengths: the topics of Python's help."""
    return [topics[name] for name in sorted(topics)]


def rows(tokens: int, count: int) -> list[dict[str, Tensor]]:
    """Packed rows of so many tokens: input_ids, labels and position_ids (tokens,), which restart in each document."""
    stream = cycle(texts())
    out: list[dict[str, Tensor]] = []
    left = torch.empty(0, dtype=torch.long)
    for _ in range(count):
        parts: list[Tensor] = []
        while sum(map(len, parts)) < tokens:
            left = left if len(left) else torch.tensor(list(next(stream).encode()))
            room = tokens - sum(map(len, parts))
            parts.append(left[:room])
            left = left[room:]
        ids = torch.cat(parts)
        out.append({"input_ids": ids, "labels": ids, "position_ids": torch.cat([torch.arange(len(p)) for p in parts])})
    return out


def batch(row: dict[str, Tensor]) -> dict[str, Tensor]:
    """A row as a batch of one."""
    return {key: value[None] for key, value in row.items()}


def tokenizer() -> Any:
    """The same bytes as words of a tokenizer, for trainers that want one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    first, second = islice(alphabet, 2)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=first, pad_token=second)
