"""Activation checkpointing that never runs the ring twice.

Attention is one operator that returns (out, lse); both are kept and everything else is recomputed, so the recompute
costs the projections and not one byte of communication. It plugs into torch's own non-reentrant checkpointing and
whatever is built on it; it is no checkpointing of its own. torch's selective checkpointing would do the same, but
refuses a recompute whose other operators differ from the forward's, and under ZeRO-3 they may: which parameters are
gathered and freed inside a layer depends on what is still there. What it costs: one hidden state and one fp32 number
per head and token, kept for each layer. A checkpointed layer must not change attention's output in place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqpar_ring.errors import UnsupportedError
from seqpar_ring.operator import OPERATOR

Result = tuple[Tensor, ...]
"""What attention returned: out and lse."""


def context_fn() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The `context_fn` for `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`.

    For transformers: `model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": context_fn})`, which
    older versions call `gradient_checkpointing_enable`.
    """
    kept: deque[Result] = deque()

    def keep(attention: Callable[[], Result]) -> Result:
        kept.append(attention())
        return kept[-1]

    def reuse(attention: Callable[[], Result]) -> Result:
        if not kept:
            raise UnsupportedError(
                "a checkpointed layer is recomputed more often than it ran, or calls attention more often than before",
                fix="Run backward once for each forward; for a second one checkpoint without this context_fn.",
            )
        return kept.popleft()  # once, so that memory is free after it

    return _AtAttention(keep), _AtAttention(reuse)


class _AtAttention(TorchDispatchMode):
    """Hands each call of attention to a function, which may run it; every other operator runs as ever."""

    def __init__(self, then: Callable[[Callable[[], Result]], Result]) -> None:
        super().__init__()
        self._then = then

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        def run() -> Any:
            return func(*args, **(kwargs or {}))

        return self._then(run) if func is OPERATOR else run()
