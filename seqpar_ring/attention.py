"""Ring attention for users: one function, one torch operator with its backward.

`ring_attention` checks its arguments on every rank before anything travels, picks the kernel and calls the operator.
Attention is a registered operator (not a Python autograd function) because only operators can be kept by a selective
checkpoint policy; see `remat.py`. Algorithm: Ring Attention (arXiv 2310.01889) with the log-sum-exp merge of
FlashAttention (arXiv 2205.14135). This file holds no schedule and no kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from seqpar_ring import executor
from seqpar_ring.errors import PlanError, SeqparError, UnsupportedError
from seqpar_ring.kernels import Kept, Kernel, Request, Scores
from seqpar_ring.plan import Plan, plan_of


def ring_attention(  # noqa: PLR0913 - the public signature: three tensors, a plan, four named options
    q_BSHD: Tensor,
    k_BSGD: Tensor,
    v_BSGE: Tensor,
    plan: Plan,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention of this rank's queries over every rank's keys and values. Collective over the sequence group.

    Args:
        q_BSHD: queries of this rank's tokens, in the plan's order; float64, float32, bfloat16 or float16.
        k_BSGD: keys; G divides H (grouped queries).
        v_BSGE: values.
        plan: from `SequenceParallel.plan`, or the batch that `shard_batch` made.
        scale: factor of the logits; 1 / sqrt(D) if not given.
        softcap: logits become `softcap * tanh(logits / softcap)`, as in Gemma 2; positive.
        sinks: not supported in this version.
        return_lse: also return the log-sum-exp of each query's logits.

    Returns:
        out_BSHE in q's dtype; with `return_lse` also lse_BHS in fp32 (fp64 for fp64), natural logarithm, without
        gradient.

    Raises:
        PlanError: shapes that do not fit the plan or each other.
        UnsupportedError: no kernel can do this exactly; says what each one lacks.
        DisagreementError: ranks called with different shapes, dtypes, lengths or settings; raised on every rank.
        TransportError: a rank died or did not arrive within the timeout.
    """
    problem: SeqparError | None = None
    kernel: Kernel | None = None
    try:
        _check(q_BSHD, k_BSGD, v_BSGE, plan, sinks)
        if softcap is not None and not softcap > 0:
            raise PlanError("softcap must be positive", fix="Give None for no cap.", softcap=softcap)
        kernel = plan.kernel(_request(q_BSHD, k_BSGD, v_BSGE, plan, softcap)).kernel
    except SeqparError as error:
        problem = error
    scale = q_BSHD.shape[-1] ** -0.5 if scale is None else float(scale)
    record = _record((q_BSHD, k_BSGD, v_BSGE), plan, scale, softcap)
    # On a GPU a handshake in every layer would stall the stream, so there only what is new is agreed upon.
    if problem or not q_BSHD.is_cuda or plan.documents.first_time(repr(record)):
        plan.ring.agree("ring_attention", record, problem)
    assert kernel is not None  # agree raised otherwise
    out, lse = _attention(q_BSHD, k_BSGD, v_BSGE, plan.handle, scale, softcap)
    return (out, lse.detach()) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor, plan: Plan, sinks: Tensor | None) -> None:
    if sinks is not None:
        raise UnsupportedError(
            "attention sinks are not supported in this version",
            fix="Use a model without sinks.",
            sinks=tuple(sinks.shape),
        )
    shapes = {"q": tuple(q.shape), "k": tuple(k.shape), "v": tuple(v.shape)}
    if any(len(shape) != 4 for shape in shapes.values()):
        raise PlanError("q, k and v are not (batch, tokens, heads, width)", fix="Transpose or unsqueeze.", **shapes)
    if k.shape[:3] != v.shape[:3] or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise PlanError("q, k and v do not fit each other", fix="Give q (B,S,H,D), k (B,S,G,D), v (B,S,G,E).", **shapes)
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise PlanError("key/value heads must divide query heads", fix="Give k and v un-repeated.", **shapes)
    if q.shape[1] != plan.local_tokens:
        raise PlanError(
            "q, k and v do not hold this rank's tokens of the plan",
            fix="Shard them with plan.shard, or make a plan for these lengths.",
            **shapes,
            expected_tokens=plan.local_tokens,
            plan=plan,
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        kinds = {name: f"{x.dtype} on {x.device}" for name, x in (("q", q), ("k", k), ("v", v))}
        raise PlanError("q, k and v differ in dtype or device", fix="Cast them to one dtype and device.", **kinds)


def _request(q: Tensor, k: Tensor, v: Tensor, plan: Plan, softcap: float | None) -> Request:
    return Request(
        device=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        heads=q.shape[2],
        kv_heads=k.shape[2],
        window=plan.windowed,
        softcap=softcap is not None,
    )


def _record(
    qkv: tuple[Tensor, Tensor, Tensor], plan: Plan, scale: float, softcap: float | None
) -> Mapping[str, object]:
    """What the ranks must agree on: everything but the number of tokens, which the plan's lengths stand for."""
    q, k, v = qkv
    return {
        "lengths": plan.lengths,
        "mask": str(plan.mask),
        "settings": plan.documents.settings.model_dump(exclude={"timeout"}),
        "batch, heads, kv heads, key width, value width": (*q.shape[::2], *k.shape[2:], *v.shape[3:]),
        "dtype": str(q.dtype),
        "scale": scale,
        "softcap": softcap,
    }


@torch.library.custom_op(
    "seqpar_ring::attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, int plan, float scale, float? softcap) -> (Tensor, Tensor)",
)
def _attention(
    q: Tensor, k: Tensor, v: Tensor, plan: int, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    mine = plan_of(plan)
    kernel = mine.kernel(_request(q, k, v, mine, softcap)).kernel
    return executor.forward(mine, (q, k, v), kernel, Scores(scale, softcap))


@torch.library.custom_op(
    "seqpar_ring::attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int plan, float scale, float? softcap)"
    " -> (Tensor, Tensor, Tensor)",
)
def _attention_backward(  # noqa: PLR0913 - an operator takes tensors and plain values, one by one
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    mine = plan_of(plan)
    kernel = mine.kernel(_request(q, k, v, mine, softcap)).kernel
    return executor.backward(mine, dout, Kept(q, k, v, out, lse, None), kernel, Scores(scale, softcap))


@_attention.register_fake
def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, plan: int, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    B, S, H, _ = q.shape
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    return q.new_empty((B, S, H, v.shape[3])), q.new_empty((B, H, S), dtype=dtype)


@_attention_backward.register_fake
def _attention_backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, handle, *scores = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.plan, ctx.scores = plan_of(handle), scores  # holding the plan keeps its number valid until backward


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    grads = _attention_backward(dout, *ctx.saved_tensors, ctx.plan.handle, *ctx.scores)
    return (*grads, None, None, None)


_attention.register_autograd(_differentiate, setup_context=_keep)

OPERATOR = torch.ops.seqpar_ring.attention.default
"""The operator as dispatch modes see it: what a checkpoint policy keeps."""
