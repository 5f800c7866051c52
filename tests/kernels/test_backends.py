"""What the GPU's kernels hand to their libraries, what they make of a library that is not there, and the traps' proofs.

The contract suite runs all of them over stand-ins; here single arguments are looked at, and each trap is opened again
to see that the suite would notice.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stand_ins import AtenCudnn, AtenFlash, CudnnFrontend, FlashAttn2, FlashAttn3, FlashAttn3Of2025, FlashAttn4, StandIn
from torch import Tensor

from seqpar_ring.errors import PlanError, UnsupportedError
from seqpar_ring.geometry import INF
from seqpar_ring.kernels import (
    CudnnKernel,
    Flash2Kernel,
    Flash3Kernel,
    Flash4Kernel,
    Kept,
    Kernel,
    ReferenceKernel,
    Resting,
    Scores,
    TorchCudnnKernel,
    TorchFlashKernel,
    flash2,
    flash4,
    library,
    torch_flash,
    varlen,
)
from seqpar_ring.kernels.library import NO_GPU, Library
from seqpar_ring.kernels.squares import Squares
from seqpar_ring.kernels.varlen import VarlenKernel, pack
from seqpar_ring.schedule import Call

SQUARE = Call(0, 0, INF, 0, (0, 9), (0, 9))
VARLEN: dict[str, tuple[type[VarlenKernel], type[StandIn]]] = {
    "flash2": (Flash2Kernel, FlashAttn2),
    "flash3": (Flash3Kernel, FlashAttn3),
    "flash3 of 2025": (Flash3Kernel, FlashAttn3Of2025),
    "flash4": (Flash4Kernel, FlashAttn4),
    "torch_flash": (TorchFlashKernel, AtenFlash),
    "cudnn": (CudnnKernel, CudnnFrontend),
}


def inputs(m: int, n: int, heads: tuple[int, int] = (4, 2), widths: tuple[int, int] = (8, 8)) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    shapes = (m, heads[0], widths[0]), (n, heads[1], widths[0]), (n, heads[1], widths[1]), (m, heads[0], widths[1])
    return tuple(torch.randn(1, *shape, generator=generator).bfloat16() for shape in shapes)


def made(name: str) -> tuple[VarlenKernel, StandIn]:
    kernel, stand_in = VARLEN[name]
    there = stand_in()
    return kernel(there, ("cpu",)), there  # type: ignore[call-arg, arg-type]


def answers(kernel: Kernel, tensors: tuple[Tensor, ...], call: Call, scores: Scores) -> list[Tensor]:
    q, k, v, dout = tensors
    out, lse = kernel.forward(q, k, v, call, scores)
    kept = Kept(q, k, v, out.to(q.dtype), lse)
    return [out, lse, *kernel.backward(dout, kept, call, scores)]


def off(got: list[Tensor], want: list[Tensor]) -> float:
    """The worst relative error of out and gradients, and nan where other rows are empty."""
    if not torch.equal(got[1] == -torch.inf, want[1] == -torch.inf):
        return float("nan")
    pairs = [(x, y) for i, (x, y) in enumerate(zip(got, want, strict=True)) if i != 1]
    return max(float((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-9)) for x, y in pairs)


@pytest.mark.parametrize("name", VARLEN)
@pytest.mark.parametrize("widths", [(20, 20), (24, 16), (16, 24), (192, 128)], ids=str)
def test_widths_that_the_library_does_not_take_are_padded_and_cut_off_again(name: str, widths: tuple[int, int]) -> None:
    kernel, _ = made(name)
    kernel.capabilities = replace(kernel.capabilities, max_head_dim=256)
    heads = (4, 4) if widths == flash4.LATENT else (4, 2)
    tensors, scores = inputs(9, 9, heads, widths), Scores(0.2)
    got = answers(kernel, tensors, SQUARE, scores)
    want = answers(ReferenceKernel(), tensors, SQUARE, scores)
    assert [x.shape for x in got] == [x.shape for x in want]
    assert off(got, want) < 1e-2


def test_latent_attention_goes_to_flash_attention_4_unpadded() -> None:
    kernel, there = made("flash4")
    q, k, v, _ = inputs(9, 9, (4, 4), flash4.LATENT)
    kernel.forward(q, k, v, SQUARE, Scores(0.2))
    assert [x.shape[-1] for x in there.calls[0][1]] == [192, 192, 128]
    q, k, v, _ = inputs(9, 9, (4, 2), flash4.LATENT)
    with pytest.raises(UnsupportedError, match=r"head width 192 .*no query heads share a key head"):
        kernel.forward(q, k, v, SQUARE, Scores(0.2))


@pytest.mark.parametrize(
    ("version", "softcap"), [("4.0.0b18", False), ("4.0.0b23", False), ("4.0.0b24", True), ("4.0.0", True), ("", True)]
)
def test_a_beta_of_flash_attention_4_whose_backward_takes_no_softcap_says_so(version: str, softcap: bool) -> None:
    class Beta(FlashAttn4):
        @property
        def version(self) -> str:
            return version

    assert Flash4Kernel(Beta(), ("cpu",)).capabilities.softcap is softcap


@pytest.mark.parametrize("name", VARLEN)
def test_a_batch_becomes_more_segments(name: str) -> None:
    kernel, there = made(name)
    q, k, v, _ = (x.expand(3, -1, -1, -1) for x in inputs(9, 9))
    out, _ = kernel.forward(q, k, v, SQUARE, Scores(0.2))
    cu = [x for x in (*there.calls[0][1], *there.calls[0][2].values()) if isinstance(x, Tensor) and x.dim() == 1]
    assert [x.tolist() for x in cu] == [[0, 9, 18, 27]] * 2
    assert torch.equal(out[0], out[2])


@pytest.mark.parametrize("name", VARLEN)
def test_a_plans_lengths_go_to_the_device_once(name: str) -> None:
    """For layers whose heads have other widths, too."""
    kernel, there = made(name)
    for width in (8, 8, 16):
        kernel.forward(*inputs(9, 9, widths=(width, width))[:3], SQUARE, Scores(0.2))
    first, second, wider = (
        [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() == 1 and x.dtype == torch.int32]
        for _, args, kwargs in there.calls
    )
    assert first
    assert all(a is b is c for a, b, c in zip(first, second, wider, strict=True))


@pytest.mark.parametrize("name", VARLEN)
def test_where_only_delta_is_known_backward_takes_a_stand_in_for_out(name: str) -> None:
    kernel, _ = made(name)
    q, k, v, dout = inputs(9, 9)
    scores = Scores(0.2)
    out, lse = ReferenceKernel().forward(q, k, v, SQUARE, scores)
    delta = (dout.float() * out).sum(-1).transpose(1, 2)
    want = ReferenceKernel().backward(dout, Kept(q, k, v, None, lse, delta), SQUARE, scores)
    got = kernel.backward(dout, Kept(q, k, v, None, lse, delta), SQUARE, scores)
    assert all(float((x - y).norm() / y.norm()) < 2e-2 for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("name", ["flash2", "torch_flash"])
@pytest.mark.parametrize(
    ("call", "trap"),
    [
        (Call(0, 0, INF, 8, (0, 10), (0, 4)), "a right side as wide as the keys is dropped"),
        (Call(0, 0, 3, INF, (0, 10), (0, 4)), "a side that cuts nothing becomes as wide as the keys"),
        (Call(0, 0, INF, INF, (0, 1, 1, 2), (0, 3, 5, 9)), "segments of one query beside empty ones"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_flash_attention_2_answers_wrongly_without_our_bounds_and_rightly_with_them(
    name: str, call: Call, trap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, scores = inputs(call.cu_q[-1], call.cu_k[-1]), Scores(0.2)
    want = answers(ReferenceKernel(), tensors, call, scores)
    assert off(answers(made(name)[0], tensors, call, scores), want) < 1e-2
    for module in (flash2, torch_flash):
        monkeypatch.setattr(module, "bounded", lambda packed: packed)
    assert not off(answers(made(name)[0], tensors, call, scores), want) < 1e-2


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=4),
    st.sampled_from([INF, 0, 2]),
    st.sampled_from([INF, 0, 1, 3]),
)
def test_a_call_is_blind_where_a_query_sees_nothing(segments: list[tuple[int, int]], left: int, right: int) -> None:
    cu_q, cu_k = (tuple(itertools.accumulate(lengths, initial=0)) for lengths in zip(*segments, strict=True))
    blind = any(
        not any(-left <= j - i - (n - m) <= right for j in range(n)) for m, n in segments for i in range(m)
    )
    assert pack(Call(0, 0, left, right, cu_q, cu_k), 1, torch.device("cpu")).blind == blind


@pytest.mark.parametrize("name", VARLEN)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("value_width", [8, 6])
@pytest.mark.parametrize("side", ["q", "k"])
def test_what_comes_into_the_same_memory_next_is_read_anew(name: str, batch: int, value_width: int, side: str) -> None:
    """Within a pass rows come into the same tensors again, and views of tensors are made once: copies must not be."""
    kernel, _ = made(name)
    scores = Scores(0.2, resting=Resting(side, {}, {}))
    q, k, v, dout = (torch.cat([x] * batch) for x in inputs(9, 9, widths=(8, value_width)))
    out, lse = torch.zeros_like(dout), torch.zeros(batch, 4, 9)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for x in (k, v) if side == "q" else (q, dout):
            x.copy_(torch.randn(x.shape, generator=generator))
        if side == "k" or not seed:
            for there, x in zip((out, lse), ReferenceKernel().forward(q, k, v, SQUARE, Scores(0.2)), strict=True):
                there.copy_(x)
        kept = Kept(q, k, v, out, lse)
        got, want = (
            [*one.forward(q, k, v, SQUARE, how), *one.backward(dout, kept, SQUARE, how)]
            for one, how in ((kernel, scores), (ReferenceKernel(), Scores(0.2)))
        )
        assert off(got, want) < 2e-2


def test_views_of_what_a_pass_gives_again_are_made_once() -> None:
    kernel, there = made("torch_flash")
    q, k, v, _ = inputs(9, 9)
    again, other = Scores(0.2, resting=Resting("q", {}, {})), Scores(0.2, resting=Resting("q", {}, {}))
    for scores in (again, again, other):
        kernel.forward(q, k, v, SQUARE, scores)
    first, second, third = (call[1][:3] for call in there.calls)
    assert all(x is y for x, y in zip(first, second, strict=True))
    assert not any(x is y for x, y in zip(first, third, strict=True)), "another pass, whose memory is another"


@pytest.mark.parametrize("name", VARLEN)
@pytest.mark.parametrize("value_width", [8, 6])  # of which most pad the second
@pytest.mark.parametrize("side", ["q", "k"])
def test_no_memory_that_a_call_makes_is_held_for_the_pass(name: str, side: str, value_width: int) -> None:
    """But for log-sum-exps where they rest, which are small."""
    kernel, _ = made(name)
    resting = Resting(side, {}, {})
    q, k, v, dout = inputs(9, 9, widths=(8, value_width))
    out, lse, delta = torch.zeros_like(dout), torch.zeros(1, 4, 9), torch.zeros(1, 4, 9)
    for kept in (Kept(q, k, v, out, lse), Kept(q, k, v, None, lse, delta)):
        for grad in (dout, dout.float()):
            kernel.backward(grad, kept, SQUARE, Scores(0.2, resting=resting))
    held = {x.data_ptr() for pair in resting.views.values() for x in pair}
    assert {x.data_ptr() for x in (q, k)} <= held
    small = {flat.data_ptr() for x, flat in resting.views.values() if x is lse}
    assert len(small) == (side == "q")
    assert held - small <= {x.data_ptr() for x in (q, k, v, dout, out, lse)}, "and nothing of what was made"


@pytest.mark.parametrize("batch", [1, 2])
def test_log_sum_exps_that_are_kept_for_a_pass_are_few_however_many_ranges_of_rows_it_has(batch: int) -> None:
    kernel, there = made("torch_flash")
    resting = Resting("q", {}, {})
    q, k, v, dout = (torch.cat([x] * batch) for x in inputs(9, 9))
    lse = torch.randn(batch, 4, 9)
    ranges = [(a, b) for a in range(9) for b in range(a + 1, 10)]
    rows = {at: [x[:, slice(*at)] for x in (q, dout)] + [lse[:, :, slice(*at)]] for at in ranges}
    for _ in range(2):
        for a, b in ranges:
            q_rows, dout_rows, lse_rows = rows[a, b]
            call, kept = Call(a, 0, INF, INF, (0, b - a), (0, 9)), Kept(q_rows, k, v, dout_rows, lse_rows)
            kernel.backward(dout_rows, kept, call, Scores(0.2, resting=resting))
            given = there.calls[-1][1][5]
            assert torch.equal(given, lse_rows.transpose(0, 1).reshape(4, batch * (b - a)))
    of_lse = [flat for x, flat in resting.views.values() if x.dtype == torch.float32]
    assert 0 < sum(x.nbytes for x in of_lse) <= 2 * lse.nbytes


@pytest.mark.parametrize("name", ["flash2", "torch_flash"])  # whose lse of such a row is +inf
def test_a_call_that_is_taken_to_see_all_is_answered_wrongly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, scores = Call(0, 0, INF, 0, (0, 9), (0, 4)), Scores(0.2)
    tensors = inputs(9, 4)
    want = answers(ReferenceKernel(), tensors, call, scores)
    assert off(answers(made(name)[0], tensors, call, scores), want) < 1e-2
    monkeypatch.setattr(varlen, "pack", lambda *some: pack(*some)._replace(blind=False))
    assert not off(answers(made(name)[0], tensors, call, scores), want) < 1e-2


def test_a_window_is_written_as_each_library_reads_it() -> None:
    packed = pack(Call(0, 0, 4, 0, (0, 9), (0, 9)), 1, torch.device("cpu"))
    assert (packed.left, packed.right, packed.causal) == (4, 0, False)
    packed = pack(Call(0, 0, INF, 0, (0, 9), (0, 9)), 1, torch.device("cpu"))
    assert (packed.left, packed.right, packed.causal) == (-1, 0, True)
    kernel, there = made("flash4")
    q, k, v, _ = inputs(9, 9)
    for call in (SQUARE, SQUARE._replace(left=4), SQUARE._replace(right=INF), SQUARE._replace(right=2)):
        kernel.forward(q, k, v, call, Scores(0.2))
    sides = [
        tuple(kw[name] for name in ("causal", "window_size_left", "window_size_right")) for _, _, kw in there.calls
    ]
    assert sides == [(True, None, None), (False, 4, 0), (False, None, None), (False, None, 2)]


@pytest.mark.parametrize("name", ["flash2", "flash3", "flash4"])
def test_deterministic_algorithms_are_asked_for(name: str) -> None:
    kernel, there = made(name)
    answers(kernel, inputs(9, 9), SQUARE, Scores(0.2))  # conftest turns them on
    assert there.calls[1][2]["deterministic"] is True


def test_cudnns_padded_rows_are_few_however_unequal_documents_are() -> None:
    kernel, there = made("cudnn")
    lengths = [1 + i % 3 for i in range(40)] + [600] + [1 + i % 3 for i in range(9)]
    cu = tuple(itertools.accumulate(lengths, initial=0))
    call, scores = Call(0, 0, INF, 0, cu, cu), Scores(0.2)
    tensors = inputs(cu[-1], cu[-1])
    want = answers(ReferenceKernel(), tensors, call, scores)
    assert off(answers(Squares(kernel), tensors, call, scores), want) < 1e-2
    segments = [len(kw["cu_seqlens_q"]) - 1 for name, _, kw in there.calls if name == "sdpa_fwd"]
    assert sorted(segments) == [1, 17, 32]  # of 600 tokens, one, and two or three
    there.calls.clear()
    even = Call(0, 0, INF, 0, (0, 300, 601), (0, 300, 601))
    answers(Squares(kernel), inputs(601, 601), even, scores)
    assert len([name for name, *_ in there.calls if name == "sdpa_fwd"]) == 1


def test_the_dense_kernel_refuses_several_segments_by_itself() -> None:
    kernel = TorchCudnnKernel(AtenCudnn(), ("cpu",))
    q, k, v, _ = inputs(9, 9)
    with pytest.raises(PlanError, match=r"takes one segment \[segments=2\]"):
        kernel.forward(q, k, v, Call(0, 0, INF, 0, (0, 4, 9), (0, 4, 9)), Scores(0.2))


def test_a_block_of_one_row_does_not_go_to_cudnns_dense_operator() -> None:
    kernel = TorchCudnnKernel(there := AtenCudnn(), ("cpu",))
    for m, n in ((1, 9), (9, 1)):
        tensors, call = inputs(m, n), Call(0, 0, INF, INF, (0, m), (0, n))
        got = answers(kernel, tensors, call, Scores(0.2))
        assert off(got, answers(ReferenceKernel(), tensors, call, Scores(0.2))) == 0.0
    assert there.calls == []


@pytest.mark.parametrize("dims", [3, 4], ids=["before torch 2.9", "since"])
def test_cudnns_backward_gets_lse_as_its_forward_gave_it_and_one_layout_of_dout(dims: int) -> None:
    class Release(AtenCudnn):
        def _scaled_dot_product_cudnn_attention(self, *args: Any, **kwargs: Any) -> tuple[Tensor | int | None, ...]:
            out, lse, *rest = super()._scaled_dot_product_cudnn_attention(*args, **kwargs)
            assert isinstance(lse, Tensor)
            return out, lse if dims == 4 else lse[..., 0], *rest

        def _scaled_dot_product_cudnn_attention_backward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
            dout, q, k, v, out, lse, *rest = args
            assert lse.dim() == dims
            assert all(x.transpose(1, 2).is_contiguous() for x in (dout, out))
            return super()._scaled_dot_product_cudnn_attention_backward(
                dout, q, k, v, out, lse if dims == 4 else lse.unsqueeze(-1), *rest, **kwargs
            )

    kernel, (q, k, v, dout) = TorchCudnnKernel(Release(), ("cpu",)), inputs(9, 9)
    by_head = dout.transpose(1, 2).contiguous().transpose(1, 2)
    for x in (dout, by_head, dout[:, :, :, :1].expand(dout.shape)):
        want = answers(ReferenceKernel(), (q, k, v, x), SQUARE, Scores(0.2))
        assert off(answers(kernel, (q, k, v, x), SQUARE, Scores(0.2)), want) < 1e-2


def test_cudnns_dense_operator_takes_what_is_given_up_to_its_device() -> None:
    kernel = TorchCudnnKernel(library.Aten("_scaled_dot_product_cudnn_attention"), ("cpu",))
    kernel.capabilities = replace(kernel.capabilities, absent="")
    q, k, v, dout = inputs(9, 9)
    with pytest.raises(NotImplementedError, match="CPU"):  # no TypeError of an argument before that
        kernel.forward(q, k, v, SQUARE, Scores(0.2))
    lse = torch.zeros(1, 4, 9)
    with pytest.raises(NotImplementedError, match="CPU"):
        kernel.backward(dout, Kept(q, k, v, q, lse, lse), SQUARE, Scores(0.2))


def test_torchs_flash_operator_takes_what_is_given_up_to_its_device() -> None:
    kernel = TorchFlashKernel(torch_flash.LIBRARY, ("cpu",))
    kernel.capabilities = replace(kernel.capabilities, absent="")
    q, k, v, dout = inputs(9, 9)
    with pytest.raises(NotImplementedError, match="CPU"):
        kernel.forward(q, k, v, SQUARE, Scores(0.2))
    lse = torch.zeros(1, 4, 9)
    with pytest.raises(NotImplementedError, match="CPU"):
        kernel.backward(dout, Kept(q, k, v, q, lse, lse), SQUARE, Scores(0.2))


def test_a_library_that_is_not_installed_is_named() -> None:
    assert Library("no-such-kernels", "no_such_kernels.interface", ("f",)).absent == "no-such-kernels (not installed)"
    assert Library("no-such-kernels", "no_such_kernels", ("f",)).absent == "no-such-kernels (not installed)"


def test_a_library_that_is_too_old_is_named_with_both_versions() -> None:
    assert Library("pytest", "pytest", (), oldest=(99, 1)).absent.startswith("pytest 99.1 or newer (has ")


def test_nothing_is_imported_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "import_module", lambda name: pytest.fail(f"imported {name}"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Library("pytest", "pytest", ("fixture",)).absent == NO_GPU


def test_a_library_that_fails_to_import_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_kernels.py").write_text("raise OSError('undefined symbol: _ZN3c10\\nand more')\n")
    (tmp_path / "bare_kernels.py").write_text("def forward(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    broken = Library("broken-kernels", "broken_kernels", ("forward",))
    assert broken.absent == "broken-kernels that imports (OSError: undefined symbol: _ZN3c10)"
    bare = Library("bare-kernels", "bare_kernels", ("forward", "backward"))
    assert bare.absent == "backward of bare_kernels (bare-kernels of an unknown version)"
    assert Library("bare-kernels", "bare_kernels", ("forward",)).function("forward")() is None


@pytest.mark.parametrize(
    "kernel", [Flash2Kernel(), Flash3Kernel(), Flash4Kernel(), CudnnKernel()], ids=lambda k: k.name
)
def test_a_kernel_whose_library_is_missing_refuses_by_its_name(kernel: Kernel) -> None:
    q, k, v, _ = inputs(9, 9)
    with pytest.raises(UnsupportedError, match=f'kernel "{kernel.name}" cannot compute this call: it lacks'):
        kernel.forward(q, k, v, SQUARE, Scores(0.2))
