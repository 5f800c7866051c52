"""Activation checkpointing that never runs the ring twice.

Attention is one operator that returns (out, lse); this policy keeps both and lets everything else be recomputed, so
the recompute costs the projections and not one byte of communication. It plugs into torch's own non-reentrant
checkpointing and whatever is built on it; it is no checkpointing of its own. What it costs: one hidden state and one
fp32 number per head and token, kept for each layer.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from seqpar_ring.attention import OPERATOR


def context_fn() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The `context_fn` for `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`.

    For transformers: `model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": context_fn})`, which
    older versions call `gradient_checkpointing_enable`.
    """
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-any-return]


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op is OPERATOR else CheckpointPolicy.PREFER_RECOMPUTE
