"""Ring attention for users: one function.

`ring_attention` checks its arguments on every rank before anything travels, picks the kernel and calls the operator.
Algorithm: Ring Attention (arXiv 2310.01889) with the log-sum-exp merge of FlashAttention (arXiv 2205.14135). This file
holds no schedule and no kernel.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from seqpar_ring import operator
from seqpar_ring.errors import PlanError, UnsupportedError
from seqpar_ring.kernels.base import Request, deterministic, wide
from seqpar_ring.plan import Plan
from seqpar_ring.reshard import shares

MOST_SEEN = 64
"""Kinds of calls that a plan remembers: layers differ in few ways, but a scale may be another number in each step."""


def ring_attention(  # noqa: PLR0913 - the public signature: three tensors, a plan, five named options
    q_BSHD: Tensor,
    k_BSGD: Tensor,
    v_BSGE: Tensor,
    plan: Plan,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention of this rank's queries over every rank's keys and values. Collective over the sequence group.

    There is no dropout: a layer that drops attention weights must be refused by its caller, or its rate set to 0.

    Args:
        q_BSHD: queries of this rank's tokens, in the plan's order; float64, float32, bfloat16 or float16.
        k_BSGD: keys; G divides H (grouped queries).
        v_BSGE: values; E may differ from D (as in multi-head latent attention).
        plan: from `SequenceParallel.plan`, or the batch that `shard_batch` made.
        scale: factor of the logits, positive; 1 / sqrt(D) if not given. It and softcap get no gradient.
        softcap: logits become `softcap * tanh(logits / softcap)`, as in Gemma 2; positive.
        sinks: (H,) one more logit for each head, whose value is zero (as in gpt-oss); differentiable. Its gradient
            is this rank's share, as that of any parameter which all ranks hold.
        alibi_slopes: (H,) or (B, H): `- slope * distance` is added to the logits (ALiBi, arXiv 2108.12409); they get no
            gradient.
        return_lse: also return the log-sum-exp of each query's logits, the sink's included.

    Returns:
        out_BSHE in q's dtype, not to be changed in place where a gradient is wanted; with `return_lse` also lse_BHS in
        fp32 (fp64 for fp64), natural logarithm, without gradient. A query that sees no key gets 0 and -inf.

    Raises:
        PlanError: shapes that do not fit the plan or each other; slopes that require a gradient.
        UnsupportedError: no kernel can do this exactly (says what each one lacks); a scale or softcap that requires a
            gradient; forward-mode differentiation.
        DisagreementError: ranks called with different shapes, dtypes, lengths or settings; raised on every rank.
        TransportError: a rank died, came too late, or failed in the middle of an earlier pass, or one of its threads is
            in a pass. Not over NCCL, which does not tell who waits: its watchdog ends the process after the timeout.
    """
    _expect_types(plan, q_BSHD, k_BSGD, v_BSGE)
    qkv = q_BSHD, k_BSGD, v_BSGE
    traits = _traits(qkv, scale, softcap, sinks, alibi_slopes)
    seen = None if traits is None else plan.seen.get(traits)
    if seen is None:
        seen, problem = _examined(qkv, plan, scale, softcap, sinks, alibi_slopes)
        if traits is not None and problem is None:
            if len(plan.seen) >= MOST_SEEN:
                plan.seen.clear()
            plan.seen[traits] = seen
    else:
        problem = _wrong_now(qkv, plan, seen.request)
    # On a GPU a handshake in every layer would stall the stream, so there only what is new is agreed upon.
    sequence = plan.sequence
    sequence.agree_at_first("ring_attention", seen.record, problem, always=not q_BSHD.is_cuda, known_as=seen.text)
    sequence.calls += 1
    out, lse = operator.attention(*qkv, sinks, alibi_slopes, plan.handle, seen.scale, seen.softcap)
    return (out, lse.detach()) if return_lse else out


class Examined(NamedTuple):
    """What a call comes to: the scale and softcap of its logits, what it needs from a kernel (None where something is
    wrong with it), and what ranks compare, also as text."""

    scale: float
    softcap: float | None
    request: Request | None
    record: Mapping[str, object]
    text: str


