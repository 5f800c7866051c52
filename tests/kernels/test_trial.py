"""Trials before a kernel is chosen: what is right passes, each kind of error is found and named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from stand_ins import AtenFlash, CudnnFrontend, FlashAttn2, FlashAttn3, FlashAttn4
from torch import Tensor

from seqpar_ring.errors import UnsupportedError
from seqpar_ring.geometry import INF
from seqpar_ring.kernels import (
    CpuKernel,
    CudnnKernel,
    Flash2Kernel,
    Flash3Kernel,
    Flash4Kernel,
    Kept,
    Kernel,
    ReferenceKernel,
    Request,
    Scores,
    TorchFlashKernel,
)
from seqpar_ring.kernels.trial import calls_for, fragile, gaps_for, rate, seconds, tried, wrong
from seqpar_ring.schedule import Call

REQUEST = Request("cpu", torch.bfloat16, 16, 16, 4, 2, window=True)
RIGHT: tuple[Kernel, ...] = (
    CpuKernel(),
    ReferenceKernel(),
    Flash2Kernel(FlashAttn2(), ("cpu",)),
    Flash3Kernel(FlashAttn3(), ("cpu",)),
    Flash4Kernel(FlashAttn4(), ("cpu",)),
    TorchFlashKernel(AtenFlash(), ("cpu",)),
    CudnnKernel(CudnnFrontend(), ("cpu",)),
)


class Wrong:
    """A kernel with an error that somebody once made."""

    name = "wrong"
    capabilities = replace(ReferenceKernel.capabilities, priority=0)

    def __init__(self, error: str, **can: Any) -> None:
        self.error, self.capabilities = error, replace(self.capabilities, **can)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, scores: Scores) -> tuple[Tensor, Tensor]:
        if self.error == "raises":
            raise RuntimeError("no kernel image is available for execution on the device\nand more")
        if self.error == "top left" and call.right < INF and len(call.cu_q) == 2:
            call = call._replace(right=call.right - (call.cu_k[1] - call.cu_q[1]))
        if self.error == "no softcap":
            scores = scores._replace(softcap=None)
        if self.error == "no window":
            call = call._replace(left=INF)
        out, lse = ReferenceKernel().forward(q, k, v, call, scores)
        if self.error == "inf":
            lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        if self.error == "lse in log2":
            lse = lse * 1.4427
        return out, lse

    def backward(self, dout: Tensor, kept: Kept, call: Call, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
        if self.error == "nan for low rows" and kept.lse.max() < -88.7:
            kept = kept._replace(lse=kept.lse + torch.exp(-kept.lse) * 0.0)  # inf * 0, as in columns that are not there
        if self.error == "lse of the block":
            kept = kept._replace(lse=kept.lse + 0.2)
        dq, dk, dv = ReferenceKernel().backward(dout, kept, call, scores)
        return dq, torch.zeros_like(dk) if self.error == "no dk" else dk, dv


@pytest.mark.parametrize("kernel", RIGHT, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("softcap", [False, True], ids=["plain", "softcap"])
def test_kernels_that_are_right_pass(kernel: Kernel, softcap: bool) -> None:
    request = REQUEST._replace(softcap=softcap and kernel.capabilities.softcap)
    assert wrong(kernel, request, calls_for(request, kernel)) == ""
    assert wrong(kernel, request, gaps_for(kernel)) == ""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            "raises",
            "a working call of a full block (RuntimeError: no kernel image is available for execution on the de",
        ),
        ("top left", "right answers here (out of a diagonal with more keys is off by "),
        ("no window", "right answers here (out of a window is off by "),
        ("lse in log2", "right answers here (lse of a full block is off by "),
        ("lse of the block", "right answers here (dq of a full block is off by "),
        ("no dk", "right answers here (dk of a full block is off by "),
        ("no softcap", "right answers here (out of a full block is off by "),
    ],
)
def test_an_error_is_found_and_named(error: str, words: str) -> None:
    request, kernel = REQUEST._replace(softcap=error == "no softcap"), Wrong(error)
    assert wrong(kernel, request, calls_for(request, kernel)).startswith(words)


def test_a_right_kernel_is_finite_for_low_logits() -> None:
    for kernel in RIGHT:
        assert fragile(kernel, REQUEST) == ""


def test_nan_where_all_logits_of_a_row_are_low_is_found_by_no_other_trial() -> None:
    kernel = Wrong("nan for low rows")
    assert wrong(kernel, REQUEST, calls_for(REQUEST, kernel)) == ""
    assert fragile(kernel, REQUEST) == "finite answers here (dq of a full block of low logits is not)"
    assert tried(kernel, REQUEST).wrong == fragile(kernel, REQUEST)
    assert fragile(Wrong("raises"), REQUEST).startswith("a working call of a full block of low logits (RuntimeError:")


def test_a_kernel_that_was_compiled_for_another_softcap_is_found() -> None:
    class Stuck(Wrong):
        softcap: float | None = None

        def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, scores: Scores) -> tuple[Tensor, Tensor]:
            self.softcap = self.softcap or scores.softcap
            return super().forward(q, k, v, call, scores._replace(softcap=self.softcap))

    request, kernel = REQUEST._replace(softcap=True), Stuck("")
    assert wrong(kernel, request, calls_for(request, kernel)).startswith("right answers here (out of a causal square")


def test_a_wrong_sign_of_infinity_shows_in_empty_segments_only() -> None:
    kernel = Wrong("inf")
    assert wrong(kernel, REQUEST, calls_for(REQUEST, kernel)) == ""
    assert wrong(kernel, REQUEST, gaps_for(kernel)) == "right answers here (lse of empty segments is off by nan)"


def test_only_what_is_declared_is_tried() -> None:
    square = Wrong("", square=True, varlen=False, window=False)
    assert list(calls_for(REQUEST, square)) == ["a full block", "a causal square"]
    assert gaps_for(square) == {}
    assert len(calls_for(REQUEST, Wrong(""))) == 7


def test_a_trial_is_made_once_for_a_kind_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Wrong("no dk")
    first = tried(kernel, REQUEST)
    assert first.rate == 0.0
    assert tried(kernel, REQUEST) is first


def test_a_rate_counts_the_unmasked_pairs_of_forward_and_backward() -> None:
    flop = 3.5 * 4 * 16 * 4 * (4096 * 4097 / 2)
    assert rate(ReferenceKernel(), REQUEST, lambda work, device: 2.0) == pytest.approx(flop / 2)
    runs: list[int] = []
    assert seconds(lambda: runs.append(1), "cpu", repeats=2) >= 0.0
    assert len(runs) == 3


class Failing(Wrong):
    """Fails once, in its calls of at least so many rows."""

    def __init__(self, error: Exception, rows: int = 0) -> None:
        super().__init__("nothing")
        self.raised, self.rows, self.times = error, rows, 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, scores: Scores) -> tuple[Tensor, Tensor]:
        if q.shape[1] >= self.rows and not self.times:
            self.times += 1
            raise self.raised
        return super().forward(q, k, v, call, scores)


SMALL = REQUEST._replace(heads=1, kv_heads=1)


@pytest.mark.parametrize("rows", [0, 4096], ids=["a small call", "the block that is timed"])
def test_a_trial_without_room_says_so_and_is_made_again(rows: int) -> None:
    """A slower kernel was taken for the rest of the process, without a word."""
    kernel = Failing(torch.OutOfMemoryError("out of memory"), rows)
    with pytest.raises(torch.OutOfMemoryError):
        tried(kernel, SMALL)
    assert tried(kernel, SMALL).wrong == ""


@pytest.mark.parametrize("rows", [0, 192, 4096], ids=["a small call", "low logits", "the block that is timed"])
def test_a_kernel_that_breaks_the_device_is_named_and_no_other_is_blamed(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an illegal access every kernel fails: the next one was said to be wrong, or its error ended the choice."""

    def touch(device: str) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("seqpar_ring.kernels.trial._touch", touch)
    with pytest.raises(UnsupportedError, match='kernel "wrong" broke the device when it was tried') as raised:
        tried(Failing(RuntimeError("an illegal memory access"), rows), SMALL)
    assert "an illegal memory access" in str(raised.value)


