"""A kernel that cannot take empty segments gets none, and the answer is that of one that can."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from seqpar_ring.geometry import INF
from seqpar_ring.kernels import Kept, ReferenceKernel, Request, Resting, Scores, register, select, unregister
from seqpar_ring.kernels.gapless import Gapless, without_gaps
from seqpar_ring.schedule import Call
from seqpar_ring.testing import Case, assert_matches_dense


class Fussy(ReferenceKernel):
    """Refuses what it says it cannot do."""

    name = "fussy"
    capabilities = replace(ReferenceKernel.capabilities, empty_segments=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, scores: Scores) -> Any:
        no_gaps(call)
        return super().forward(q, k, v, call, scores)

    def backward(self, dout: Tensor, kept: Kept, call: Call, scores: Scores) -> Any:
        no_gaps(call)
        return super().backward(dout, kept, call, scores)


def no_gaps(call: Call) -> None:
    for cu in (call.cu_q, call.cu_k):
        assert all(a < b for a, b in pairwise(cu)), call


CALLS = [
    Call(0, 0, INF, 0, (0, 3, 5, 5, 8), (0, 3, 3, 5, 8)),
    Call(0, 0, INF, INF, (0, 4, 4), (0, 0, 6)),
    Call(0, 0, INF, 0, (0, 4), (0, 4)),
]


@pytest.mark.parametrize("call", CALLS)
def test_the_answer_is_that_of_a_kernel_that_takes_empty_segments(call: Call) -> None:
    q, k, v, dout = (x[:, : (call.cu_q if i in (0, 3) else call.cu_k)[-1]] for i, x in enumerate(Case().inputs(8)))
    scores = Scores(0.3)
    out, lse = ReferenceKernel().forward(q, k, v, call, scores)
    torch.testing.assert_close(Gapless(Fussy()).forward(q, k, v, call, scores), (out, lse))
    kept = Kept(q, k, v, out, lse)
    expected = ReferenceKernel().backward(dout, kept, call, scores)
    torch.testing.assert_close(Gapless(Fussy()).backward(dout, kept, call, scores), expected)


@pytest.mark.parametrize(("call", "same"), [(CALLS[0], False), (CALLS[2], True)])
def test_rows_that_are_gathered_do_not_rest(call: Call, same: bool) -> None:
    """Their memory is given out again: what a kernel notes of it would be told of other rows."""
    seen: list[Resting | None] = []

    class Noting(Fussy):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, scores: Scores) -> Any:
            seen.append(scores.resting)
            return super().forward(q, k, v, call, scores)

        def backward(self, dout: Tensor, kept: Kept, call: Call, scores: Scores) -> Any:
            seen.append(scores.resting)
            return super().backward(dout, kept, call, scores)

    resting = Resting("q", {}, {})
    q, k, v, dout = (x[:, : call.cu_q[-1]] for x in Case().inputs(8))
    out, lse = Gapless(Noting()).forward(q, k, v, call, Scores(0.3, resting=resting))
    Gapless(Noting()).backward(dout, Kept(q, k, v, out, lse), call, Scores(0.3, resting=resting))
    assert seen == [resting if same else None] * 2


def test_a_call_without_gaps_is_left_as_it_is() -> None:
    (same,) = without_gaps(CALLS[2])
    assert same.whole(CALLS[2])
    assert same.call == CALLS[2]
    (found,) = without_gaps(CALLS[0])
    assert not found.whole(CALLS[0])
    assert (found.q, found.k) == (((0, 3), (5, 8)), ((0, 3), (5, 8)))
    assert (found.call.cu_q, found.call.cu_k) == ((0, 3, 6), (0, 3, 6))
    assert without_gaps(CALLS[1]) == ()


def test_selection_puts_it_around_a_kernel_that_needs_it_and_says_so() -> None:
    register(Fussy())
    try:
        choice = select(Request("cpu", torch.float64, 8, 8, 4, 2), "fussy")
        assert isinstance(choice.kernel, Gapless)
        assert choice.reason == '"fussy": asked for by name; rows are gathered, as it takes no empty segments'
        for case in (Case(), Case(alibi=True), Case(heads=2, kv_heads=2)):
            assert_matches_dense([13, 1, 30, 7, 1, 3, 22], 4, case, 1e-12, kernel="fussy")
    finally:
        unregister("fussy")