def _traits(qkv: tuple[Tensor, Tensor, Tensor], *rest: object) -> Hashable | None:
    """What the examination of a call depends on, where that is told quickly; None where it is not. `rest` are scale,
    softcap, sinks and slopes."""
    plain = all(type(x) in (Tensor, Parameter) for x in qkv) and all(x is None or type(x) is float for x in rest)
    if not plain or torch.compiler.is_compiling():
        return None
    kinds = tuple((x.shape, x.dtype, x.device, x.layout, x.requires_grad) for x in qkv)
    return kinds, rest, torch.is_grad_enabled(), deterministic()


def _examined(
    qkv: tuple[Tensor, Tensor, Tensor],
    plan: Plan,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
) -> tuple[Examined, Exception | None]:
    """What a call comes to, and what is wrong with it."""
    q, problem, request = qkv[0], None, None
    try:
        _check(*qkv, plan)
        _check_logits(qkv, scale, softcap, sinks, slopes)
        request = _of_own_heads(operator.request_for(*qkv, plan, softcap, slopes is not None), plan)
        plan.kernel(request)  # tried now, where an error is every rank's, and not within the pass
        scale, softcap = q.shape[-1] ** -0.5 if scale is None else float(scale), softcap and float(softcap)
    except Exception as error:  # whatever it is, the others must not wait for this rank
        problem = error
        scale = softcap = None  # which may be what is wrong
    options = {"scale": scale, "softcap": softcap, "sinks": sinks is not None, "ALiBi": slopes is not None}
    record = _record(qkv, plan, options, sinks)
    return Examined(scale or 0.0, softcap, request, record, repr(record)), problem


def _wrong_now(qkv: tuple[Tensor, Tensor, Tensor], plan: Plan, request: Request | None) -> Exception | None:
    """What is wrong with a call whose like was right: a kernel may have come or gone since, and tangents are each
    tensor's own."""
    try:
        assert request is not None
        plan.kernel(request)
    except Exception as error:  # whatever it is, the others must not wait for this rank
        return error
    return _tangents(*qkv)


def _of_own_heads(request: Request, plan: Plan) -> Request:
    """The same of the heads that this rank computes, where ranks share them out.

    Raises:
        UnsupportedError: they cannot be shared out evenly.
    """
    members = plan.documents.members
    if members is None:
        return request
    (first, end), (kv_first, kv_end) = (
        of[members.rank] for of in shares(request.heads, request.kv_heads, members.world)
    )
    return request._replace(heads=end - first, kv_heads=kv_end - kv_first)


def _expect_types(plan: object, *tensors: object) -> None:
    if not isinstance(plan, Plan):
        fix = "Give sp.plan(lengths), or the plan that shard_batch put into the batch."
        raise PlanError("ring_attention was given no plan", fix=fix, given=type(plan).__name__)
    if not all(isinstance(x, Tensor) for x in tensors):
        kinds = [type(x).__name__ for x in tensors]
        error = PlanError("q, k and v are not torch tensors", fix="Make them some: torch.as_tensor(q).", given=kinds)
        plan.sequence.agree("ring_attention", {}, error)  # raises it, here and on every other rank
    if any(isinstance(x, Tensor) and x.is_nested for x in tensors):  # they have no shape to speak of
        error = PlanError("q, k and v are nested tensors", fix="Give documents one after the other, and their lengths.")
        plan.sequence.agree("ring_attention", {}, error)


