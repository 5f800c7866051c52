"""What is particular to torch's CPU kernel: one op call where one is enough, older torch without GQA, shared masks."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqpar_ring.errors import UnsupportedError
from seqpar_ring.geometry import INF
from seqpar_ring.kernels import CpuKernel, Kept, ReferenceKernel, Scores, cpu
from seqpar_ring.kernels.base import wide
from seqpar_ring.kernels.cpu import LONG, cut, shares_heads
from seqpar_ring.planner.flight import KERNELS, _made
from seqpar_ring.schedule import Call, Row
from seqpar_ring.testing import relative_error

SCORES = Scores(0.3)
SQUARE = Call(0, 0, INF, 0, (0, 11), (0, 11))
FULL = Call(5, 7, INF, INF, (0, 11), (0, 11))
CORNER = Call(0, 0, INF, 0, (0, 5, 11), (0, 9, 14))
WINDOW = Call(0, 0, 3, 0, (0, 600, 1200), (0, 600, 1200))


class Spied(CpuKernel):
    """The CPU kernel, which notes each call of the op."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, ...]] = []
        self.masks: list[Tensor | None] = []
        self._shares_heads = self._tall = True  # not to be asked of the op, which would be noted
        self._forward, self._backward = self._spy(self._forward), self._spy(self._backward)

    def _spy(self, op: Any) -> Any:
        def spy(*args: Any, attn_mask: Tensor | None, scale: float) -> Any:
            self.seen.append(tuple(x for x in args if isinstance(x, Tensor)))
            self.masks.append(attn_mask)
            return op(*args, attn_mask=attn_mask, scale=scale)

        return spy


