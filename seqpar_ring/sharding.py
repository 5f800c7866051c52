"""Token order: from a layout to index tensors, and the two differentiable ways between whole and sharded tensors.

`shard_tokens` picks this rank's tokens out of a whole tensor, `gather_tokens` puts a whole tensor together from every
rank's tokens. Each is the other's adjoint for the sum of all ranks' losses. No attention, no batch keys, no labels
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqpar_ring.errors import SeqparError
from seqpar_ring.geometry import Ints, RunColumns, ramp
from seqpar_ring.layout import Layout, offsets
from seqpar_ring.transport import Transport


class TokenOrder:
    """Where in the whole sequence each rank's tokens stand, as int64 index tensors kept per device."""

    @torch.inference_mode(False)  # evaluation may make one, and training use it
    def __init__(self, lengths: Sequence[int], layout: Layout, rank: int) -> None:
        self.sizes, self.rank = layout.sizes, rank
        base, every = np.array(offsets(lengths), dtype=np.int64), layout.runs
        own = layout.columns(rank)
        self.positions = torch.from_numpy(row_positions(own))
        self.documents = torch.from_numpy(np.repeat(own.doc, own.n))
        self._mine = torch.from_numpy(row_positions(own) + np.repeat(base[own.doc], own.n))
        ranked = row_positions(every) + np.repeat(base[every.doc], every.n)
        inverse = np.empty_like(ranked)
        inverse[ranked] = np.arange(len(ranked))
        self._inverse = torch.from_numpy(inverse)
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
        agree_to_gather(grad, dim, ring)
        return gather_tokens(grad, dim, order, ring), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, order: TokenOrder, ring: Transport) -> Tensor:
        ctx.args = dim, order, ring
        return _whole(x, dim, order, ring)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _SumShard.apply(grad, *ctx.args), None, None, None


class _SumShard(torch.autograd.Function):
    """What gathering does to gradients, as a function that has one itself: second derivatives are exchanged, too."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, dim: int, order: TokenOrder, ring: Transport) -> Tensor:
        ctx.args = dim, order, ring
        return ring.all_reduce(grad.contiguous()).index_select(dim, order.mine(grad.device))

    @staticmethod
    def backward(ctx: Any, second: Tensor) -> tuple[Tensor, None, None, None]:
        return gather_tokens(second, *ctx.args), None, None, None


def agree_to_gather(x: Tensor, dim: int, ring: Transport, problem: SeqparError | None = None) -> None:
    """Compare what ranks are about to gather, since backends fill memory with whatever comes. On a GPU, where it would
    make the host wait, only what this rank has not gathered before.

    Raises:
        SeqparError: `problem`, if this rank has one; on all ranks.
        DisagreementError: dtypes or dimensions differ.
    """
    shape = tuple(n for i, n in enumerate(x.shape) if i != dim % max(x.dim(), 1))
    record = {
        "gathered along": dim % max(x.dim(), 1),
        "dtype": str(x.dtype),
        "other dimensions": shape,
        "gradients": torch.is_grad_enabled() and x.requires_grad,
    }
    ring.agree_at_first("gather", record, problem, always=not x.is_cuda)


def _whole(x: Tensor, dim: int, order: TokenOrder, ring: Transport) -> Tensor:
    return ring.all_gather(x.contiguous(), order.sizes, dim).index_select(dim, order.inverse(x.device))


def row_positions(runs: RunColumns) -> Ints:
    """The position within its document of each row of these runs, in memory order."""
    return np.repeat(runs.start, runs.n) + ramp(runs.n) * np.repeat(runs.step, runs.n)
