"""Lanes of their own over a caller's process groups: only who waits for whom changes; misuse is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from saying import said_of

from seqpar_ring import compat
from seqpar_ring.compat.rings import ring_of
from seqpar_ring.errors import GroupError
from seqpar_ring.groups import Groups
from seqpar_ring.testing import RankPool


def pairs() -> Any:
    """This rank's of two neighbouring pairs."""
    made = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    return made[dist.get_rank() // 2]


def results(group: Any) -> list[torch.Tensor]:
    """out, dq, dk and dv of some ring attention."""
    made = torch.Generator().manual_seed(dist.get_rank())
    qkv = [torch.randn(1, 10, heads, 8, generator=made).requires_grad_() for heads in (4, 2, 2)]
    out = compat.zigzag_ring_flash_attn_func(*qkv, causal=True, group=group)
    assert isinstance(out, torch.Tensor)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
    return [out.detach(), *(x.grad for x in qkv if x.grad is not None)]


def overlapping(_: Groups) -> tuple[Any, ...]:
    """A pair and all four ranks. Of the pair: whether results are what they were, its lanes, and what dkv has sent."""
    pair, everyone = pairs(), dist.new_group([0, 1, 2, 3])
    before = results(pair)
    compat.own_lanes(pair, everyone)
    transports: tuple[Any, ...] = ring_of(pair).transport, ring_of(everyone).transport
    lanes = [transports[0]._lanes[lane] for lane in ("kv", "dkv", "control")]
    assert {tuple(dist.get_process_group_ranks(lane)) for lane in lanes} == {tuple(dist.get_process_group_ranks(pair))}
    same = all(a.equal(b) for a, b in zip(results(pair), before, strict=True))
    found = same, len(set(lanes)), lanes[-1] is pair, len(set(transports[1]._lanes.values()))
    sent = transports[0].stats.bytes_sent["dkv"] > 0
    dist.barrier()
    for lane in [lane for transport in transports for lane in dict.fromkeys(transport._lanes.values())]:
        dist.destroy_process_group(lane)
    return *found, sent


def test_every_lane_has_a_group_and_results_stay_what_they_were(pool4: RankPool) -> None:
    assert pool4.run_groups(overlapping) == [(True, 3, True, 3, True)] * 4


def nothing(_: Groups) -> None:
    alone = [dist.new_group([rank]) for rank in range(2)]
    compat.own_lanes()
    compat.own_lanes(alone[dist.get_rank()])


def test_a_world_without_groups_of_several_ranks_has_nothing_to_make(pool2: RankPool) -> None:
    assert pool2.run_groups(nothing) == [None, None]


def wrong(_: Groups) -> list[str]:
    first = dist.get_rank() == 0
    group: Any = dist.group.WORLD
    return [
        said_of(lambda: compat.own_lanes(*([] if first else [group]))),
        said_of(lambda: compat.own_lanes(*(["ring"] if first else [group]))),  # type: ignore[list-item]
        said_of(lambda: compat.own_lanes(group, lanes=["kv", "dvk"])),
        said_of(lambda: compat.own_lanes(group, lanes=["kv"] if first else ["kv", "dkv"])),
        said_of(lambda: compat.own_lanes(group, lanes=["control"])),
    ]


def test_what_cannot_be_made_is_refused_on_every_rank_before_any_group_is_made(pool2: RankPool) -> None:
    for missing, thing, name, other, control in pool2.run_groups(wrong):
        assert "GroupError: not all ranks" in missing
        assert "group=(0, 1), missing=[0]" in missing
        assert "not a process group" in thing
        assert "lane='dvk'" in name
        assert 'Did you mean "dkv"?' in name
        assert "DisagreementError" in other
        assert "lane='control'" in control


def test_without_torch_distributed_it_says_so() -> None:
    with pytest.raises(GroupError, match="not initialised"):
        compat.own_lanes()
