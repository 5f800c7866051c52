"""What every block-attention kernel has in common: the protocol, what it takes, and what it says it can do.

A kernel answers one `Call`: some queries of this rank against some keys that are here now. It gives the block's own
normalised output and log-sum-exp, so that blocks can be merged in any order, and its backward takes the output and
log-sum-exp of the *whole* row, so that the gradients of blocks simply add up (FlashAttention-2, arXiv 2307.08691,
section 3.1: `dS = P * (dP - rowsum(dO * O))` holds for every block with the global O and log-sum-exp). A kernel
declares its limits as data; what it lacks for a request can be listed before any work is done. Nothing here computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from seqpar_ring.errors import PlanError, UnsupportedError
from seqpar_ring.geometry import INF
from seqpar_ring.schedule import Call


class Resting(NamedTuple):
    """The side whose rows stay on their rank during a pass: the same memory, unchanged, in all of its calls.

    `side` is "q" (where keys and values travel) or "k"; what a kernel finds out of these rows it may put into `notes`
    for the calls that follow, by memory: the other side's memory holds one block after another. A pass gives the same
    tensors, of either side, to many calls; what is only another view of their memory, or a small copy of rows that
    stay, may be put into `views`, by the tensor's `id` and with the tensor, which so keeps its `id`. What a kernel made
    in a call does not belong there: it would be held for the whole pass.
    """

    side: str
    notes: dict[tuple[object, ...], float]
    views: dict[tuple[int, object], tuple[Tensor, Tensor]]


class Scores(NamedTuple):
    """How logits are made: `scale * (q . k)`, and with a softcap c then `c * tanh(logit / c)`.

    With `slopes`, (H,) or (B, H) in fp32, ALiBi (arXiv 2108.12409) follows: `- slope * |p_q - p_k|`; the positions of
    the call's rows are `q_positions` and `k_positions`, int64: no kernel can tell them from row numbers, because a
    rank's rows are not next to each other in the sequence.

    `keys`: as many keys at least as the last query of each document sees, in all calls together; 0 where nobody knows.
    No logit depends on it: a kernel may choose its precision by it, as a long sum has more rounding of its own.

    `resting`: the side that stays, where the call is one of a pass.
    """

    scale: float
    softcap: float | None = None
    slopes: Tensor | None = None
    q_positions: Tensor | None = None
    k_positions: Tensor | None = None
    keys: int = 0
    resting: Resting | None = None


class Kept(NamedTuple):
    """What backward takes: the call's slices of the inputs, and the rows' results over *all* keys, not this call's.

    q (B, S, H, D), k (B, N, G, D), v (B, N, G, E), out (B, S, H, E) in any float dtype; lse (B, H, S), natural log,
    fp32 (fp64 for fp64); delta (B, H, S) = sum(dout * out, -1) in lse's dtype. One of out and delta is given: out where
    keys and values travel, delta where queries do.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor | None
    lse: Tensor
    delta: Tensor | None = None


