"""The operator: attention over a plan as one torch operator with its backward.

Attention is a registered operator and not a Python autograd function: `remat` tells it from the other operators of a
layer and hands its results back, and torch.compile leaves it as it is. What surrounds the ring is here: sharing out
heads before it and back after it (inside the operator, so that a recomputed layer does not do it again), sinks, and the
choice of what travels in backward. It checks nothing (`ring_attention` has) but that ranks run the same backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from seqpar_ring import executor
from seqpar_ring.kernels import Kept, Request, Scores, architecture_of, deterministic
from seqpar_ring.kernels.delta import delta_of
from seqpar_ring.plan import TRAVELS, Plan, plan_of
from seqpar_ring.reshard import Heads, Share, Tensors, shares, to_heads, to_tokens

Results = TypeVar("Results")

UNKNOWN = -1
"""In place of the number of a call of attention."""

SCHEMA = "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? slopes, int plan, float scale, float? softcap"


def request_for(q: Tensor, k: Tensor, v: Tensor, plan: Plan, softcap: float | None, alibi: bool) -> Request:
    """What these tensors under this plan need from a kernel."""
    return Request(
        device=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        heads=q.shape[2],
        kv_heads=k.shape[2],
        window=plan.windowed,
        softcap=softcap is not None,
        alibi=alibi,
        architecture=architecture_of(q.device),
        documents=len(plan.lengths),
        deterministic=deterministic(),
    )


class _Sharing(NamedTuple):
    """How heads are shared out among the ranks that attend for the same tokens."""

    plan: Plan
    q_heads: Heads
    k_heads: Heads

    def out(self, queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensors:
        """Tensors with all query heads, and with all key heads, as tensors of all members' tokens."""
        return self._exchanged(to_heads, queries, keys)

    def back(self, queries: Sequence[Tensor], keys: Sequence[Tensor] = ()) -> Tensors:
        """The other way."""
        return self._exchanged(to_tokens, queries, keys)

    def _exchanged(self, way: Callable[..., Tensors], queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensors:
        members = self.plan.documents.members
        assert members is not None
        first, documents = self.plan.sequence.rank - members.rank, self.plan.documents
        rows = [side.sizes[first : first + members.world] for side in (documents.layout, documents.kv_layout)]
        of_query, of_key = Share(rows[0], self.q_heads), Share(rows[1], self.k_heads)
        return way([*queries, *keys], members, [of_query] * len(queries) + [of_key] * len(keys))

    @property
    def repeats_keys(self) -> bool:
        """Whether several ranks have the same key head, so that their gradients are summed."""
        return len(set(self.k_heads)) < len(self.k_heads)

    def mine(self, by_head: Tensor | None) -> Tensor | None:
        members = self.plan.documents.members
        assert members is not None
        first, end = self.q_heads[members.rank]
        return None if by_head is None else by_head[..., first:end]


def _sharing(plan: Plan, q: Tensor, k: Tensor) -> _Sharing | None:
    members = plan.documents.members
    return None if members is None else _Sharing(plan, *shares(q.shape[2], k.shape[2], members.world))


def _as_written(body: Callable[..., Results]) -> Callable[..., Results]:
    """The body of an operator without autocast, which is still on inside of one: it would make matrix products 16 bits
    wide that are written in fp32, and only in forward where backward is called outside."""

    @wraps(body)
    def run(first: Tensor, *rest: Any) -> Results:
        if not torch.is_autocast_enabled(first.device.type):
            return body(first, *rest)
        with torch.autocast(first.device.type, enabled=False):
            return body(first, *rest)

    return run


@torch.library.custom_op("seqpar_ring::attention", mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor)")
@_as_written
def attention(  # noqa: PLR0913 - an operator takes tensors and plain values, one by one
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    plan: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """(out_BSHE in q's dtype, lse_BHS) of this rank's tokens."""
    mine = plan_of(plan)
    with mine.sequence.in_one_go("attention"):
        return _forward(mine, (q, k, v), sinks, slopes, scale, softcap)


def _forward(
    mine: Plan,
    qkv: tuple[Tensor, Tensor, Tensor],
    sinks: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv
    dtype, sharing = q.dtype, _sharing(mine, q, k)
    if sharing is not None:
        q, k, v = sharing.out([q], [k, v])
        sinks, slopes = sharing.mine(sinks), sharing.mine(slopes)
    kernel = mine.kernel(request_for(q, k, v, mine, softcap, slopes is not None)).kernel
    out, lse = executor.forward(mine, (q, k, v), kernel, Scores(scale, softcap, slopes, keys=mine.fewest_keys))
    if sinks is not None:
        out, lse = _drain(out, lse, sinks)
    out = out.to(dtype)
    if sharing is not None:
        out, lse_BSH = sharing.back([out, lse.transpose(1, 2)])
        lse = lse_BSH.transpose(1, 2)
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op(
    "seqpar_ring::attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, {SCHEMA}, Tensor out, Tensor lse, int call) -> (Tensor, Tensor, Tensor, Tensor)",
)
@_as_written
def attention_backward(  # noqa: PLR0913 - an operator takes tensors and plain values, one by one
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    plan: int,
    scale: float,
    softcap: float | None,
    out: Tensor,
    lse: Tensor,
    call: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dsinks); dsinks is this rank's share, and empty without sinks.

    `call` is `Transport.calls` in forward, which ranks compare (not on a GPU, where the host would have to wait);
    `UNKNOWN` where nobody counted.
    """
    mine = plan_of(plan)
    if call != UNKNOWN and not q.is_cuda:
        mine.sequence.agree("attention's backward", {"of which call of attention": call})
    with mine.sequence.in_one_go("attention's backward"):
        return _backward(mine, dout, Kept(q, k, v, out, lse), sinks, slopes, scale, softcap)


def _backward(  # noqa: PLR0913 - the same, one by one
    mine: Plan,
    dout: Tensor,
    kept: Kept,
    sinks: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, out, lse, _ = kept
    assert out is not None
    dtype, sharing = q.dtype, _sharing(mine, q, k)
    delta = None if sinks is None else delta_of(dout, out, lse.dtype)
    dsinks = q.new_zeros(0) if sinks is None or delta is None else _sink_gradient(sinks, lse, delta)
    if sharing is not None:
        q, dout, out, lse_BSH, k, v = sharing.out([q, dout, out, lse.transpose(1, 2)], [k, v])
        lse, delta = lse_BSH.transpose(1, 2), None
        slopes = sharing.mine(slopes)
    request = request_for(q, k, v, mine, softcap, slopes is not None)
    kernel, travels = mine.kernel(request).kernel, mine.backward_travels(request).value
    scores = Scores(scale, softcap, slopes, keys=mine.fewest_keys)
    dq, dk, dv = executor.backward(
        mine, dout, Kept(q, k, v, out, lse, delta), kernel, scores, queries_travel=travels == TRAVELS["q"]
    )
    if sharing is not None:
        # A row that is one rank's alone is rounded on its way as it would be there; what ranks add up travels wide,
        # whatever their kernels gave.
        of_keys = lse.dtype if sharing.repeats_keys else dtype
        dq, dk, dv = sharing.back([dq.to(dtype)], [dk.to(of_keys), dv.to(of_keys)])
    dq, dk, dv = (x.to(dtype).contiguous() for x in (dq, dk, dv))
    return dq, dk, dv, dsinks


def _drain(out_BSHE: Tensor, lse_BHS: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """The sink as one more block, of value zero: it takes its share of each row's weight."""
    with_sink = torch.logaddexp(lse_BHS, sinks_H.to(lse_BHS.dtype)[:, None])
    share = _weight(lse_BHS, with_sink).transpose(1, 2).unsqueeze(-1)
    return out_BSHE.to(lse_BHS.dtype) * share, with_sink


def _weight(score: Tensor, lse_BHS: Tensor) -> Tensor:
    """exp(score - lse); 0 in a row that sees nothing, where a sink of -inf leaves -inf for both."""
    return torch.exp(score - lse_BHS.masked_fill(lse_BHS == -torch.inf, 0.0))


def _sink_gradient(sinks_H: Tensor, lse_BHS: Tensor, delta_BHS: Tensor) -> Tensor:
    """A sink's value is zero, so its score's gradient is its weight times -delta, over all rows of this rank."""
    weight_BHS = _weight(sinks_H.to(lse_BHS.dtype)[:, None], lse_BHS)
    return -(weight_BHS * delta_BHS).sum((0, 2)).to(sinks_H.dtype)


@attention.register_fake
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, S, H, _D = q.shape
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    return q.new_empty((B, S, H, v.shape[3])), q.new_empty((B, H, S), dtype=dtype)


@attention_backward.register_fake
def _attention_backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, slopes, handle, *scores = inputs
    ctx.save_for_backward(q, k, v, sinks, slopes, *output)
    ctx.plan, ctx.scores = plan_of(handle), scores  # holding the plan keeps its number valid until backward
    counted = type(q) in (Tensor, torch.nn.Parameter)  # where a compiler looks on, this happens once for many calls
    ctx.call = ctx.plan.sequence.calls if counted else UNKNOWN


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, out, lse = ctx.saved_tensors
    dq, dk, dv, dsinks = attention_backward(dout, *inputs, ctx.plan.handle, *ctx.scores, out, lse, ctx.call)
    return dq, dk, dv, None if inputs[3] is None else dsinks, None, None, None, None


attention.register_autograd(_differentiate, setup_context=_keep)

OPERATOR = torch.ops.seqpar_ring.attention.default
"""The operator as dispatch modes see it: what `remat` keeps the results of."""
