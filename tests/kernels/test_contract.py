"""Every kernel, on every kind of call, against dense attention in fp64: out, lse and gradients by global lse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from stand_ins import gpu_kernels, on_cpu
from torch import Tensor

from seqpar_ring.errors import PlanError, UnsupportedError
from seqpar_ring.geometry import INF
from seqpar_ring.kernels import (
    CpuKernel,
    Kept,
    Kernel,
    ReferenceKernel,
    Scores,
    merge_,
)
from seqpar_ring.schedule import Call

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
KERNELS: tuple[Kernel, ...] = (
    CpuKernel(),
    ReferenceKernel(),
    *map(on_cpu, gpu_kernels()),
)
HEADS = {"MHA": (3, 3), "GQA": (6, 2), "MQA": (4, 1)}


class Answer(NamedTuple):
    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def call(left: int, right: int, *segments: tuple[int, int], q0: int = 0, k0: int = 0) -> Call:
    cu_q, cu_k = [0], [0]
    for m, n in segments:
        cu_q.append(cu_q[-1] + m)
        cu_k.append(cu_k[-1] + n)
    return Call(q0, k0, left, right, tuple(cu_q), tuple(cu_k))


CALLS: dict[str, list[Call]] = {
    "one full block": [call(INF, INF, (13, 9))],
    "one causal square": [call(INF, 0, (17, 17))],
    "causal, more keys than queries": [call(INF, 0, (7, 19))],
    "causal, more queries than keys": [call(INF, 0, (19, 7))],
    "an upper edge off the diagonal": [call(INF, 3, (14, 11))],
    "a window": [call(4, 0, (23, 23))],
    "a window with both edges, fewer queries": [call(3, 2, (9, 15))],
    "many odd segments": [call(INF, 0, (1, 1), (5, 9), (13, 13), (3, 1), (1, 7), (7, 7), (11, 17))],
    "a window over many segments": [call(2, 0, (5, 5), (1, 1), (9, 4), (4, 9))],
    "queries without keys and keys without queries": [call(INF, 0, (3, 0), (5, 5), (0, 4), (6, 9), (2, 0))],
    "nothing but empty segments": [call(INF, INF, (3, 0), (0, 4))],
    "no queries": [call(INF, 0, (0, 5))],
    "no keys": [call(INF, 0, (5, 0))],
    "single rows": [call(INF, INF, (1, 3), (1, 1), (1, 5))],
    "a ring: a causal square and two full blocks": [
        call(INF, 0, (12, 12)),
        call(INF, INF, (12, 7), k0=12),
        call(INF, INF, (5, 6), q0=7, k0=19),
    ],
    "the same rows from three calls, with gaps": [
        call(INF, 0, (3, 5), (4, 4), (6, 0), (2, 3)),
        call(INF, INF, (0, 2), (7, 5), k0=12),
        call(6, 0, (4, 0), (9, 13), q0=2, k0=19),
    ],
}


def inputs(calls: Sequence[Call], heads: tuple[int, int], dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, ...]:
    """q, k, v, dout for the rows these calls touch, in every second row of memory: all of them are strided views."""
    generator = torch.Generator().manual_seed(7)
    m, n = max(c.q1 for c in calls), max(c.k1 for c in calls)
    shapes = ((m, heads[0]), (n, heads[1]), (n, heads[1]), (m, heads[0]))
    return tuple(
        torch.randn(batch, 2 * rows, h, 8, generator=generator, dtype=torch.float64).to(dtype)[:, ::2]
        for rows, h in shapes
    )


def visible(calls: Sequence[Call], m: int, n: int) -> Tensor:
    """The mask these calls amount to, pair by pair, from the words of `Call`; no pair may be in two calls."""
    seen = torch.zeros(m, n, dtype=torch.long)
    for c in calls:
        for s in range(len(c.cu_q) - 1):
            rows, columns = c.cu_q[s + 1] - c.cu_q[s], c.cu_k[s + 1] - c.cu_k[s]
            for i in range(rows):
                for j in range(columns):
                    if -c.left <= (j - i) - (columns - rows) <= c.right:
                        seen[c.q0 + c.cu_q[s] + i, c.k0 + c.cu_k[s] + j] += 1
    assert int(seen.max()) <= 1 if seen.numel() else True
    return seen.bool()


def dense(tensors: tuple[Tensor, ...], seen: Tensor, scores: Scores) -> Answer:
    """fp64, autograd, one softmax over everything."""
    q, k, v, dout = (x.double().detach() for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    times = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(times, 2), v.repeat_interleave(times, 2)
    s = torch.einsum("bihd,bjhd->bhij", q, k) * scores.scale
    if scores.softcap is not None:
        s = scores.softcap * torch.tanh(s / scores.softcap)
    alive = seen.any(1)
    s = torch.where(alive.unsqueeze(1), s.masked_fill(~seen, -torch.inf), 0.0)
    out = torch.einsum("bhij,bjhe->bihe", torch.softmax(s, -1) * alive.unsqueeze(1), v)
    lse = torch.where(alive, torch.logsumexp(s, -1) if s.shape[-1] else s.sum(-1), -torch.inf)
    grads = torch.autograd.grad(out, leaves, dout)
    return Answer(out.detach(), lse.detach(), *grads)


def in_blocks(kernel: Kernel, calls: Sequence[Call], tensors: tuple[Tensor, ...], scores: Scores) -> Answer:
    """What the executor does: every call by itself, merged; then every call's gradients with the merged out and lse."""
    q, k, v, dout = tensors
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=wide)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=wide)
    for c in calls:
        rows, columns = slice(c.q0, c.q1), slice(c.k0, c.k1)
        part, part_lse = kernel.forward(q[:, rows], k[:, columns], v[:, columns], c, scores)
        assert part.dtype in (q.dtype, wide)
        assert part_lse.dtype == wide
        assert part.shape == out[:, rows].shape
        assert not part[(part_lse == -torch.inf).transpose(1, 2)].any()
        merge_(out[:, rows], lse[:, :, rows], part, part_lse)
    final = out.to(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide) for x in (q, k, v))
    for c in calls:
        rows, columns = slice(c.q0, c.q1), slice(c.k0, c.k1)
        kept = Kept(q[:, rows], k[:, columns], v[:, columns], final[:, rows], lse[:, :, rows])
        part_dq, part_dk, part_dv = kernel.backward(dout[:, rows], kept, c, scores)
        dq[:, rows] += part_dq
        dk[:, columns] += part_dk
        dv[:, columns] += part_dv
    return Answer(out, lse, dq, dk, dv)


