"""No kernel is chosen for what it would answer wrongly: whatever is asked, the choice is right or is refused.

All kernels stand in the registry as they declare themselves, those for GPUs over stand-ins for their libraries. What is
drawn (widths, dtypes, heads, masks, softcaps, position biases, documents) goes far beyond what any of them can do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stand_ins import gpu_kernels, only
from torch import Tensor

from seqpar_ring.errors import PlanError, UnsupportedError
from seqpar_ring.geometry import INF
from seqpar_ring.kernels import (
    CpuKernel,
    Kept,
    Kernel,
    ReferenceKernel,
    Request,
    Scores,
    register,
    select,
    unregister,
)
from seqpar_ring.kernels.base import wide
from seqpar_ring.schedule import Call

GPU = gpu_kernels()
NAMES = ("auto", "cpu", "reference", *(kernel.name for kernel in GPU))
BOUND = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Relative L2 of a tensor; a wrong mask, bias or scale is far above it."""


@pytest.fixture(scope="module", autouse=True)
def _on_stand_ins() -> Iterator[None]:
    with only((CpuKernel(), ReferenceKernel(), *GPU)):
        yield


class Asked(NamedTuple):
    """One call of attention, with all that a kernel may lack."""

    request: Request
    call: Call
    scores: Scores


@st.composite
def questions(draw: st.DrawFn) -> Asked:
    dtype = draw(st.sampled_from(list(BOUND)))
    D = draw(st.sampled_from([8, 16, 20, 64, 100, 128, 192, 256, 264]))
    E = draw(st.sampled_from([D, D, 8, 64, 128]))
    heads, kv_heads = draw(st.sampled_from([(2, 2), (4, 2), (3, 1)]))
    segments = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4))
    cu_q, cu_k = [0], [0]
    for m, n in segments:
        cu_q.append(cu_q[-1] + m)
        cu_k.append(cu_k[-1] + n)
    left, right = (draw(st.one_of(st.just(INF), st.integers(0, 6))) for _ in range(2))
    softcap = draw(st.sampled_from([None, None, 0.9]))
    slopes = torch.linspace(0.1, 1.0, heads, dtype=wide(dtype)) if draw(st.integers(0, 4)) == 0 else None
    scores = Scores(draw(st.sampled_from([0.1, 0.4])), softcap, slopes)
    if slopes is not None:
        scores = scores._replace(q_positions=torch.arange(cu_q[-1]) + 3, k_positions=torch.arange(cu_k[-1]))
    request = Request(
        "cpu", dtype, D, E, heads, kv_heads, left < INF, softcap is not None, slopes is not None, None, len(segments)
    )
    return Asked(request, Call(0, 0, left, right, tuple(cu_q), tuple(cu_k)), scores)


def answers(kernel: Kernel, asked: Asked) -> list[Tensor]:
    """out, lse, dq, dk, dv."""
    (_, dtype, D, E, H, G, *_), call = asked.request, asked.call
    generator = torch.Generator().manual_seed(11)
    m, n = call.cu_q[-1], call.cu_k[-1]
    q, k, v, dout = (
        torch.randn(1, *shape, generator=generator).to(dtype) for shape in ((m, H, D), (n, G, D), (n, G, E), (m, H, E))
    )
    out, lse = kernel.forward(q, k, v, call, asked.scores)
    final = out.to(dtype)
    return [final, lse, *kernel.backward(dout, Kept(q, k, v, final, lse), call, asked.scores)]


def off(got: list[Tensor], want: list[Tensor]) -> float:
    """The worst relative error (absolute below 1 a number: dq is 0 for one key); nan where other rows see nothing."""
    found = [0.0]
    for x, truth in zip(got, want, strict=True):
        hidden = truth == -torch.inf
        if x.shape != truth.shape or not torch.equal(x == -torch.inf, hidden):
            return float("nan")
        x, truth = (y.double().masked_fill(hidden, 0.0) for y in (x, truth))
        found.append(float((x - truth).norm() / truth.norm().clamp(min=max(1, x.numel()) ** 0.5)))
    return max(found)


def right(name: str, asked: Asked) -> bool:
    """Whether the choice answers rightly; a refusal is right."""
    try:
        kernel = select(asked.request, name).kernel
    except UnsupportedError:
        return True
    return off(answers(kernel, asked), answers(ReferenceKernel(), asked)) <= BOUND[asked.request.dtype]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(asked=questions())
def test_the_choice_is_right_or_is_refused(name: str, asked: Asked) -> None:
    assert right(name, asked), asked


WINDOWED = Asked(
    Request("cpu", torch.bfloat16, 64, 64, 4, 2, window=True), Call(0, 0, 2, 0, (0, 9), (0, 9)), Scores(0.4)
)
CAPPED = Asked(
    Request("cpu", torch.bfloat16, 64, 64, 4, 2, softcap=True), Call(0, 0, INF, 0, (0, 9), (0, 9)), Scores(0.4, 0.3)
)
DOCUMENTS = Asked(
    Request("cpu", torch.bfloat16, 64, 64, 4, 2, documents=2), Call(0, 0, INF, 0, (0, 5, 9), (0, 5, 9)), Scores(0.4)
)


def caught(name: str, asked: Asked) -> bool:
    """Whether a wrong claim shows: in the numbers, or in what the kernel or its library says to such a call."""
    try:
        return not right(name, asked)
    except (AssertionError, PlanError, TypeError):
        return True


@pytest.mark.parametrize(
    ("name", "claim", "asked"),
    [
        ("torch_flash", {"softcap": True}, CAPPED),
        ("cudnn", {"softcap": True}, CAPPED),
        ("torch_cudnn", {"softcap": True, "square": False}, CAPPED),
        ("torch_cudnn", {"varlen": True, "square": False}, DOCUMENTS),
        ("torch_cudnn", {"window": True, "square": False}, WINDOWED),
    ],
    ids=["softcap", "softcap, cudnn", "softcap, dense", "documents, dense", "window, dense"],
)
def test_a_kernel_that_claims_too_much_is_caught(
    name: str, claim: dict[str, bool], asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = next(kernel for kernel in GPU if kernel.name == name)
    assert right(name, asked), "as it declares itself"
    monkeypatch.setattr(kernel, "capabilities", replace(kernel.capabilities, **claim), raising=False)
    unregister(name)
    register(kernel)  # forgets what was chosen
    assert caught(name, asked)
    monkeypatch.undo()
    unregister(name)
    register(kernel)
