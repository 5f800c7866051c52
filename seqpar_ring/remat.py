"""Activation checkpointing that never runs the ring twice.

Attention is one operator that returns (out, lse); both are kept and everything else is recomputed, so the recompute
costs the projections and not one byte of communication. It plugs into torch's own non-reentrant checkpointing and
whatever is built on it; it is no checkpointing of its own. torch's selective checkpointing would do the same, but
refuses a recompute whose other operators differ from the forward's, and under ZeRO-3 they do: which parameters are
gathered and freed inside a layer depends on what is still there. What it costs: one hidden state and one fp32 number
per head and token, kept for each layer. A checkpointed layer must not change attention's output in place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqpar_ring.attention import OPERATOR
from seqpar_ring.errors import UnsupportedError

Kept = deque[tuple[Tensor, ...]]
"""For each call of attention in a layer, in order, what it returned."""


def context_fn() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The `context_fn` for `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`.

    For transformers: `model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": context_fn})`, which
    older versions call `gradient_checkpointing_enable`.
    """
    kept: Kept = deque()
    return _Keep(kept), _Reuse(kept)


class _Keep(TorchDispatchMode):
    """Around the forward pass: keeps what attention returns."""

    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is OPERATOR:
            self._kept.append(result)
        return result


class _Reuse(TorchDispatchMode):
    """Around the recompute: gives what was kept instead of running attention, once, so that memory is free after it."""

    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not OPERATOR:
            return func(*args, **(kwargs or {}))
        if not self._kept:
            raise UnsupportedError(
                "a checkpointed layer is recomputed more often than it ran, or calls attention more often than before",
                fix="Run backward once for each forward; for a second one checkpoint without this context_fn.",
            )
        return self._kept.popleft()