def _check(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> None:
    shapes = {"q": tuple(q.shape), "k": tuple(k.shape), "v": tuple(v.shape)}
    if any(len(shape) != 4 for shape in shapes.values()):
        raise PlanError("q, k and v are not (batch, tokens, heads, width)", fix="Transpose or unsqueeze.", **shapes)
    crossed = plan.documents.kv_lengths is not None
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise PlanError("q, k and v do not fit each other", fix="Give q (B,S,H,D), k (B,S,G,D), v (B,S,G,E).", **shapes)
    if not crossed and q.shape[1] != k.shape[1]:
        raise PlanError("q, k and v do not fit each other", fix="Give q (B,S,H,D), k (B,S,G,D), v (B,S,G,E).", **shapes)
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise PlanError("key/value heads must divide query heads", fix="Give k and v un-repeated.", **shapes)
    if q.shape[1] != plan.local_tokens or k.shape[1] != plan.local_keys:
        raise PlanError(
            "q, k and v do not hold this rank's tokens of the plan",
            fix="Shard them with plan.shard (keys of cross-attention with plan.shard_keys), or plan for these lengths.",
            **shapes,
            expected_tokens=plan.local_tokens,
            **({"expected_keys": plan.local_keys} if crossed else {}),
            plan=plan,
        )
    if not q.layout == k.layout == v.layout == torch.strided:
        raise PlanError("q, k and v are not dense", fix="Give x.to_dense().", layouts=[q.layout, k.layout, v.layout])
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        kinds = {name: f"{x.dtype} on {x.device}" for name, x in (("q", q), ("k", k), ("v", v))}
        raise PlanError("q, k and v differ in dtype or device", fix="Cast them to one dtype and device.", **kinds)
    if not plan.sequence.carries(q.device):
        raise PlanError(
            f"the process groups carry no messages from a {q.device.type} device",
            fix='Move the model and its batches, or start torch.distributed with "cpu:gloo,cuda:nccl", which has both.',
            device=q.device,
        )
    if q.shape[3] == 0:
        raise PlanError("q and k have no width", fix="Give heads of a width of at least 1.", **shapes)


def _is_positive(value: object, dtype: torch.dtype) -> bool:
    """Whether this is one positive finite number, of Python, numpy or torch, and still is where logits are made."""
    limits = torch.finfo(wide(dtype))
    try:
        return not isinstance(value, (bool, str)) and limits.tiny <= float(cast(float, value)) <= limits.max
    except (TypeError, ValueError, RuntimeError):
        return False


def _check_logits(
    qkv: tuple[Tensor, Tensor, Tensor],
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
) -> None:
    q = qkv[0]
    B, _, H, _ = q.shape
    numbers: dict[str, Any] = {"scale": scale, "softcap": softcap}
    for name, value in numbers.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise UnsupportedError(f"{name} has no gradient here", fix=f"Detach it; a learned {name} is not supported.")
        if value is not None and not _is_positive(value, q.dtype):
            fix = "Give a positive finite number, also in the dtype of the logits, or None for the usual one."
            raise PlanError(f"{name} must be a positive number", fix=fix, **{name: value})
    if any(x is not None and not isinstance(x, Tensor) for x in (sinks, slopes)):
        given = type(sinks).__name__, type(slopes).__name__
        raise PlanError("sinks and alibi_slopes are tensors", fix="Make them some: torch.as_tensor.", given=given)
    if (problem := _tangents(*qkv, sinks, slopes)) is not None:
        raise problem
    if sinks is not None and (tuple(sinks.shape) != (H,) or not sinks.is_floating_point() or sinks.device != q.device):
        raise PlanError(
            "sinks are not one number for each query head, on q's device",
            fix="Give a floating tensor of shape (heads,).",
            sinks=tuple(sinks.shape),
            dtype=sinks.dtype,
            device=sinks.device,
            heads=H,
        )
    if slopes is not None and (tuple(slopes.shape) not in ((H,), (B, H)) or slopes.device != q.device):
        raise PlanError(
            "alibi_slopes are not one number for each query head, on q's device",
            fix="Give a tensor of shape (heads,) or (batch, heads).",
            alibi_slopes=tuple(slopes.shape),
            batch=B,
            heads=H,
        )
    if slopes is not None and slopes.requires_grad:
        raise PlanError("alibi_slopes have no gradient here", fix="Detach them; learned slopes are not supported.")


def _tangents(*tensors: Tensor | None) -> UnsupportedError | None:
    """What is wrong where one of them is differentiated forward."""
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        return UnsupportedError("ring attention has no forward-mode derivative", fix="Use torch.autograd.grad.")
    return None


def _record(
    qkv: tuple[Tensor, Tensor, Tensor], plan: Plan, options: Mapping[str, object], sinks: Tensor | None
) -> Mapping[str, object]:
    """What the ranks must agree on: everything but the number of tokens, which the plan's lengths stand for."""
    q, k, v = qkv
    return {
        **plan.agreed,
        "batch, heads, kv heads, key width, value width": (*q.shape[::2], *k.shape[2:], *v.shape[3:]),
        "dtype": str(q.dtype),
        "device": q.device.type,
        "gradients": torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (*qkv, sinks)),
        **options,
    }
