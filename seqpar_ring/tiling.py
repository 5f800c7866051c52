"""Tiles of tokens, for the parts of a model that see one token at a time: its head with the loss, and its MLPs.

Vocabulary-sized logits of a long shard would be its largest tensors by far: 32,768 tokens by 128,256 words take 16 GiB
in fp32, and as much again for their gradient. In tiles one of them exists at a time; backward makes it again. As with
every checkpoint the answer is the same but for the order of sums: a weight's gradient is added up over tiles in the
weight's dtype. No kernels, and no choice of which modules to treat so: that is an integration's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

TILE_BYTES = 2**28
"""Most bytes that the fp32 logits of a tile take: 2,048 tokens of 32,768 words, 523 of 128,256."""


class Tiles(NamedTuple):
    """How many tiles, and why."""

    number: int
    reason: str


def tiles(most_tokens: int, width: int, asked: int | str = "auto") -> Tiles:
    """Into how many tiles to cut the tokens of a rank, so that `width` fp32 numbers for each token stay small.

    Ranks must make as many tiles each, as the parameters used in a tile may have to be gathered from all (ZeRO-3); so
    this takes the most tokens of any.

    Args:
        most_tokens: tokens of the rank that has most.
        width: numbers for each token: the size of the vocabulary.
        asked: tokens of a tile; "whole": one tile; "auto": such that a tile takes at most `TILE_BYTES`.
    """
    if asked == "whole":
        return Tiles(1, "asked for")
    if isinstance(asked, int):
        return Tiles(max(1, math.ceil(most_tokens / asked)), f"{asked} tokens a tile asked for")
    size = most_tokens * width * 4
    count = max(1, math.ceil(size / TILE_BYTES))
    return Tiles(count, f"whole, {size / 2**20:,.0f} MiB of fp32; at most {TILE_BYTES / 2**20:,.0f} a tile")


def in_tiles(function: Callable[..., Tensor], count: int, x: Tensor, *others: Tensor) -> list[Tensor]:
    """Results of a function for each of `count` tiles of the rows of some tensors; backward runs it again for each.

    Args:
        function: of tiles (n, ..). What it draws at random it draws again in backward, but in a CUDA graph, where the
            state that it draws from cannot be kept.
        count: number of tiles, each of as many rows or one fewer; some are empty where there are fewer rows than tiles.
        x, *others: (N, ..).
    """
    parts = zip(*(torch.tensor_split(tensor, count) for tensor in (x, *others)), strict=True)
    if not torch.is_grad_enabled():
        return [function(*part) for part in parts]
    captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
    how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": not captured}
    return [checkpoint(function, *part, **how) for part in parts]


def summed_cross_entropy(
    hidden_BSC: Tensor, labels_BS: Tensor, head: Callable[[Tensor], Tensor], count: int, ignored: int
) -> Tensor:
    """Cross entropy summed over the targets, of logits that exist one tile at a time.

    Args:
        hidden_BSC: what the head is given, C wide.
        labels_BS: targets, `ignored` where there is none.
        head: from hidden states (1, n, C) to logits (1, n, V).
        count: number of tiles.

    Returns:
        A scalar in fp32 (fp64 for fp64).
    """

    def one(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = head(hidden[None])[0]
        wide = logits if logits.dtype is torch.float64 else logits.float()
        return functional.cross_entropy(wide, labels, ignore_index=ignored, reduction="sum")

    return torch.stack(in_tiles(one, count, hidden_BSC.flatten(0, 1), labels_BS.flatten())).sum()


def tile_module(module: nn.Module) -> None:
    """Let a module that sees one token at a time run in tiles: in as many as `set_tiles` says, one until then.

    The module keeps its parameters, their names and its hooks: its class becomes one derived from its own, so that a
    copy of the model is right too.
    """
    kind = type(module)
    if not isinstance(module, _Tiled):
        module.__class__ = type(f"Tiled{kind.__name__}", (_Tiled, kind), {"__module__": kind.__module__})


def is_tiled(module: nn.Module) -> bool:
    """Whether `tile_module` changed it."""
    return isinstance(module, _Tiled)


def set_tiles(module: nn.Module, count: int) -> None:
    """Number of tiles in which a module that `tile_module` changed computes from now on."""
    assert isinstance(module, _Tiled)
    module.seqpar_tiles = count


class _Tiled(nn.Module):
    """Mixed into a module's class: its forward, of (B, S, C), tile by tile."""

    seqpar_tiles = 1

    def forward(self, x_BSC: Tensor) -> Tensor:
        whole: Callable[[Tensor], Tensor] = super().forward
        if self.seqpar_tiles == 1:
            return whole(x_BSC)
        parts = in_tiles(lambda x: whole(x[None])[0], self.seqpar_tiles, x_BSC.flatten(0, -2))
        out: Tensor = torch.cat(parts).unflatten(0, x_BSC.shape[:-1])
        return out