def test_a_kernel_that_fails_only_where_it_is_timed_is_passed_over() -> None:
    """Its error ended the choice, though others could do the work."""
    found = tried(Failing(RuntimeError("too many blocks"), 4096), SMALL)
    assert found.wrong == "a working call of 4096 rows (RuntimeError: too many blocks)"
    assert found.rate == 0.0


def test_a_trial_under_autocast_is_compared_with_the_truth_in_full() -> None:
    """Matrix products of the reference were 16 bits wide there, and a right kernel nearly out of bounds."""
    products: list[torch.dtype] = []

    class Watching(Wrong):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, scores: Scores) -> tuple[Tensor, Tensor]:
            products.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
            return super().forward(q, k, v, call, scores)

    with torch.autocast("cpu", torch.bfloat16):
        assert tried(Watching("nothing"), SMALL).wrong == ""
    assert set(products) == {torch.float32}


def test_gradients_that_are_left_unwritten_are_not_right_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is often 0, which is what keys without queries get."""
    left: list[Tensor] = []
    full = torch.full_like
    monkeypatch.setattr(torch, "full_like", lambda *args: left.append(full(*args)) or left[-1])
    assert wrong(Wrong("nothing"), SMALL, gaps_for(Wrong("nothing"))) == ""
    sizes = {tuple(x.shape[1:]) for x in left if bool(x.isnan().all())}
    assert {(73, 1, 16), (90, 1, 16)} <= sizes
