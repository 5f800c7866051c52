"""Token order: from a layout to index tensors, and the two differentiable ways between whole and sharded tensors.

`shard_tokens` picks this rank's tokens out of a whole tensor, `gather_tokens` puts a whole tensor together from every
rank's tokens. Each is the other's adjoint for the sum of all ranks' losses. No attention, no batch keys, no labels
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqpar_ring.geometry import Run
from seqpar_ring.layout import Layout, offsets, tokens
from seqpar_ring.transport import Transport


class TokenOrder:
    """Where in the whole sequence each rank's tokens stand, as int64 index tensors kept per device."""

    def __init__(self, lengths: Sequence[int], layout: Layout, rank: int) -> None:
        self.sizes = tokens(layout)
        self.rank = rank
        self.positions = _concatenated([_arange(run) for run in layout[rank]])
        self.documents = _concatenated([torch.full((run.n,), run.doc) for run in layout[rank]])
        base = offsets(lengths)
        by_rank = [_concatenated([_arange(run) + base[run.doc] for run in runs]) for runs in layout]
        self._mine = by_rank[rank]
        ranked = _concatenated(by_rank)
        self._inverse = torch.empty_like(ranked)
        self._inverse[ranked] = torch.arange(ranked.numel())
        self._on: dict[tuple[str, torch.device], Tensor] = {}

    def mine(self, device: torch.device) -> Tensor:
        """Index in the whole sequence of each of this rank's tokens, in memory order; (S_local,)."""
        return self._placed("mine", self._mine, device)

    def inverse(self, device: torch.device) -> Tensor:
        """For each token of the whole sequence its place in the ranks' tokens one rank after the other; (S,)."""
        return self._placed("inverse", self._inverse, device)

    def _placed(self, name: str, index: Tensor, device: torch.device) -> Tensor:
        key = (name, device)
        if key not in self._on:
            self._on[key] = index.to(device)
        return self._on[key]


def shard_tokens(x: Tensor, dim: int, order: TokenOrder, ring: Transport) -> Tensor:
    """This rank's tokens of `x` along `dim`; a copy. The gradient is gathered: every rank gets the whole one."""
    mine: Tensor = _Shard.apply(x, dim, order, ring)
    return mine


def gather_tokens(x: Tensor, dim: int, order: TokenOrder, ring: Transport) -> Tensor:
    """All ranks' tokens along `dim`, in the sequence's order. The gradient is summed over the ranks, then sharded."""
    whole: Tensor = _Gather.apply(x, dim, order, ring)
    return whole


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, order: TokenOrder, ring: Transport) -> Tensor:
        ctx.args = dim, order, ring
        return x.index_select(dim, order.mine(x.device))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        dim, order, ring = ctx.args
        return _whole(grad, dim, order, ring), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, order: TokenOrder, ring: Transport) -> Tensor:
        ctx.args = dim, order, ring
        return _whole(x, dim, order, ring)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        dim, order, ring = ctx.args
        return ring.all_reduce(grad.contiguous()).index_select(dim, order.mine(grad.device)), None, None, None


def _whole(x: Tensor, dim: int, order: TokenOrder, ring: Transport) -> Tensor:
    return ring.all_gather(x.contiguous(), order.sizes, dim).index_select(dim, order.inverse(x.device))


def _arange(run: Run) -> Tensor:
    return torch.arange(run.n) * run.step + run.start


def _concatenated(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