@dataclass(frozen=True)
class Capabilities:
    """What a kernel can do, as data.

    Attributes:
        dtypes: input dtypes it takes; q, k and v share one.
        devices: device types ("cpu", "cuda"), or None for any.
        max_head_dim: widest D and E, or None for no limit.
        more_widths: pairs of D and E that it takes beyond that limit, where no query heads share a key head.
        max_deterministic_dim: widest D and E with which it gives the same bits each time where torch is told to
            (`torch.use_deterministic_algorithms`); None for no limit, 0 for none.
        architectures: major compute capabilities of the GPUs it runs on, or None for any device.
        window: whether it takes a lower edge (a sliding window).
        softcap: whether it takes a softcap.
        alibi: whether it adds position biases.
        unequal_value_dim: whether E may differ from D.
        empty_segments: whether a segment may have queries without keys, or keys without queries.
        square: whether a segment must be a full block or a causal square; other calls are cut into those.
        varlen: whether a call may have several segments; for a kernel without, plans of several documents look
            elsewhere.
        priority: among the kernels that can, "auto" takes the highest; 0 unless there is a reason.
        absent: why the kernel cannot run here at all (a missing library or op); empty when it can.
        notes: what a user should know, in a sentence.
    """

    dtypes: tuple[torch.dtype, ...]
    devices: tuple[str, ...] | None = None
    max_head_dim: int | None = None
    more_widths: tuple[tuple[int, int], ...] = ()
    max_deterministic_dim: int | None = None
    architectures: tuple[int, ...] | None = None
    window: bool = True
    softcap: bool = False
    alibi: bool = False
    unequal_value_dim: bool = False
    empty_segments: bool = True
    square: bool = False
    varlen: bool = True
    priority: int = 0
    absent: str = ""
    notes: str = ""

    def made_for(self, device: str) -> bool:
        """Whether it takes this type of device, or this device of a type ("cuda:1")."""
        return self.devices is None or device.split(":")[0] in self.devices


