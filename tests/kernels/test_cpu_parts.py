"""The CPU kernel's causal parts of more rows than keys, and what it keeps of the rows that rest during a pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqpar_ring.geometry import INF
from seqpar_ring.kernels import CpuKernel, Kept, Kernel, ReferenceKernel, Resting, Scores, cpu
from seqpar_ring.kernels.cpu import shares_heads, takes_tall
from seqpar_ring.schedule import Call
from seqpar_ring.testing import relative_error

SCORES = Scores(0.3)


def tall(rows: int, keys: int) -> Call:
    """A step of the staircase: each row sees the keys up to its own number."""
    return Call(0, 0, INF, rows - keys, (0, rows), (0, keys))


def tensors(call: Call, dtype: torch.dtype = torch.float64, width: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    rows, keys = call.cu_q[-1], call.cu_k[-1]
    shapes = ((2, rows, 4, width), (2, keys, 2, width), (2, keys, 2, width), (2, rows, 4, width))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def both_passes(kernel: Kernel, call: Call, given_: tuple[Tensor, ...], scores: Scores = SCORES) -> tuple[Tensor, ...]:
    q, k, v, dout = given_
    out, lse = kernel.forward(q, k, v, call, scores)
    return out, lse, *kernel.backward(dout, Kept(q, k, v, out, lse), call, scores)


class Counted(CpuKernel):
    """The CPU kernel, which counts the calls of the op."""

    def __init__(self, tall: bool) -> None:
        super().__init__()
        self.calls = 0
        self._shares_heads, self._tall = True, tall
        self._forward, self._backward = self._counted(self._forward), self._counted(self._backward)

    def _counted(self, op: Any) -> Any:
        def counted(*args: Any, **how: Any) -> Any:
            self.calls += 1
            return op(*args, **how)

        return counted


def test_one_op_call_answers_a_segment_of_more_rows_than_keys() -> None:
    call = tall(11, 4)
    for takes, calls in ((True, 2), (False, 4)):
        kernel = Counted(takes)
        both_passes(kernel, call, tensors(call))
        assert kernel.calls == calls


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 1400), keys=st.integers(1, 1400), dtype=st.sampled_from([torch.float64, torch.float32]))
@example(513, 512, torch.float64)  # the op's own blocks have 512 keys, and 32, 64 or 256 rows
@example(1024, 513, torch.float64)
@example(1030, 1, torch.float32)
@example(1100, 1023, torch.float64)
def test_rows_below_the_square_see_all_keys(rows: int, keys: int, dtype: torch.dtype) -> None:
    call = tall(rows + keys, keys)
    given_ = tensors(call, dtype)
    truth = both_passes(ReferenceKernel(), call, tuple(x.double() for x in given_))
    bound = {torch.float64: 1e-12, torch.float32: 2e-5}[dtype]
    for takes in (True, False):
        for mine, exact in zip(both_passes(Counted(takes), call, given_), truth, strict=True):
            atol = bound * max(1.0, float(exact.abs().max()))
            torch.testing.assert_close(mine.double(), exact, rtol=bound, atol=atol)


def test_in_16_bits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the op is called with bf16 itself."""
    monkeypatch.setattr(cpu, "TILES", True)
    monkeypatch.setattr(cpu, "FAST_IN_16_BITS", True)
    call = tall(1500, 701)  # odd: the op packs keys two by two
    given_ = tensors(call, torch.bfloat16, 64)
    q, k, v, dout = (x.double() for x in given_)
    truth = both_passes(ReferenceKernel(), call, (q, k, v, dout), Scores(0.125))
    found = both_passes(CpuKernel(), call, given_, Scores(0.125, keys=cpu.LONG))
    assert found[0].dtype is torch.bfloat16
    for mine, exact, bound in zip(found, truth, (5e-3, 1e-4, 2e-2, 2e-2, 2e-2), strict=True):
        assert relative_error(mine, exact) < bound


def test_whether_the_op_takes_more_rows_than_keys_is_told_from_its_answers() -> None:
    kernel = CpuKernel()
    forward, backward = kernel._forward, kernel._backward

    def refuses(*args: Any, **how: Any) -> Any:
        if args[4] and args[0].shape[2] != args[1].shape[2]:
            raise RuntimeError("is_causal needs as many rows as keys")
        return forward(*args, **how)

    def bottom_right(q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, **how: Any) -> Any:
        """Its first rows see nothing."""
        hidden = max(0, q.shape[2] - k.shape[2])
        out, lse = forward(q[:, :, hidden:], k, v, dropout, causal, **how)
        none = out.new_zeros(*out.shape[:2], hidden, out.shape[3])
        return torch.cat([none, out], 2), torch.cat([none[..., 0], lse], 2)

    def half(*args: Any, **how: Any) -> Any:
        dq, dk, dv = backward(*args, **how)
        return dq, dk, dv * (0.5 if args[7] and args[0].shape[2] != args[2].shape[2] else 1.0)

    assert takes_tall(forward, backward)
    with torch.device("meta"):
        assert takes_tall(forward, backward)
        assert shares_heads(forward)
    assert not takes_tall(refuses, backward)
    assert not takes_tall(bottom_right, backward)
    assert not takes_tall(forward, half)


@pytest.mark.parametrize("side", ["q", "k"])
def test_rows_that_rest_are_looked_through_once_and_the_others_each_time(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other side's memory holds one block after another, and a later one may be what overflows."""
    looked: list[int] = []
    largest = cpu._largest
    monkeypatch.setattr(cpu, "_largest", lambda x: looked.append(x.data_ptr()) or largest(x))
    call, scores = tall(6, 6), Scores(1.0, resting=Resting(side, {}, {}))
    q, k, v, dout = tensors(call, torch.float32)
    kernel = CpuKernel()
    for _ in range(2):
        both_passes(kernel, call, (q, k, v, dout), scores)
    rests, visits = (q, k) if side == "q" else (k, q)
    assert (looked.count(rests.data_ptr()), looked.count(visits.data_ptr())) == (1, 4)


@pytest.mark.parametrize("side", ["q", "k"])
def test_a_later_block_in_the_same_memory_may_overflow(side: str) -> None:
    call, scores = tall(6, 6), Scores(1.0, resting=Resting(side, {}, {}))
    q, k, v, _ = tensors(call, torch.float32)
    rests, visits = (q, k) if side == "q" else (k, q)
    rests[:] = 1e19
    for value in (0.0, -1e19, 0.0):
        visits[:] = value
        found, truth = (kernel.forward(q, k, v, call, scores) for kernel in (CpuKernel(), ReferenceKernel()))
        torch.testing.assert_close(found, truth)
        assert bool((found[1] == -torch.inf).all()) is (value != 0.0)
