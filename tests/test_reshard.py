"""Tokens with all heads to heads with all tokens, and back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from seqpar_ring import executor, operator, ring_attention
from seqpar_ring.errors import UnsupportedError
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.reshard import Share, shares, to_heads, to_tokens
from seqpar_ring.testing import run_lockstep
from seqpar_ring.transport import Handle, Messenger, Recv, Send, Subgroup

ROWS, MORE = (3, 0, 4), (1, 5, 0)


def test_heads_go_out_and_come_back_and_shared_ones_are_summed() -> None:
    whole = torch.randn(2, sum(ROWS), 6, 5, dtype=torch.float64)
    others = torch.randn(2, sum(MORE), 1, 3, dtype=torch.float64)
    q_heads, k_heads = shares(6, 1, 3)
    assert (q_heads, k_heads) == ([(0, 2), (2, 4), (4, 6)], [(0, 1)] * 3)

    def there_and_back(sp: SequenceParallel) -> None:
        ring = sp.groups.ring
        mine = whole.split(ROWS, 1)[sp.rank]
        of_query, of_key = Share(ROWS, q_heads), Share(MORE, k_heads)
        keys = others.split(MORE, 1)[sp.rank]
        given = mine, keys, mine[..., 0]  # a log-sum-exp has no widths
        part, one, slim = to_heads(given, ring, [of_query, of_key, of_query])
        torch.testing.assert_close(part, whole[:, :, 2 * sp.rank : 2 * sp.rank + 2])
        torch.testing.assert_close(one, others)
        torch.testing.assert_close(slim, part[..., 0])
        found = to_tokens((part, (sp.rank + 1) * one, slim), ring, [of_query, of_key, of_query])
        torch.testing.assert_close(found, (mine, (1 + 2 + 3) * keys, mine[..., 0]))

    run_lockstep(there_and_back, 3)


def test_one_sequence_comes_to_where_it_belongs_without_a_copy() -> None:
    """Of a batch of one the rows of each rank lie together."""
    whole = torch.randn(1, sum(ROWS), 3, 5)

    class Noted:
        """The members, and where messages come to."""

        def __init__(self, of: Messenger) -> None:
            self.rank, self.world, self.lanes, self._of, self.places = of.rank, of.world, of.lanes, of, list[int]()

        def exchange(self, sends: Sequence[Send], recvs: Sequence[Recv], lane: str = "kv") -> Handle:
            self.places += [recv.tensor.data_ptr() for recv in recvs if recv.tensor.numel()]
            return self._of.exchange(sends, recvs, lane)

    def there(sp: SequenceParallel) -> None:
        members = Noted(sp.groups.ring)
        (part,) = to_heads(whole.split(ROWS, 1)[sp.rank : sp.rank + 1], members, [Share(ROWS, shares(3, 1, 3)[0])])
        torch.testing.assert_close(part, whole[:, :, sp.rank : sp.rank + 1])
        first, end = part.data_ptr(), part.data_ptr() + part.nbytes
        assert all(first <= place < end for place in members.places)

    run_lockstep(there, 3)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_gradients_that_are_summed_over_ranks_travel_wide_and_others_as_they_are(
    kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a kernel gives its results in 16 bits, as those of a GPU do."""
    travelled: list[list[torch.dtype]] = []
    backward = executor.backward
    monkeypatch.setattr(executor, "backward", lambda *a, **how: tuple(x.bfloat16() for x in backward(*a, **how)))
    monkeypatch.setattr(
        operator, "to_tokens", lambda x, *how: (travelled.append([one.dtype for one in x]), to_tokens(x, *how))[1]
    )

    def step(sp: SequenceParallel) -> None:
        plan = sp.plan(8)
        q, k, v = (torch.randn(1, 4, h, 8, dtype=torch.bfloat16).requires_grad_() for h in (2, kv_heads, kv_heads))
        ring_attention(q, k, v, plan).sum().backward()

    run_lockstep(step, 2, heads=2)
    narrow, wide = torch.bfloat16, torch.float32
    of_keys = wide if kv_heads == 1 else narrow
    assert sorted(travelled, key=len) == [[narrow, wide]] * 2 + [[narrow, of_keys, of_keys]] * 2


@pytest.mark.parametrize(("heads", "kv_heads", "degree"), [(8, 8, 8), (8, 2, 4), (8, 4, 2), (9, 3, 3), (6, 2, 1)])
def test_each_query_head_lies_where_its_key_head_does(heads: int, kv_heads: int, degree: int) -> None:
    q, k = shares(heads, kv_heads, degree)
    group = heads // kv_heads
    for (q0, q1), (k0, k1) in zip(q, k, strict=True):
        assert [h // group for h in range(q0, q1)] == sorted(list(range(k0, k1)) * ((q1 - q0) // (k1 - k0)))


@pytest.mark.parametrize(("heads", "kv_heads", "degree"), [(9, 3, 2), (12, 4, 3), (4, 2, 8)])
def test_heads_that_do_not_divide_are_refused(heads: int, kv_heads: int, degree: int) -> None:
    with pytest.raises(UnsupportedError, match=r'Set "heads" to 1 or'):
        shares(heads, kv_heads, degree)


def test_a_subgroup_numbers_its_ranks_anew() -> None:
    def gather(sp: SequenceParallel) -> list[int]:
        odd = sp.rank % 2
        group = Subgroup(sp.groups.ring, range(odd, 6, 2))
        assert (group.rank, group.world) == (sp.rank // 2, 3)
        x = torch.full((1, 1, 1), float(sp.rank))
        return [int(v) for v in to_heads([x], group, [Share((1, 1, 1), [(0, 1)] * 3)])[0].flatten()]

    assert run_lockstep(gather, 6) == [[0, 2, 4], [1, 3, 5]] * 3