class Request(NamedTuple):
    """What a plan and its tensors need from a kernel.

    `device` is a type ("cpu") or one device of it ("cuda:1"); `architecture` a GPU's major compute capability, None
    where nobody asks; `documents` how many the plan packs; `deterministic` whether the same bits must come each time.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    heads: int
    kv_heads: int
    window: bool = False
    softcap: bool = False
    alibi: bool = False
    architecture: int | None = None
    documents: int = 1
    deterministic: bool = False


@runtime_checkable
class Kernel(Protocol):
    """One way to compute block attention. Called without autograd; the tensors may be strided views."""

    @property
    def name(self) -> str:
        """What the user writes in the settings to get this kernel."""

    @property
    def capabilities(self) -> Capabilities:
        """What it can do on this machine."""

    def forward(
        self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, call: Call, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        """The call's own attention.

        Args:
            q_BSHD: the call's queries, `call.cu_q[-1]` rows.
            k_BSGD: the call's keys, `call.cu_k[-1]` rows; G divides H.
            v_BSGE: the call's values.
            call: segments and window. Its q0 and k0 are the caller's: the tensors are sliced already.
            scores: how logits are made.

        Returns:
            out_BSHE in q's dtype or (better, for it is merged) a wider one, 0 where a row sees nothing in this call,
            and lse_BHS, natural log, fp32 (fp64 for fp64), -inf there. Both are the caller's to keep.
        """

    def backward(self, dout_BSHE: Tensor, kept: Kept, call: Call, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
        """The call's share of (dq_BSHD, dk_BSGD, dv_BSGE): summed over the calls of all steps it is the gradient.

        The results have a float dtype at least as wide as the inputs', and are the caller's to keep.
        """


def lacks(can: Capabilities, request: Request) -> tuple[str, ...]:
    """What a kernel lacks for a request, each as a few readable words; empty when it can serve it."""
    device = request.device.split(":")[0]
    widths, widest = (request.head_dim, request.value_dim), max(request.head_dim, request.value_dim)
    varies = can.max_deterministic_dim is not None and widest > can.max_deterministic_dim
    taken = widths in can.more_widths and request.heads == request.kv_heads
    too_wide = can.max_head_dim is not None and widest > can.max_head_dim and not taken
    sm = request.architecture
    # Words are made only of what is missing, which is rarely anything.
    complaints: tuple[tuple[bool, Callable[[], str]], ...] = (
        (bool(can.absent), lambda: can.absent),
        (not can.made_for(device), lambda: f"device {device} (has {_listed(can.devices or ())})"),
        (request.dtype not in can.dtypes, lambda: f"{_listed((request.dtype,))} (has {_listed(can.dtypes)})"),
        (
            too_wide,
            lambda: f"head width {widest} (up to {can.max_head_dim}{_where_alone(can, widths)})",
        ),
        (
            sm is not None and can.architectures is not None and sm not in can.architectures,
            lambda: f"GPUs of compute capability {sm}.x (has {_listed(can.architectures or ())})",
        ),
        (request.documents > 1 and not can.varlen, lambda: f"several documents in a call ({request.documents})"),
        (request.deterministic and varies, lambda: f"the same bits each time, at head width {widest}"),
        (request.window and not can.window, lambda: "sliding window"),
        (request.softcap and not can.softcap, lambda: "softcap"),
        (request.alibi and not can.alibi, lambda: "ALiBi"),
        (
            request.value_dim != request.head_dim and not can.unequal_value_dim,
            lambda: f"value width {request.value_dim} beside head width {request.head_dim}",
        ),
        (
            request.kv_heads < 1 or request.heads % max(request.kv_heads, 1) != 0,
            lambda: f"{request.heads} query heads over {request.kv_heads} key/value heads (must divide)",
        ),
    )
    return tuple(words() for missing, words in complaints if missing)


def _where_alone(can: Capabilities, widths: tuple[int, int]) -> str:
    return "; these widths where no query heads share a key head" if widths in can.more_widths else ""


_lacks = lru_cache(maxsize=256)(lacks)
"""The same, where the same few are asked about in every call of every layer."""


def admit(kernel: Kernel, tensors: tuple[Tensor, Tensor, Tensor], call: Call, scores: Scores) -> None:
    """Refuses q, k, v that this kernel would answer wrongly. Costs microseconds; every kernel calls it first,
    or `admit_traits` where it has not yet.

    Raises:
        PlanError: the slices do not have the call's rows.
        UnsupportedError: the kernel lacks something these tensors or scores need.
    """
    admit_traits(call, kernel, traits_of(tensors, scores))


Traits = tuple[tuple[torch.Size, torch.Size, torch.Size], tuple[torch.dtype, ...], torch.device, bool, bool]
"""What `admit` looks at: shapes and dtypes of q, k and v, their device, whether there are a softcap and slopes."""


def traits_of(tensors: tuple[Tensor, Tensor, Tensor], scores: Scores) -> Traits:
    """Of q, k and v."""
    q, k, v = tensors
    shapes, dtypes = (q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype)
    return shapes, dtypes, q.device, scores.softcap is not None, scores.slopes is not None


def admit_traits(call: Call, kernel: Kernel, traits: Traits) -> None:
    """The same, for a kernel that remembers what it has admitted. Bits that vary are no wrong answer: selection minds
    them."""
    (q, k, v), dtypes, device, softcap, alibi = traits
    if q[1] != call.cu_q[-1] or k[1] != call.cu_k[-1] or v[1] != k[1]:
        raise PlanError(
            "q, k and v are not the slices this call is about",
            fix="Slice q to call.q0:call.q1 and k, v to call.k0:call.k1 before calling the kernel.",
            call_rows=(call.cu_q[-1], call.cu_k[-1]),
            q=tuple(q),
            k=tuple(k),
            v=tuple(v),
        )
    request = Request(
        device=device.type,
        dtype=dtypes[0],
        head_dim=q[3],
        value_dim=v[3],
        heads=q[2],
        kv_heads=k[2],
        window=call.left < INF,
        softcap=softcap,
        alibi=alibi,
    )
    missing = _lacks(kernel.capabilities, request)
    if len({*dtypes}) > 1:
        missing += (f"q, k, v of different dtypes {_listed(dtypes)}",)
    if missing:
        raise UnsupportedError(
            f'kernel "{kernel.name}" cannot compute this call: it lacks {"; ".join(missing)}',
            fix='Let select(request, "auto") choose the kernel.',
        )


def deterministic() -> bool:
    """Whether torch is told to give the same bits each time, and to raise (not only to warn) where it cannot."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def architecture_of(device: torch.device) -> int | None:
    """A GPU's major compute capability: 9 for Hopper; None for other devices."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that partial results are summed in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(str(v).removeprefix("torch.") for v in values)
