"""On a GPU: the contract of each kernel that is there, the merge, and rings of threads; run by `make test-gpu`."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from seqpar_ring.geometry import INF
from seqpar_ring.kernels import Kernel, Request, Scores, architecture_of, lacks, registered, select
from seqpar_ring.kernels.gapless import Gapless
from seqpar_ring.kernels.merge import Part, fused, merge_, merge_parts_
from seqpar_ring.kernels.squares import Squares
from seqpar_ring.kernels.trial import calls_for, gaps_for, rate, wrong
from seqpar_ring.schedule import Call
from seqpar_ring.testing import Case, assert_matches_dense

pytestmark = pytest.mark.gpu
DEVICE = "cuda:0"


def request_of(head_dim: int, dtype: torch.dtype = torch.bfloat16, **more: bool) -> Request:
    sm = architecture_of(torch.device(DEVICE))
    return Request(DEVICE, dtype, head_dim, head_dim, 8, 2, architecture=sm, **more)


@pytest.mark.parametrize("kernel", [k for k in registered() if k.capabilities.priority >= 0], ids=lambda k: k.name)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("softcap", [False, True], ids=["plain", "softcap"])
def test_each_kernel_that_is_there_is_right(kernel: Kernel, head_dim: int, softcap: bool) -> None:
    request = request_of(head_dim, window=kernel.capabilities.window, softcap=softcap)
    if missing := lacks(kernel.capabilities, request):
        pytest.skip(f"{kernel.name} lacks {', '.join(missing)}")
    can = kernel.capabilities
    fitted = Squares(kernel) if can.square else kernel if can.empty_segments else Gapless(kernel)
    assert wrong(fitted, request, calls_for(request, kernel)) == ""
    assert wrong(fitted, request, gaps_for(kernel)) == ""
    assert rate(kernel, request) > 0


def test_auto_takes_one_that_is_no_fallback_and_says_how_fast_it_is() -> None:
    kernel, reason = select(request_of(128))
    assert kernel.name != "reference"
    assert "TFLOP/s here" in reason


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_parts_are_merged_in_one_pass_as_one_by_one() -> None:
    assert fused(), "Triton cannot compile here; the warning before says why"
    generator = torch.Generator().manual_seed(1)

    def some(rows: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.randn(2, rows, 3, 128, generator=generator).to(DEVICE, dtype)
        lse = torch.randn(2, 3, rows, generator=generator).to(DEVICE)
        hidden = torch.rand(2, 3, rows, generator=generator).to(DEVICE) < 0.3
        out[hidden.transpose(1, 2)] = 0.0
        return out, lse.masked_fill(hidden, -torch.inf)

    (out, lse), parts = some(97), [Part(2, *some(40)), Part(0, *some(97, torch.bfloat16)), Part(90, *some(7))]
    want_out, want_lse = out.clone(), lse.clone()
    for q0, part_out, part_lse in parts:
        rows = slice(q0, q0 + part_lse.shape[2])
        merge_(want_out[:, rows], want_lse[:, :, rows], part_out, part_lse)
    merge_parts_(out, lse, parts)
    torch.testing.assert_close(out, want_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")  # that it is a prototype
def test_a_call_that_was_made_before_does_not_wait_for_the_host() -> None:
    kernel, _ = select(request_of(128))
    q, k, v = (torch.randn(1, 256, h, 128, device=DEVICE, dtype=torch.bfloat16) for h in (8, 2, 2))
    call = Call(0, 0, INF, 0, (0, 256), (0, 256))
    first, _ = kernel.forward(q, k, v, call, Scores(0.1))
    try:
        torch.cuda.set_sync_debug_mode("error")  # the second call would raise
        second, _ = kernel.forward(q, k, v, call, Scores(0.1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)


def test_the_cpu_ring_is_what_it_was() -> None:
    """A machine with a GPU still runs rings on its CPU."""
    assert_matches_dense([67, 13], 2, Case())
