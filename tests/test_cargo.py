"""Memory of a run: fields of any kinds lie one after the other, in one piece for each dtype, and share nothing."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqpar_ring import SequenceParallel, ring_attention
from seqpar_ring.cargo import Cargo, Kind, Parts, Store, part
from seqpar_ring.testing import run_lockstep

DTYPES = [torch.float32, torch.bfloat16, torch.int8]


@st.composite
def kinds(draw: st.DrawFn) -> list[Kind]:
    batch, few = draw(st.integers(1, 3)), st.integers(1, 4)
    one = st.builds(Kind, st.just(batch), st.lists(few, max_size=2).map(tuple), st.sampled_from(DTYPES))
    return draw(st.lists(one, min_size=1, max_size=4))


@given(kinds(), st.integers(0, 5), st.integers(0, 5), st.integers(0, 2))
def test_the_fields_of_some_rows_fill_their_pieces_and_nothing_else(
    some: list[Kind], first: int, rows: int, after: int
) -> None:
    store = Store(some, first + rows + after, torch.device("cpu"))
    everything = store.laid(0, first + rows + after)
    for piece in everything.pieces:
        piece.zero_()
    fields, pieces = store.laid(first, rows)
    assert [x.shape for x in fields] == [(kind.batch, rows, *kind.rest) for kind in some]
    assert [x.dtype for x in fields] == [kind.dtype for kind in some]
    assert all(x.is_contiguous() for x in (*fields, *pieces))
    assert len(pieces) == len({kind.dtype for kind in some})
    for number, x in enumerate(fields, start=1):
        x.fill_(number)
    for dtype, piece in zip(dict.fromkeys(kind.dtype for kind in some), pieces, strict=True):
        lying = [x.flatten() for x in fields if x.dtype == dtype]
        assert torch.equal(piece, torch.cat(lying)), "one after the other, in order"
    assert sum(int((piece != 0).sum()) for piece in everything.pieces) == sum(x.numel() for x in fields)


def test_results_have_memory_of_their_own() -> None:
    like = [torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)]
    a, b = Cargo(like, torch.bfloat16).apart(7)
    assert (a.shape, b.shape, a.dtype) == ((2, 7, 4), (2, 7, 5), torch.bfloat16)
    assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()


def test_parts_are_made_once_and_are_those_of_their_fields() -> None:
    parts = Parts()
    for number in range(3):
        fields = torch.full((1, 7, 2), float(number)), torch.full((1, 7), -float(number))
        held = sys.getrefcount(fields)
        found = parts.of(fields, 2, 5)
        assert all(torch.equal(x, y) for x, y in zip(found, part(fields, 2, 5), strict=True))
        assert parts.of(fields, 2, 5) is found
        assert parts.of(fields, 2, 6)[0].shape == (1, 4, 2)
        fields[0].fill_(-1.0)
        assert found[0].eq(-1.0).all()
        assert all(x is y for x, y in zip(parts.of(fields, 0, 7), fields, strict=True))
        assert sys.getrefcount(fields) > held, "another tuple could come to the same address"


def messages(sp: SequenceParallel) -> tuple[int, int]:
    """How many messages a rank sends to the ring in forward, and in backward."""
    plan, counts, ring = sp.plan([256]), [0, 0], sp.groups.ring
    post, now = ring.exchange, 0

    def counted(sends: Any, recvs: Any, lane: str = "kv") -> Any:
        counts[now] += len(sends)
        return post(sends, recvs, lane)

    ring.exchange = counted  # type: ignore[method-assign]
    q, k, v = (torch.randn(1, plan.local_tokens, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    out = ring_attention(q, k, v, plan)
    now = 1
    torch.autograd.grad(out.sum(), (q, k, v))
    return counts[0], counts[1]


@pytest.mark.parametrize(
    ("settings", "forward", "backward"),
    [
        # Own keys and values lie apart: two messages on the first of three hops, one on each other. Gradients: one.
        ({"schedule": "ring"}, 2 + 1 + 1, 4 + 3),
        # Everything comes from its owner; each gradient goes back at once.
        ({"schedule": "direct"}, 3 * 2, 3 * 2 + 3),
        # Numbers of one byte together, and their scales together, also those of own rows.
        ({"schedule": "ring", "kv_dtype": "int8"}, 3 * 2, 3 * 2 + 3),
        # Queries, dout, lse and delta, all of one dtype here.
        ({"schedule": "ring", "backward": "q"}, 4, 4 + 1 + 1 + 3),
    ],
    ids=str,
)
def test_what_lies_together_is_one_message(settings: dict[str, Any], forward: int, backward: int) -> None:
    found = run_lockstep(messages, 4, layout="zigzag", **settings)
    assert found == [(forward, backward)] * 4