def errors(got: Answer, want: Answer) -> dict[str, float]:
    """Relative L2 of each tensor (absolute where the truth is below 1: dq is 0 for one key). nan: not the same -inf."""
    found = {}
    for name, mine, truth in zip(Answer._fields, got, want, strict=True):
        if not torch.equal(mine == -torch.inf, truth == -torch.inf):
            found[name] = torch.nan
            continue
        finite = truth != -torch.inf
        difference = torch.linalg.vector_norm(mine[finite].double() - truth[finite]).item()
        found[name] = difference / max(torch.linalg.vector_norm(truth[finite]).item(), 1.0)
    return found


def assert_close(got: Answer, want: Answer, tolerance: float) -> None:
    found = errors(got, want)
    assert all(error <= tolerance for error in found.values()), found  # nan fails


def check(kernel: Kernel, calls: Sequence[Call], tensors: tuple[Tensor, ...], scores: Scores) -> None:
    seen = visible(calls, tensors[0].shape[1], tensors[1].shape[1])
    got = in_blocks(kernel, calls, tensors, scores)
    assert_close(got, dense(tensors, seen, scores), TOLERANCE[tensors[0].dtype])


def able(kernel: Kernel, calls: Sequence[Call]) -> bool:
    """Whether the kernel declares what these calls need."""
    return kernel.capabilities.window or not any(c.windowed for c in calls)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_every_call_matches_dense_or_is_refused(
    kernel: Kernel, dtype: torch.dtype, heads: tuple[int, int], calls: list[Call]
) -> None:
    if able(kernel, calls):
        check(kernel, calls, inputs(calls, heads, dtype), Scores(0.4))
    else:
        with pytest.raises(UnsupportedError, match="sliding window"):
            check(kernel, calls, inputs(calls, heads, dtype), Scores(0.4))


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.capabilities.softcap], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_a_softcap_matches_dense_where_it_is_declared(kernel: Kernel, calls: list[Call]) -> None:
    check(kernel, calls, inputs(calls, (6, 2), torch.float64), Scores(0.4, softcap=0.9))


