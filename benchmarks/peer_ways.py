"""The ways to attend that are compared: ours, and those of other packages, each as they are called by their users.

A way says where a rank's tokens lie and makes a function from this rank's (q_BSHD, k_BSGD, v_BSGD) to its out_BSHD,
differentiable. On a CPU all run on one block kernel (`peer_kernel.py`); on a GPU each runs on its own. What a package
needed in order to run is said where it is called. Nothing of theirs is copied, and nothing is imported before it is
asked for.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from peer_kernel import BACKWARD, FORWARD, _flash_attn_forward, block, standing_in
from torch import Tensor

from seqpar_ring import ring_attention
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.plan import Plan

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q_BSHD, k_BSGD, v_BSGD) of this rank -> out_BSHD."""


class Rank(NamedTuple):
    """Where a way is made: this rank's `SequenceParallel`, a group of the same ranks, and what it will attend to."""

    sp: SequenceParallel
    group: dist.ProcessGroup
    tokens: int
    kv_heads: int
    device: str = "cpu"

    @property
    def rank(self) -> int:
        """Within the sequence."""
        return self.sp.groups.rank

    @property
    def world(self) -> int:
        """Ranks of the sequence."""
        return self.sp.groups.size


class Way(NamedTuple):
    """One way to attend.

    Attributes:
        name: in tables.
        package: the distribution whose version counts; "" for our own.
        layout: which tokens a rank holds, see `rows`.
        make: makes it on a rank; collective. Raises what hinders it, on all ranks alike.
    """

    name: str
    package: str
    layout: str
    make: Callable[[Rank], Attend]


def rows(layout: str, rank: int, world: int, tokens: int) -> Tensor:
    """Positions of a rank's tokens; whole chunks only, as most peers need them."""
    if layout == "striped":
        return torch.arange(rank, tokens, world)
    if layout == "contiguous":
        return torch.arange(tokens).chunk(world)[rank]
    chunks = torch.arange(tokens).chunk(2 * world)
    return torch.cat([chunks[rank], chunks[2 * world - 1 - rank]])


# --------------------------------------------------------------------------------------------------------------- ours
def ours(plan: Plan) -> Attend:
    """Ring attention over a plan."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = ring_attention(q, k, v, plan)
        assert isinstance(out, Tensor)
        return out

    return attend


def _ours(blocks: float | None = None, schedule: str = "ring", by_heads: bool = False) -> Callable[[Rank], Attend]:
    """With so many of a rank's blocks at a time, or as it is by default; or all ranks share out the heads."""

    def make(at: Rank) -> Attend:
        size = "auto" if blocks is None else math.ceil(at.tokens / at.world * blocks)
        degree = at.world if by_heads else 1
        settings = at.sp.settings.model_copy(update={"block_tokens": size, "schedule": schedule, "heads": degree})
        return ours(SequenceParallel.over(at.sp.groups, settings).plan(at.tokens))

    return make


# ---------------------------------------------------------------------------------------------------- ring-flash-attn
def _ring_flash_attn(at: Rank) -> ModuleType:
    """Its loops import flash-attn. Its adapter for transformers fails on transformers 5, and is not what is timed."""
    if at.device != "cpu":
        import ring_flash_attn

        return ring_flash_attn
    adapters = ModuleType("ring_flash_attn.adapters")
    for name in ("substitute_hf_flash_attn", "update_ring_flash_attn_params"):
        setattr(adapters, name, None)
    with standing_in():
        sys.modules.setdefault("ring_flash_attn.adapters", adapters)
        import ring_flash_attn

    return ring_flash_attn


def _loop(name: str) -> Callable[[Rank], Attend]:
    def make(at: Rank) -> Attend:
        function = getattr(_ring_flash_attn(at), name)
        return lambda q, k, v: function(q, k, v, causal=True, group=at.group)

    return make


def _llama3(at: Rank) -> Attend:
    package = _ring_flash_attn(at)
    whole = torch.tensor([0, at.tokens], dtype=torch.int32, device=at.device)
    *lengths, local = package.llama3_flash_attn_prepare_cu_seqlens(whole, True, at.rank, at.world)
    stride = at.kv_heads  # all heads in one gather

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tail = {"heads_k_stride": stride, "local_k_slice": local, "causal": True, "group": at.group}
        return package.llama3_flash_attn_varlen_func(q[0], k[0], v[0], *lengths, **tail)[None]

    return attend


# ------------------------------------------------------------------------------------------------------------ torch
class _TorchRing(torch.autograd.Function):
    """torch's ring functions with torch's flash operator for the device; for CPUs torch itself registers none."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
        from torch.distributed.tensor.experimental._context_parallel._attention import _templated_ring_attention

        op = torch.ops.aten._scaled_dot_product_flash_attention if q.is_cuda else FORWARD
        scale = q.shape[-1] ** -0.5
        out, lse, *rest = _templated_ring_attention(group, 2, op, q, k, v, is_causal=True, dropout_p=0.0, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.group, ctx.options = group, {"dropout_p": 0.0, "scale": scale}
        names = ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "philox_seed", "philox_offset")
        ctx.options |= dict(zip(names, rest, strict=False))  # nothing on a CPU
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        from torch.distributed.tensor.experimental._context_parallel._attention import (
            _templated_ring_attention_backward,
        )

        op = torch.ops.aten._scaled_dot_product_flash_attention_backward.default if dout.is_cuda else BACKWARD
        found = _templated_ring_attention_backward(
            ctx.group, 2, op, dout, "grad_out", *ctx.saved_tensors, True, **ctx.options
        )
        return *found[:3], None


def _torch_ring(method: str) -> Callable[[Rank], Attend]:
    def make(at: Rank) -> Attend:
        from torch.distributed.tensor.experimental._context_parallel import _attention as parallel

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            parallel.set_rotate_method(method)
            by_head = (x.transpose(1, 2) for x in (q, k, v))
            out: Tensor = _TorchRing.apply(*by_head, at.group)
            return out.transpose(1, 2)

        return attend

    return make


# ------------------------------------------------------------------------------------------------------- ringmaster
class _SaysCuda(Tensor):
    """A tensor that says it is on a GPU, for loops that else take another kernel, or none. Results are plain."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


