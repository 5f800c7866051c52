"""One block kernel for all who are compared on a CPU: torch's CPU flash operator, by the names that others call.

Packages for GPUs call flash-attn, which has no CPU build. So that their loops can be timed beside ours on the same
work, this gives them what flash-attn 2.8 gives: its names, layouts and log-sum-exp, computed by the operator that ours
runs on. It stands in `sys.modules` only while such a package is imported. It knows causal and full blocks of one
document and refuses everything else; a causal block with fewer queries than keys is a full part and a square one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from seqpar_ring.errors import UnsupportedError
from seqpar_ring.kernels.merge import merge_

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Three = tuple[Tensor, Tensor, Tensor]
"""q_BSHD, k_BSGD, v_BSGD, or their gradients."""

Arguments = tuple[Tensor, Any, Any, Any]
"""What flash-attn's private forward functions return: out, lse, and two for dropout."""


def attend(qkv: Three, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(out_BSHD, lse_BHS fp32) of one block; a causal one is aligned at its last row and column, as in flash-attn."""
    q, k, v = (x.transpose(1, 2) for x in qkv)
    before = _before(qkv, causal)
    out, lse = FORWARD(q, k[:, :, before:], v[:, :, before:], 0.0, causal, scale=scale)
    out = out.transpose(1, 2)
    if before:
        seen, seen_lse = FORWARD(q, k[:, :, :before], v[:, :, :before], 0.0, False, scale=scale)
        wide = out.float()
        merge_(wide, lse, seen.transpose(1, 2), seen_lse)
        out = wide.to(out.dtype)
    return out, lse


def differentiate(dout: Tensor, qkv: Three, kept: tuple[Tensor, Tensor], causal: bool, scale: float) -> Three:
    """(dq, dk, dv) of one block, laid out as q, k, v; `kept` is (out_BSHD, lse_BHS) of the block or of whole rows."""
    q, k, v = (x.transpose(1, 2) for x in qkv)
    dout, out, lse = dout.transpose(1, 2), kept[0].transpose(1, 2), kept[1]
    before = _before(qkv, causal)

    def part(columns: slice, causal: bool) -> Three:
        keys, values = k[:, :, columns], v[:, :, columns]
        return tuple(x.transpose(1, 2) for x in BACKWARD(dout, q, keys, values, out, lse, 0.0, causal, scale=scale))

    dq, dk, dv = part(slice(before, None), causal)
    if before:
        seen_dq, *seen_dkv = part(slice(before), False)
        dq = dq + seen_dq
        dk, dv = (torch.cat(pair, 1) for pair in zip(seen_dkv, (dk, dv), strict=True))
    return dq, dk, dv


def _before(qkv: Three, causal: bool) -> int:
    """Keys that all queries of a causal block see."""
    before = qkv[1].shape[1] - qkv[0].shape[1] if causal else 0
    if before < 0:
        raise UnsupportedError(
            "a causal block has more queries than keys",
            fix="The stand-in for flash-attn knows blocks of one document only.",
            queries=qkv[0].shape[1],
            keys=qkv[1].shape[1],
        )
    return before


class _Attention(torch.autograd.Function):
    """`attend` with its gradient, for those who leave backward to autograd."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """See `attend`."""
        out, lse = attend((q, k, v), causal, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal, ctx.scale = causal, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """See `differentiate`."""
        q, k, v, out, lse = ctx.saved_tensors
        return *differentiate(dout, (q, k, v), (out, lse), ctx.causal, ctx.scale), None, None


def block(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scaling: float | None, **_: Any) -> tuple[Tensor, Tensor]:
    """(out_BSHD, lse_BHS) with autograd: as ringmaster's loops take a kernel."""
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    out, lse = _Attention.apply(q, k, v, causal, scale)
    return out, lse


# ------------------------------------------------------------------------------------ flash-attn's names and signatures
def _flash_attn_forward(  # noqa: PLR0913 - flash-attn's signature
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> Arguments:
    _plain(dropout_p, (window_size_left, window_size_right), softcap, alibi_slopes)
    return *attend((q, k, v), causal, softmax_scale), None, None


def _flash_attn_backward(  # noqa: PLR0913 - flash-attn's signature
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
) -> None:
    _plain(dropout_p, (window_size_left, window_size_right), softcap, alibi_slopes)
    found = differentiate(dout, (q, k, v), (out, softmax_lse), causal, softmax_scale)
    for buffer, gradient in zip((dq, dk, dv), found, strict=True):
        buffer.copy_(gradient)


def _flash_attn_varlen_forward(  # noqa: PLR0913 - flash-attn's signature
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    **_: Any,
) -> Arguments:
    _single(cu_seqlens_q, cu_seqlens_k)
    _plain(dropout_p, (window_size_left, window_size_right), softcap, alibi_slopes)
    out, lse = attend((q[None], k[None], v[None]), causal, softmax_scale)
    return out[0], lse[0], None, None


def _flash_attn_varlen_backward(  # noqa: PLR0913 - flash-attn's signature
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    **_: Any,
) -> None:
    _single(cu_seqlens_q, cu_seqlens_k)
    _plain(dropout_p, (window_size_left, window_size_right), softcap, alibi_slopes)
    kept = out[None], softmax_lse[None]
    found = differentiate(dout[None], (q[None], k[None], v[None]), kept, causal, softmax_scale)
    for buffer, gradient in zip((dq, dk, dv), found, strict=True):
        buffer.copy_(gradient[0])


def _plain(dropout: float, window: tuple[int, int], softcap: float, slopes: Tensor | None) -> None:
    if dropout or softcap or slopes is not None or any(side >= 0 for side in window):
        raise UnsupportedError(
            "the stand-in for flash-attn knows plain causal and full attention",
            fix="Install flash-attn on a machine with a GPU for the rest.",
            dropout=dropout,
            window=window,
            softcap=softcap,
        )


def _single(*boundaries: Tensor) -> None:
    if any(len(cu) != 2 for cu in boundaries):
        raise UnsupportedError(
            "the stand-in for flash-attn knows one document",
            fix="Install flash-attn on a machine with a GPU for packed documents.",
            documents=max(len(cu) for cu in boundaries) - 1,
        )


NAMES = (_flash_attn_forward, _flash_attn_backward, _flash_attn_varlen_forward, _flash_attn_varlen_backward)


@contextmanager
def standing_in() -> Iterator[None]:
    """While this is entered, `import flash_attn` finds the functions above. Those who did so keep them."""
    whole, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    modules = {module.__name__: module for module in (whole, interface)}
    for function in NAMES:
        setattr(interface, function.__name__, function)
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
    whole.flash_attn_interface = interface  # type: ignore[attr-defined]
    before = {name: sys.modules.pop(name) for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(before)
