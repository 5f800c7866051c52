"""A run's memory: nobody writes where somebody still reads, whatever a network does between posting and waiting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from seqpar_ring import SequenceParallel, ring_attention
from seqpar_ring.layout import LAYOUTS
from seqpar_ring.schedule import BUILDERS, Places
from seqpar_ring.testing import run_lockstep
from seqpar_ring.transport import Handle, Recv, Send


class Hostile:
    """An exchange that writes what is received as soon as it may, and reads what is sent as late as it may."""

    def __init__(self, handle: Handle, sends: Sequence[Send]) -> None:
        self._handle, self._sends = handle, [(m.tensor, m.tensor.clone()) for m in sends]

    def wait(self) -> None:
        for tensor, before in self._sends:
            assert torch.equal(tensor, before), "a message was changed while it was on its way"
        self._handle.wait()


def hostile(sp: SequenceParallel) -> None:
    """Let the ring of a rank have a network that does whatever is allowed."""
    post = sp.groups.ring.exchange

    def exchange(sends: Sequence[Send], recvs: Sequence[Recv], lane: str = "kv") -> Handle:
        for message in recvs:
            message.tensor.fill_(torch.nan if message.tensor.is_floating_point() else 99)
        return Hostile(post(sends, recvs, lane), sends)

    sp.groups.ring.exchange = exchange  # type: ignore[method-assign]


def step(sp: SequenceParallel, batch: int, lengths: list[int], awkward: bool, spoil: Any = None) -> list[Tensor]:
    plan = sp.plan(lengths)
    if spoil is not None:
        spoil(plan)
    generator = torch.Generator().manual_seed(5)
    whole = [torch.randn(batch, sum(lengths), h, 8, generator=generator).double() for h in (4, 2, 2, 4)]
    q, k, v, dout = (plan.shard(x) for x in whole)
    if awkward:  # as a model's projections leave them: by head
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    for x in (q, k, v):
        x.requires_grad_()
    out = ring_attention(q, k, v, plan)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def on_a_kind_network(*args: Any) -> Callable[[SequenceParallel], list[Tensor]]:
    return lambda sp: step(sp, *args)


def on_a_hostile_network(*args: Any) -> Callable[[SequenceParallel], list[Tensor]]:
    def run(sp: SequenceParallel) -> list[Tensor]:
        hostile(sp)
        return step(sp, *args)

    return run


BATCHES = (1, [67], False), (2, [13, 1, 30, 7], False), (1, [5, 40], True), (2, [61, 2], True)
"""Rows of the batch, documents, and whether q, k and v lie in memory by head."""

WAYS: list[dict[str, Any]] = [
    {},
    {"block_tokens": 5},
    {"block_tokens": 5, "cut": "halves"},
    {"block_tokens": 40},
    {"backward": "q"},
    {"backward": "q", "block_tokens": 7},
    {"kv_dtype": "int8", "dkv_dtype": "bf16", "block_tokens": 9},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("schedule", sorted(BUILDERS))
def test_a_network_may_write_and_read_whenever_it_is_allowed_to(schedule: str, way: dict[str, Any]) -> None:
    for layout, args in zip(sorted(LAYOUTS), BATCHES, strict=True):
        how = {"layout": layout, "schedule": schedule, "node": 2, **way}
        kind, other = (run_lockstep(one(*args), 4, **how) for one in (on_a_kind_network, on_a_hostile_network))
        for mine, again in zip(kind, other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(mine, again, strict=True))


def all_in_one_place(plan: Any) -> None:
    """The seeded fault: every block at the beginning of the memory."""
    for name in ("forward_pass", "backward_pass"):
        a_pass = getattr(plan, name)
        spoilt = {
            kind: Places(found.rows, {thing: place._replace(first=0) for thing, place in found.of.items()})
            for kind, found in a_pass.buffers._asdict().items()
            if isinstance(found, Places)
        }
        setattr(plan, name, a_pass._replace(buffers=a_pass.buffers._replace(**spoilt)))


def test_memory_that_is_given_away_too_early_shows() -> None:
    with pytest.raises(AssertionError, match="changed while it was on its way"):
        run_lockstep(on_a_hostile_network(1, [67], False, all_in_one_place), 4)
