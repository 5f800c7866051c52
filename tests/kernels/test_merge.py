"""Merging: a commutative monoid, in place, at any magnitude."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seqpar_ring.kernels import merge, merge_

Block = tuple[Tensor, Tensor]
EPS = {torch.float32: 1e-6, torch.float64: 1e-14}


def block(seed: int, shift: float = 0.0, dtype: torch.dtype = torch.float64) -> Block:
    """out (2, 5, 3, 4) and lse (2, 3, 5) of a part; of its 5 rows the second saw nothing."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(2, 5, 3, 4, generator=generator, dtype=torch.float64)
    lse = 3 * torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) + shift
    out[:, 1], lse[:, :, 1] = 0.0, -torch.inf
    return out.to(dtype), lse.to(dtype)


def nothing(dtype: torch.dtype = torch.float64) -> Block:
    return torch.zeros(2, 5, 3, 4, dtype=dtype), torch.full((2, 3, 5), -torch.inf, dtype=dtype)


def merged(first: Block, *others: Block) -> Block:
    out, lse = first[0].clone(), first[1].clone()
    for other in others:
        merge_(out, lse, *other)
    return out, lse


def assert_same(one: Block, other: Block, tolerance: float) -> None:
    for a, b in zip(one, other, strict=True):
        assert not a.isnan().any()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4], ids=lambda shift: f"lse near {shift:g}")
def test_merging_three_blocks_gives_the_softmax_over_all_their_logits(dtype: torch.dtype, shift: float) -> None:
    blocks = [block(seed, shift) for seed in range(3)]
    lse = torch.stack([b[1] for b in blocks])
    alive = torch.arange(5) != 1
    weights = torch.softmax(lse[..., alive], 0).transpose(2, 3).unsqueeze(-1)
    want = (weights * torch.stack([b[0] for b in blocks])[:, :, alive]).sum(0)
    got = merged(nothing(dtype), *((out.to(dtype), lse.to(dtype)) for out, lse in blocks))
    # An lse near 1e4 in fp32 is itself known to 1e-3 only, and so are its weights.
    tolerance = EPS[dtype] * (1 + abs(shift))
    torch.testing.assert_close(got[0][:, alive].double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        got[1][..., alive].double(), torch.logsumexp(lse[..., alive], 0), rtol=EPS[dtype], atol=EPS[dtype]
    )


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_merging_commutes(dtype: torch.dtype) -> None:
    a, b = block(1, dtype=dtype), block(2, dtype=dtype)
    assert_same(merged(a, b), merged(b, a), EPS[dtype])


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_merging_is_associative(dtype: torch.dtype) -> None:
    a, b, c = (block(seed, dtype=dtype) for seed in range(3))
    assert_same(merged(merged(a, b), c), merged(a, merged(b, c)), EPS[dtype])


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_a_block_that_saw_nothing_changes_no_bit(dtype: torch.dtype) -> None:
    a = block(1, dtype=dtype)
    for result in (merged(a, nothing(dtype)), merged(nothing(dtype), a)):
        assert torch.equal(result[0], a[0])
        assert torch.equal(result[1], a[1])


def test_two_rows_that_saw_nothing_stay_empty_without_nan() -> None:
    out, lse = merged(nothing(), nothing())
    assert torch.equal(out, nothing()[0])
    assert torch.equal(lse, nothing()[1])


@pytest.mark.parametrize("triton", ["not there", "does not compile"])
def test_without_a_triton_that_compiles_parts_are_merged_by_plain_torch(
    triton: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nmore")

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))
    monkeypatch.setattr(merge, "find_spec", lambda name: None if triton == "not there" else name)
    monkeypatch.setattr(merge, "import_module", lambda name: SimpleNamespace(merge_parts_=fails))
    assert merge.fused.__wrapped__() is False
    said = [] if triton == "not there" else ["RuntimeError: Failed to find C compiler."]
    assert [record.getMessage().split("compile: ")[1] for record in caplog.records] == said


@settings(max_examples=100, deadline=None)
@given(a=st.floats(-1e4, 1e4), b=st.floats(-1e4, 1e4))
def test_weights_are_those_of_a_softmax_however_far_apart_the_lse_are(a: float, b: float) -> None:
    out, lse = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.full((1, 1, 1), a, dtype=torch.float64)
    merge_(out, lse, torch.full_like(out, -1.0), torch.full_like(lse, b))
    weights = torch.softmax(torch.tensor([a, b], dtype=torch.float64), 0)
    assert out.item() == pytest.approx((weights[0] - weights[1]).item(), abs=1e-12)
    assert lse.item() == pytest.approx(torch.logsumexp(torch.tensor([a, b], dtype=torch.float64), 0).item(), rel=1e-14)


def test_only_the_rows_of_a_view_are_merged_and_the_part_is_not_changed() -> None:
    (out, lse), part = merged(block(1)), block(2)
    kept = part[0].clone(), part[1].clone()
    merge_(out[:, 2:4], lse[:, :, 2:4], part[0][:, 2:4], part[1][:, :, 2:4])
    want = merged(block(1), part)
    # Not bit for bit: torch computes what is left over of a vector register by other instructions (seen with AVX2).
    torch.testing.assert_close(out[:, 2:4], want[0][:, 2:4], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(lse[:, :, 2:4], want[1][:, :, 2:4], rtol=1e-14, atol=1e-14)
    assert torch.equal(out[:, :2], block(1)[0][:, :2])
    assert torch.equal(part[0], kept[0])
    assert torch.equal(part[1], kept[1])


def test_a_bf16_part_is_merged_in_the_accumulators_precision() -> None:
    part = block(2, dtype=torch.float32)
    rounded = part[0].bfloat16()
    got = merged(block(1, dtype=torch.float32), (rounded, part[1]))
    assert got[0].dtype == torch.float32
    assert_same(got, merged(block(1, dtype=torch.float32), (rounded.float(), part[1])), 0.0)


def test_a_nan_in_a_part_is_not_hidden() -> None:
    part = block(2)
    part[1][0, 0, 0] = torch.nan
    out, lse = merged(block(1), part)
    assert out[0, 0, 0].isnan().all()
    assert lse[0, 0, 0].isnan()
    assert not out[1].isnan().any()


def test_a_plain_average_is_not_the_merge() -> None:
    a, b = block(1), block(2)
    with pytest.raises(AssertionError):
        assert_same(merged(a, b), ((a[0] + b[0]) / 2, torch.logaddexp(a[1], b[1])), 1e-3)