def _flash_of_transformers() -> None:
    """Where ringmaster looks for flash-attn's functions: in what transformers has loaded."""
    from transformers import modeling_flash_attention_utils as loaded

    loaded._loaded_implementation, loaded._flash_fn = "flash_attention_2", _flash_attn_forward


def _ringmaster(module: str, name: str, **options: Any) -> Callable[[Rank], Attend]:
    def make(at: Rank) -> Attend:
        from importlib import import_module

        function = getattr(import_module(f"ringmaster.ring.{module}"), name)
        if at.device == "cpu":
            _flash_of_transformers()

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            by_head = (x.transpose(1, 2) for x in (q, k, v))
            if at.device == "cpu":
                by_head = (x.as_subclass(_SaysCuda) for x in by_head)
            out: Tensor = function(*by_head, group=at.group, scaling=None, **options)
            return out.as_subclass(Tensor)

        return attend

    return make


def _ringmaster_gathers(at: Rank) -> Attend:
    from ringmaster.config import RotateMethod
    from ringmaster.ring import kernels, ring_attention

    provider = "hf_kernels"
    if at.device == "cpu":
        provider = "cpu"
        kernels.PROVIDERS[provider] = block  # as it lets its users plug in a kernel

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = ring_attention(
            *(x.transpose(1, 2) for x in (q, k, v)),
            group=at.group,
            causal=True,
            scaling=None,
            dropout=0.0,
            provider=provider,
            rotate_method=RotateMethod.ALLGATHER,
            attn_implementation="flash_attention_2",
        )
        return out

    return attend


# ------------------------------------------------------------------------------------------------- DeepSpeed Ulysses
def flash(q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor) -> Tensor:
    """torch's own causal flash attention over a whole sequence: on a CPU the block kernel, by its public name."""
    q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BSGD, v_BSGD))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def repeats(kv_heads: int, world: int) -> int:
    """How many times key heads are repeated so that each rank of Ulysses has one: DeepSpeed leaves none without."""
    return 1 if kv_heads >= world else -(-world // kv_heads)


def _ulysses(at: Rank) -> Attend:
    import deepspeed.comm
    from deepspeed.sequence.layer import DistributedAttention

    if not deepspeed.comm.is_initialized():
        deepspeed.comm.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    attention = DistributedAttention(lambda q, k, v: flash(q, k, v), at.group, scatter_idx=2, gather_idx=1)
    times = repeats(at.kv_heads, at.world)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if times > 1:
            k, v = k.repeat_interleave(times, 2), v.repeat_interleave(times, 2)
        out: Tensor = attention(q, k, v, 0)
        return out

    return attend


OURS = "seqpar_ring"
"""What the others are held against."""

_RFA, _TORCH, _RINGMASTER = "ring-flash-attn", "torch", "axolotl-ringmaster"

_ALL = (
    Way(OURS, "", "zigzag", _ours()),
    Way("seqpar_ring, 4 pieces", "", "zigzag", _ours(1 / 4)),
    Way("seqpar_ring, direct", "", "zigzag", _ours(schedule="direct")),
    Way("seqpar_ring, heads", "", "contiguous", _ours(by_heads=True)),
    Way("ring-flash-attn, zigzag", _RFA, "zigzag", _loop("zigzag_ring_flash_attn_func")),
    Way("ring-flash-attn, ring", _RFA, "contiguous", _loop("ring_flash_attn_func")),
    Way("ring-flash-attn, stripe", _RFA, "striped", _loop("stripe_flash_attn_func")),
    Way("ring-flash-attn, llama3", _RFA, "contiguous", _llama3),
    Way("torch context parallel, all-to-all", _TORCH, "zigzag", _torch_ring("alltoall")),
    Way("torch context parallel, all-gather", _TORCH, "zigzag", _torch_ring("allgather")),
    Way("ringmaster, zigzag", _RINGMASTER, "zigzag", _ringmaster("zigzag", "zigzag_ring_attention")),
    Way("ringmaster, distflash", _RINGMASTER, "contiguous", _ringmaster("distflash", "distflash_attention")),
    Way("ringmaster, p2p", _RINGMASTER, "contiguous", _ringmaster("p2p_attn", "ring_p2p_attention", causal=True)),
    Way("ringmaster, all-gather", _RINGMASTER, "contiguous", _ringmaster_gathers),
    Way("DeepSpeed Ulysses", "deepspeed", "contiguous", _ulysses),
)

WAYS = {way.name: way for way in _ALL}
