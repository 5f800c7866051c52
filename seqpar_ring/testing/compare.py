"""Ring against dense: one case of attention, run both ways, forward and backward, and compared tensor by tensor.

The truth is always fp64 on one device, whatever dtype the ring runs in, and the measure is the relative L2 error of
whole tensors, which neither a lucky element nor a large tolerance on small numbers can hide in. It compares attention
only; models and training have tests of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seqpar_ring.sharding import gather_tokens
from seqpar_ring.testing.dense import dense_attention
from seqpar_ring.testing.processes import RankPool
from seqpar_ring.testing.threads import run_lockstep

if TYPE_CHECKING:
    from seqpar_ring.parallel import SequenceParallel


@dataclass(frozen=True)
class Case:
    """Shapes, dtype, mask and logits of one comparison; `value_dim` None is `head_dim`.

    `sinks` and `alibi` say whether there are any; `kv_lengths` makes it cross-attention. The rest is
    `dense_attention`'s.
    """

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    value_dim: int | None = None
    batch: int = 1
    dtype: torch.dtype = torch.float64
    causal: bool = True
    window: int | tuple[int | None, ...] | None = None
    chunk: int | None = None
    prefix: int | tuple[int, ...] | None = None
    kv_lengths: tuple[int, ...] | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    seed: int = 0

    @property
    def mask(self) -> dict[str, Any]:
        """The arguments that make the mask, in `plan` and in `dense_attention`."""
        return {name: getattr(self, name) for name in ("causal", "window", "chunk", "prefix", "kv_lengths")}

    def inputs(self, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q_BSHD, k_BSGD, v_BSGE and dout_BSHE: standard normal, in the case's dtype, the same for the same seed."""
        generator = torch.Generator().manual_seed(self.seed)
        value_dim = self.head_dim if self.value_dim is None else self.value_dim
        keys = tokens if self.kv_lengths is None else sum(self.kv_lengths)
        shapes = (
            (tokens, self.heads, self.head_dim),
            (keys, self.kv_heads, self.head_dim),
            (keys, self.kv_heads, value_dim),
            (tokens, self.heads, value_dim),
        )
        q, k, v, dout = (
            torch.randn(self.batch, *shape, dtype=torch.float64, generator=generator).to(self.dtype)
            for shape in shapes
        )
        return q, k, v, dout

    def by_head(self) -> dict[str, Tensor]:
        """Sinks (to be differentiated) and ALiBi slopes where the case has them, by the names of the arguments."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        wide = torch.float64 if self.dtype is torch.float64 else torch.float32
        drawn = torch.randn(2, self.heads, dtype=torch.float64, generator=generator)
        found = {"sinks": drawn[0].to(wide).requires_grad_()} if self.sinks else {}
        return {**found, "alibi_slopes": drawn[1].abs().to(wide)} if self.alibi else found


def assert_matches_dense(
    lengths: int | Sequence[int],
    world: int,
    case: Case | None = None,
    tolerance: float = 1e-12,
    pool: RankPool | None = None,
    **settings: Any,
) -> dict[str, float]:
    """Run ring attention forward and backward and assert that it equals dense attention.

    Args:
        lengths: tokens of each document, or of the one document.
        world: ranks; all share the sequence unless `size` is among the settings.
        case: shapes, dtype, mask; None: `Case()`.
        tolerance: largest relative L2 error allowed, for each of out, lse, dq, dk, dv (and dsinks).
        pool: processes to run on; None: threads in lockstep.
        **settings: as in `Settings`: layout, schedule, block_tokens, kernel, size.

    Returns:
        The errors by name.

    Raises:
        AssertionError: an error above the tolerance, or NaN; shows all of them.
    """
    case = case or Case()
    if pool is None:
        results = run_lockstep(lambda sp: ring_results(sp, lengths, case), world, **settings)
    elif pool.world == world:
        results = pool.run(ring_results, lengths, case, **settings)
    else:
        raise ValueError(f"the pool has {pool.world} ranks, not {world}")
    truth = dense_results(lengths, case)
    # A gradient that is zero but for rounding (dq of a one-token document) has no scale of its own: dout's stands in.
    floor = 1e-3 * case.inputs(truth["lse"].shape[2])[3].double().norm().item()
    errors = {name: relative_error(results[0][name], truth[name], floor) for name in truth}
    wrong = {name: f"{error:.3g}" for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"above {tolerance:g}: {wrong} of {errors}; lengths={lengths}, world={world}, {settings}, {case}"
    return errors


def ring_results(sp: SequenceParallel, lengths: int | Sequence[int], case: Case) -> dict[str, Tensor]:
    """Whole out_BSHE, lse_BHS, dq, dk, dv (and dsinks) by name, from the ring; the same on every rank. Collective."""
    from seqpar_ring.attention import ring_attention

    plan = sp.plan(lengths, **case.mask)
    whole_q, whole_k, whole_v, whole_dout = case.inputs(plan.tokens)
    q, dout = plan.shard(whole_q), plan.shard(whole_dout)
    k, v = plan.shard_keys(whole_k), plan.shard_keys(whole_v)
    extra = case.by_head()
    leaves = [x.requires_grad_() for x in (q, k, v)] + [x for x in extra.values() if x.requires_grad]
    out, lse = ring_attention(q, k, v, plan, scale=case.scale, softcap=case.softcap, return_lse=True, **extra)
    dq, dk, dv, *dsinks = torch.autograd.grad(out, leaves, dout)
    order, kv_order = plan.documents.order, plan.documents.kv_order
    locally = {"out": (out, 1, order), "lse": (lse, 2, order), "dq": (dq, 1, order)}
    locally |= {"dk": (dk, 1, kv_order), "dv": (dv, 1, kv_order)}
    found = {name: gather_tokens(x.detach(), dim, of, plan.sequence) for name, (x, dim, of) in locally.items()}
    return {**found, **{name: plan.sequence.all_reduce(x) for name, x in zip(("dsinks",), dsinks, strict=False)}}


def dense_results(lengths: int | Sequence[int], case: Case) -> dict[str, Tensor]:
    """The same by `dense_attention` in fp64, from the inputs as rounded to the case's dtype."""
    tokens = lengths if isinstance(lengths, int) else sum(lengths)
    q, k, v, dout = (x.double() for x in case.inputs(tokens))
    extra: dict[str, Any] = {}
    for name, x in case.by_head().items():
        extra[name] = x.detach().double().requires_grad_(x.requires_grad)
    leaves = [x.requires_grad_() for x in (q, k, v)] + [x for x in extra.values() if x.requires_grad]
    out, lse = dense_attention(q, k, v, lengths, scale=case.scale, softcap=case.softcap, **case.mask, **extra)
    grads = torch.autograd.grad(out, leaves, dout)
    names = ("dq", "dk", "dv", "dsinks")[: len(grads)]
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, grads, strict=True))}


def relative_error(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """L2 norm of a - b over that of b, the truth, in fp64. Equal infinities count as equal.

    `floor` is the least norm of b to divide by, for a truth that may be zero.

    Returns:
        0 for equal (or empty) tensors, infinity where only b is zero, NaN where either has one.

    Raises:
        ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"cannot compare shapes {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    off = torch.where(a == b, 0.0, a - b).norm().item()
    size = max(torch.where(b.isinf(), 0.0, b).norm().item(), floor)
    return 0.0 if off == 0 else off / size if size != 0 else float("inf")
