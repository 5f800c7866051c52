"""What only the reference kernel does: softcap, values of another width, long segments in slabs; against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seqpar_ring.geometry import INF
from seqpar_ring.kernels import Kept, ReferenceKernel, Scores, reference
from seqpar_ring.schedule import Call

CAUSAL = Call(0, 0, INF, 0, (0, 9, 9, 14), (0, 11, 13, 16))


def tensors(dtype: torch.dtype, values: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((2, 14, 6, 8), (2, 16, 2, 8), (2, 16, 2, values), (2, 14, 6, values))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def by_autograd(inputs: tuple[Tensor, ...], scores: Scores) -> tuple[Tensor, ...]:
    """CAUSAL in fp64: rows 0-8 see keys 0-10, rows 9-13 see keys 13-15, bottom right; nobody sees keys 11 and 12."""
    q, k, v, dout = (x.double() for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = torch.zeros(2, 14, 6, v.shape[3], dtype=torch.float64), torch.full((2, 6, 14), -torch.inf).double()
    for rows, columns in ((slice(0, 9), slice(0, 11)), (slice(11, 14), slice(13, 16))):
        s = torch.einsum("bihd,bjhd->bhij", q[:, rows], k[:, columns].repeat_interleave(3, 2)) * scores.scale
        s = scores.softcap * torch.tanh(s / scores.softcap) if scores.softcap else s
        m, n = s.shape[2:]
        s = s.masked_fill(torch.ones(m, n).triu(n - m + 1).bool(), -torch.inf)
        part = torch.einsum("bhij,bjhe->bihe", torch.softmax(s, -1), v[:, columns].repeat_interleave(3, 2))
        out, lse = out.clone(), lse.clone()
        out[:, rows], lse[:, :, rows] = part, torch.logsumexp(s, -1)
    return (out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout))


def answer(inputs: tuple[Tensor, ...], scores: Scores, delta: bool) -> tuple[Tensor, ...]:
    q, k, v, dout = inputs
    out, lse = ReferenceKernel().forward(q, k, v, CAUSAL, scores)
    given = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(1, 2) if delta else None
    return (out, lse, *ReferenceKernel().backward(dout, Kept(q, k, v, out, lse, given), CAUSAL, scores))


@pytest.mark.parametrize("delta", [True, False], ids=["delta given", "delta made"])
@pytest.mark.parametrize("softcap", [None, 1.5, 30.0], ids=lambda cap: f"softcap {cap}")
@pytest.mark.parametrize("values", [8, 5, 12], ids=lambda width: f"E={width}")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
def test_softcap_and_value_width_match_autograd(
    dtype: torch.dtype, tolerance: float, values: int, softcap: float | None, delta: bool
) -> None:
    inputs, scores = tensors(dtype, values), Scores(0.6, softcap)
    for mine, truth in zip(answer(inputs, scores, delta), by_autograd(inputs, scores), strict=True):
        assert torch.equal(mine == -torch.inf, truth == -torch.inf)
        seen = truth != -torch.inf
        difference = torch.linalg.vector_norm(mine[seen].double() - truth[seen])
        assert difference <= tolerance * torch.linalg.vector_norm(truth[seen])


def test_a_softcap_changes_the_answer() -> None:
    inputs = tensors(torch.float64, 8)
    for bent, straight in zip(answer(inputs, Scores(0.6, 1.5), True), answer(inputs, Scores(0.6), True), strict=True):
        alive = straight != -torch.inf
        assert torch.linalg.vector_norm((bent - straight)[alive]) > 0.02 * torch.linalg.vector_norm(straight[alive])


@pytest.mark.parametrize("limit", [1, 40, 700])
def test_slabs_of_rows_change_nothing(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, scores = tensors(torch.float64, 5), Scores(0.6, 1.5)
    whole = answer(inputs, scores, True)
    monkeypatch.setattr(reference, "LOGITS", limit)
    for mine, truth in zip(answer(inputs, scores, True), whole, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    inputs, scores = tensors(dtype, 8), Scores(0.6, 1.5)
    out, lse, *gradients = answer(inputs, scores, False)
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    assert {g.dtype for g in gradients} == {torch.float32}
    truth = by_autograd(inputs, scores)
    torch.testing.assert_close(out, truth[0].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), truth[1], rtol=1e-6, atol=1e-6)