def tensors(call: Call, dtype: torch.dtype = torch.float64, groups: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    m, n = call.cu_q[-1], call.cu_k[-1]
    shapes = ((2, m, 6, 8), (2, n, groups, 8), (2, n, groups, 8), (2, m, 6, 8))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def kept(call: Call, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Kept]:
    q, k, v, dout = tensors(call, dtype)
    out, lse = ReferenceKernel().forward(q, k, v, call, SCORES)
    return dout, Kept(q, k, v, out, lse)


@pytest.mark.parametrize("call", [SQUARE, FULL], ids=["causal square", "full block"])
def test_one_part_is_one_op_call_on_the_callers_own_queries_and_on_keys_by_head(call: Call) -> None:
    kernel = Spied()
    dout, saved = kept(call)
    out, lse = kernel.forward(*saved[:3], call, SCORES)
    assert len(kernel.seen) == 1
    assert kernel.seen[0][0].data_ptr() == saved.q.data_ptr()
    assert (out.shape, lse.shape) == ((2, 11, 6, 8), (2, 6, 11))
    kernel.backward(dout, saved, call, SCORES)
    assert len(kernel.seen) == 2
    dout_seen, q_seen, *_, out_seen, _ = kernel.seen[1]
    assert [x.data_ptr() for x in (dout_seen, q_seen, out_seen)] == [x.data_ptr() for x in (dout, saved.q, saved.out)]
    assert all(x.is_contiguous() for x in (*kernel.seen[0][1:], *kernel.seen[1][2:4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [8, 5])
def test_backward_gets_dout_in_a_form_that_it_does_not_copy(dtype: torch.dtype, width: int) -> None:
    """The op copies a dout that does not lie as (B, S, H, D); the planner counts no such copy."""
    kernel = Spied()
    q, k, v, dout = tensors(FULL, dtype)
    v, dout = v[..., :width], dout[..., :width]
    out, lse = kernel.forward(q, k, v, FULL, SCORES)
    kernel.backward(dout, Kept(q, k, v, out, lse), FULL, SCORES)
    assert kernel.seen[1][0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("groups", [1, 2])
def test_the_planner_counts_the_copies_of_keys_and_values(groups: int) -> None:
    """Of one head they lie together as they are, if it is the only sequence."""
    kernel = Spied()
    q, k, v, dout = (x[:1] for x in tensors(FULL, torch.float32, groups))
    out, lse = kernel.forward(q, k, v, FULL, SCORES)
    kernel.backward(dout, Kept(q, k, v, out, lse), FULL, SCORES)
    seen = zip((k, v), kernel.seen[1][2:4], strict=True)
    copied = sum(x.nbytes for given_, x in seen if x.data_ptr() != given_.data_ptr())
    assert copied == k.shape[1] * _made(Row(6, groups, 8, 8, 4), "kv", KERNELS["cpu"])


def test_a_segment_with_more_keys_than_queries_takes_two_op_calls_and_another_one() -> None:
    kernel = Spied()
    q, k, v, _ = tensors(CORNER)
    kernel.forward(q, k, v, CORNER, SCORES)
    assert [(x[0].shape[2], x[1].shape[2]) for x in kernel.seen] == [(5, 5), (5, 4), (5, 5)]


@pytest.mark.parametrize("call", [SQUARE, CORNER, WINDOW], ids=["square", "corner", "window"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_where_the_op_cannot_share_heads_the_answer_is_the_same(call: Call, dtype: torch.dtype) -> None:
    native, repeating = CpuKernel(), CpuKernel()
    repeating._shares_heads = False
    dout, saved = kept(call, dtype)
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 1e-5}[dtype]
    for one, other in (
        (native.forward(*saved[:3], call, SCORES), repeating.forward(*saved[:3], call, SCORES)),
        (native.backward(dout, saved, call, SCORES), repeating.backward(dout, saved, call, SCORES)),
    ):
        for a, b in zip(one, other, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def test_whether_the_op_shares_heads_is_told_from_what_it_reads() -> None:
    def reads_on(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return v.as_strided(q.shape, (16, 8, 8, 1)), q[..., 0]

    def shares(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return v.expand(q.shape), q[..., 0]

    def refuses(*_: object, **__: object) -> tuple[Tensor, Tensor]:
        raise RuntimeError("expected the same number of heads")

    assert [shares_heads(op) for op in (shares, reads_on, refuses)] == [True, False, False]


def test_the_slabs_of_all_segments_share_their_masks() -> None:
    kernel = Spied()
    q, k, v, _ = tensors(WINDOW)
    kernel.forward(q, k, v, WINDOW, SCORES)
    assert len(kernel.masks) == 6
    assert len({id(mask) for mask in kernel.masks}) == 3


@pytest.mark.parametrize(
    ("keys", "fast", "computed"),
    [
        (LONG, True, torch.bfloat16),
        (LONG, False, torch.float32),
        (LONG - 1, True, torch.float32),
    ],
)
def test_backward_of_long_documents_is_in_16_bits_where_that_is_fast(
    keys: int, fast: bool, computed: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "FAST_IN_16_BITS", fast)
    kernel = Spied()
    kernel.backward(*kept(CORNER, torch.bfloat16), CORNER, Scores(0.3, keys=keys))
    assert {x.dtype for seen in kernel.seen for x in seen[:5]} == {computed}


@pytest.mark.parametrize(
    ("keys", "tiles", "dtype", "computed"),
    [
        (LONG, True, torch.bfloat16, torch.bfloat16),
        (LONG, False, torch.bfloat16, torch.float32),
        (LONG - 1, True, torch.bfloat16, torch.float32),
        (LONG, True, torch.float16, torch.float32),
        (LONG, True, torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("call", [SQUARE, CORNER, WINDOW], ids=["square", "corner", "window"])
def test_forward_of_long_documents_is_in_bf16_where_tiles_of_it_are_multiplied(
    call: Call, keys: int, tiles: bool, dtype: torch.dtype, computed: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that share rows are merged in fp32: each is rounded once, and the whole no second time."""
    monkeypatch.setattr(cpu, "TILES", tiles)
    kernel = Spied()
    q, k, v, _ = tensors(call, dtype)
    out, lse = kernel.forward(q, k, v, call, Scores(0.3, keys=keys))
    assert {x.dtype for seen in kernel.seen for x in seen[:3]} == {computed}
    assert lse.dtype is wide(dtype)
    exact, exact_lse = ReferenceKernel().forward(q.double(), k.double(), v.double(), call, Scores(0.3))
    narrow = computed is torch.bfloat16  # in which the op takes powers of 2 to four digits
    assert relative_error(out, exact) < (4e-3 if narrow else 1e-6)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=3e-4 if narrow else 1e-5)


@settings(max_examples=150, deadline=None)
@given(
    segments=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 17, 64, 131]), st.sampled_from([1, 2, 5, 33, 100, 513])),
        min_size=1,
        max_size=3,
    ),
    edges=st.sampled_from([(INF, 0), (INF, INF), (7, 0), (5, 3)]),
    widths=st.sampled_from([(8, 8), (5, 5), (33, 16), (64, 64), (128, 40)]),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2)]),
)
def test_any_call_in_bf16_errs_by_its_rounding_only(
    segments: list[tuple[int, int]], edges: tuple[int, int], widths: tuple[int, int], heads: tuple[int, int]
) -> None:
    """Odd numbers of rows and odd widths among them: tiles are multiplied of packed pairs.

    The last segment is large enough that gradients are no mere differences of what cancels, of which none is exact.
    """
    queries, keys = (tuple(accumulate((one[i] for one in (*segments, (64, 100))), initial=0)) for i in (0, 1))
    call, scores = Call(0, 0, *edges, queries, keys), Scores(widths[0] ** -0.5, keys=LONG)
    shapes = (queries, heads[0], widths[0]), (keys, heads[1], widths[0]), (keys, heads[1], widths[1])
    generator = torch.Generator().manual_seed(3)
    q, k, v, dout = (
        torch.randn((2, ends[-1], h, w), generator=generator).bfloat16()
        for ends, h, w in (*shapes, (queries, heads[0], widths[1]))
    )
    out, lse = ReferenceKernel().forward(q.double(), k.double(), v.double(), call, scores)
    truth = ReferenceKernel().backward(
        dout.double(), Kept(q.double(), k.double(), v.double(), out, lse), call, scores
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "TILES", True)
        patch.setattr(cpu, "FAST_IN_16_BITS", True)
        mine, mine_lse = CpuKernel().forward(q, k, v, call, scores)
        grads = CpuKernel().backward(dout, Kept(q, k, v, out.bfloat16(), lse.float()), call, scores)
    torch.testing.assert_close(mine_lse.double(), lse, rtol=0, atol=1e-3)
    for one, other, bound in zip((mine, *grads), (out, *truth), (5e-3, 3e-2, 3e-2, 3e-2), strict=True):
        assert relative_error(one, other) < bound


def test_a_forward_of_no_parts_is_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "TILES", True)
    q, k, v, _ = tensors(SQUARE, torch.bfloat16)
    nothing = Call(0, 0, INF, 0, (0, 11), (0, 0))
    out, lse = CpuKernel().forward(q[:, :11], k[:, :0], v[:, :0], nothing, SCORES)
    assert out.dtype is lse.dtype is torch.float32
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("call", [SQUARE, CORNER])
def test_half_precision_is_computed_and_returned_in_fp32(call: Call) -> None:
    kernel = CpuKernel()
    q, k, v, _ = tensors(call, torch.bfloat16)
    results = (*kernel.forward(q, k, v, call, SCORES), *kernel.backward(*kept(call, torch.bfloat16), call, SCORES))
    assert {x.dtype for x in results} == {torch.float32}
    exact = kernel.forward(q.double(), k.double(), v.double(), call, SCORES)[0]
    torch.testing.assert_close(results[0], exact.float(), rtol=1e-5, atol=1e-6)


def test_rows_whose_lse_is_minus_infinity_have_no_gradient_and_give_none() -> None:
    dout, saved = kept(SQUARE)
    saved.lse[:, :, 4] = -torch.inf
    dq, dk, dv = CpuKernel().backward(dout, saved, SQUARE, SCORES)
    want = ReferenceKernel().backward(dout, saved, SQUARE, SCORES)
    assert torch.equal(dq[:, 4], torch.zeros(2, 6, 8, dtype=torch.float64))
    for mine, truth in zip((dq, dk, dv), want, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 11, 6, 8), (2, 11, 0, 8)], ids=["no batch", "no heads"])
def test_tensors_without_elements_are_answered_without_the_op(shape: tuple[int, ...]) -> None:
    kernel, x = Spied(), torch.zeros(shape)
    y = torch.zeros(*shape[:2], 2, 8)
    out, lse = kernel.forward(x, y, y, SQUARE, SCORES)
    assert (out.shape, lse.shape) == (x.shape, (shape[0], shape[2], 11))
    gradients = kernel.backward(x, Kept(x, y, y, out, lse), SQUARE, SCORES)
    assert [g.shape for g in gradients] == [x.shape, y.shape, y.shape]
    assert kernel.seen == []


def test_a_softcap_or_a_position_bias_is_refused_and_not_ignored() -> None:
    q, k, v, _ = tensors(SQUARE)
    with pytest.raises(UnsupportedError, match='kernel "cpu" cannot compute this call: it lacks softcap'):
        CpuKernel().forward(q, k, v, SQUARE, Scores(0.3, 30.0))
    with pytest.raises(UnsupportedError, match="it lacks ALiBi"):
        CpuKernel().forward(q, k, v, SQUARE, Scores(0.3, slopes=torch.ones(2)))


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_rows_that_came_with_delta_and_without_out_have_the_same_gradient(scale: float) -> None:
    q, k, v, dout = tensors(SQUARE)
    dout = dout * scale
    dout[:, 2] = 0.0
    out, lse = CpuKernel().forward(q, k, v, SQUARE, SCORES)
    delta = (dout * out).sum(-1).transpose(1, 2)
    expected = CpuKernel().backward(dout, Kept(q, k, v, out, lse), SQUARE, SCORES)
    found = CpuKernel().backward(dout, Kept(q, k, v, None, lse, delta), SQUARE, SCORES)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("width", [3, 8, 13])
def test_values_of_another_width_are_those_of_the_reference(width: int) -> None:
    q, k, v, dout = tensors(SQUARE)
    v, dout = (torch.cat([x, x], -1)[..., :width] for x in (v, dout))
    ours, theirs = (kernel.forward(q, k, v, SQUARE, SCORES) for kernel in (CpuKernel(), ReferenceKernel()))
    torch.testing.assert_close(ours, theirs)
    held = Kept(q, k, v, *theirs)
    torch.testing.assert_close(
        CpuKernel().backward(dout, held, SQUARE, SCORES), ReferenceKernel().backward(dout, held, SQUARE, SCORES)
    )


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 45), st.integers(0, 45), st.booleans())
def test_rows_of_a_cut_are_disjoint_and_all_their_parts_are_on_the_same_rows(
    m: int, n: int, left: int, right: int, tall: bool
) -> None:
    for edge in (left, INF):
        rows = cut(Call(0, 0, edge, right, (0, m), (0, n)), tall)
        taken = [i for r in rows for i in range(r.q0, r.q1)]
        assert len(taken) == len(set(taken))
        assert all((p.q0, p.q1) == (r.q0, r.q1) and p.k0 < p.k1 for r in rows for p in r.parts)