@st.composite
def any_calls(draw: st.DrawFn) -> list[Call]:
    """One to three calls over the same queries, each with keys of its own, so that no pair is in two of them."""
    found, k0 = [], 0
    for _ in range(draw(st.integers(1, 3))):
        segments = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5))
        left, right = (draw(st.one_of(st.just(INF), st.integers(0, 6))) for _ in range(2))
        found.append(call(left, right, *segments, q0=draw(st.integers(0, 4)), k0=k0))
        k0 = found[-1].k1 + draw(st.integers(0, 2))
    return found


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@settings(max_examples=60, deadline=None)
@given(calls=any_calls(), heads=st.sampled_from(list(HEADS.values())))
def test_random_calls_match_dense(kernel: Kernel, calls: list[Call], heads: tuple[int, int]) -> None:
    assume(able(kernel, calls))
    check(kernel, calls, inputs(calls, heads, torch.float64, batch=1), Scores(0.7))


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.capabilities.window], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(
    ("left", "right", "m", "n"),
    [(20, 0, 1301, 1301), (10, 20, 512, 502)],
    ids=["many slabs", "slabs alike in size only"],
)
def test_a_window_far_narrower_than_its_segment_matches_dense(
    kernel: Kernel, left: int, right: int, m: int, n: int
) -> None:
    windowed = call(left, right, (m, n))
    distance = torch.arange(n) - torch.arange(m).unsqueeze(1) - (n - m)
    tensors = inputs([windowed], (1, 1), torch.float64, batch=1)
    got = in_blocks(kernel, [windowed], tensors, Scores(1.0))
    assert_close(got, dense(tensors, (distance <= right) & (distance >= -left), Scores(1.0)), 1e-12)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("calls", [CALLS["one causal square"], CALLS["many odd segments"]], ids=["one", "many"])
def test_inputs_whose_width_is_strided_are_read_right(kernel: Kernel, calls: list[Call]) -> None:
    tensors = tuple(x.repeat_interleave(2, 3)[..., ::2] for x in inputs(calls, (6, 2), torch.float64))
    assert {x.stride(3) for x in tensors} == {2}
    check(kernel, calls, tensors, Scores(0.4))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_the_gradient_of_a_sum_arrives_expanded_and_is_read_right(kernel: Kernel) -> None:
    calls = CALLS["a ring: a causal square and two full blocks"]
    q, k, v, _ = inputs(calls, (6, 2), torch.float64)
    check(kernel, calls, (q, k, v, torch.ones((), dtype=torch.float64).expand(q.shape)), Scores(0.4))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("fault", ["average instead of merge", "lse of the block instead of the row", "lse + 0.01"])
def test_a_seeded_fault_is_caught(kernel: Kernel, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = CALLS["a ring: a causal square and two full blocks"]
    tensors, scores = inputs(calls, (6, 2), torch.float64), Scores(0.4)
    check(kernel, calls, tensors, scores)
    true_forward, true_backward = kernel.forward, kernel.backward

    def average(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        first = (lse == -torch.inf).transpose(1, 2).unsqueeze(-1)
        out.copy_(torch.where(first, part, (out + part) / 2))
        lse.copy_(torch.logaddexp(lse, part_lse))

    class Faulty:
        name, capabilities, forward = kernel.name, kernel.capabilities, staticmethod(kernel.forward)

        def backward(self, dout: Tensor, kept: Kept, call: Call, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
            wrong = kept.lse + 0.01 if fault == "lse + 0.01" else true_forward(kept.q, kept.k, kept.v, call, scores)[1]
            return true_backward(dout, kept._replace(lse=wrong), call, scores)

    if fault == "average instead of merge":
        monkeypatch.setitem(globals(), "merge_", average)
    else:
        kernel = Faulty()
    with pytest.raises(AssertionError):
        check(kernel, calls, tensors, scores)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_slices_that_are_not_the_calls_are_refused(kernel: Kernel) -> None:
    q, k, v, _ = inputs([call(INF, 0, (9, 9))], (2, 2), torch.float32)
    with pytest.raises(PlanError, match="not the slices this call is about"):
        kernel.forward(q, k, v, call(INF, 0, (8, 9)), Scores(1.0))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_inputs_of_different_dtypes_are_refused(kernel: Kernel) -> None:
    q, k, v, _ = inputs([call(INF, 0, (9, 9))], (2, 2), torch.float32)
    with pytest.raises(UnsupportedError, match="q, k, v of different dtypes float32, float32, float64"):
        kernel.forward(q, k, v.double(), call(INF, 0, (9, 9)), Scores(1.0))
