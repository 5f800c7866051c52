"""Where a HuggingFace model looks at positions on its own: rotary embeddings, and queries that are scaled by position.

`dynamic` and `longrope` take the largest position they see for the length of the sequence, and a rank sees its part
of it; they are shown the last position of the longest document too. Llama 4 scales the queries of its layers without
rotary embedding by their place in the shard; that is undone. And a few families hand position_ids to their attention
but no other keyword: the plan goes with the positions. It travels as an attribute of the very tensor, so that two
batches in flight have their own; where a model makes another tensor of it, it is missed and refused, never guessed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from seqpar_ring.batch import PLAN_KEY
from seqpar_ring.errors import UnsupportedError
from seqpar_ring.plan import Plan

FOLLOW_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings whose angles depend on the length of the sequence."""

DROP_KEYWORDS = ("StableLmAttention", "NemotronAttention", "PersimmonAttention")
"""Attention classes whose layers hand them position_ids but not the keywords of the call."""

CARRIED = "_seqpar_carried"
"""The attribute of position_ids under which the plan and the tally of the call travel."""


def carrying(position_ids: Tensor, plan: Plan, calls: object) -> Tensor:
    """The same positions as a tensor of its own, with the plan and the tally of this call on it."""
    own = position_ids.view_as(position_ids)
    setattr(own, CARRIED, (plan, calls))
    return own


def follow(model: nn.Module, calls_key: str) -> None:
    """Hook what looks at positions on its own; changes the model in place."""
    for module in model.modules():
        if _follows_length(module):
            module.register_forward_pre_hook(_with_last_position, with_kwargs=True)
            module.register_forward_hook(_without_last_position)
        if type(module).__name__ in DROP_KEYWORDS:
            module.register_forward_pre_hook(_Hand(calls_key), with_kwargs=True)


def query_factor(module: Any, plan: Plan, device: torch.device) -> Tensor | None:
    """What Llama 4's queries (B, H, S, D) must be multiplied by, (S, 1) fp32: the scale by position over that by place.

    None for a layer that does not scale.
    """
    if not getattr(module, "attn_temperature_tuning", None) or getattr(module, "use_rope", True):
        return None
    right = plan.position_ids[0].to(device)
    wrong = torch.arange(right.numel(), device=device)

    def scale(positions: Tensor) -> Tensor:
        steps = torch.floor((positions.float() + 1.0) / module.floor_scale)
        scaled: Tensor = torch.log1p(steps) * module.attn_scale + 1.0
        return scaled

    factor: Tensor = scale(right) / scale(wrong)
    return factor[:, None]


def chunk_of(module: Any) -> int | None:
    """The chunk within which a layer attends; None for a layer that attends to all of the document, or to a window."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    types = getattr(config, "layer_types", None)
    if not types or index is None or types[index] != "chunked_attention":
        return None
    return int(getattr(config, "attention_chunk_size", 0)) or None


def _follows_length(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    each = kinds.values() if isinstance(kinds, dict) else (kinds,)
    return any(kind in FOLLOW_LENGTH for kind in each)


class _Hand:
    """Forward pre-hook of an attention: hand it the plan and the tally that came with position_ids."""

    def __init__(self, calls_key: str) -> None:
        self._calls_key = calls_key

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        plan, calls = _carried(module, kwargs.get("position_ids"))
        return args, {**kwargs, PLAN_KEY: plan, self._calls_key: calls}


def _with_last_position(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a rotary embedding: one more column, the last position of the longest document."""
    by_name = "position_ids" in kwargs
    positions = kwargs["position_ids"] if by_name else args[1]
    plan, _ = _carried(module, positions)
    last = positions.new_full((positions.shape[0], 1), plan.documents.longest - 1)
    longer = torch.cat([positions.minimum(last), last], dim=1)  # padding counts on from its document
    if by_name:
        return args, {**kwargs, "position_ids": longer}
    return (args[0], longer, *args[2:]), kwargs


def _without_last_position(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of a rotary embedding: without that column again."""
    return tuple(x[:, :-1] for x in output) if isinstance(output, tuple) else output[:, :-1]


def _carried(module: nn.Module, position_ids: Any) -> tuple[Plan, Any]:
    found = getattr(position_ids, CARRIED, None)
    if found is None:
        raise UnsupportedError(
            "positions were made anew inside the model, so the length of the sequence is not known where it is needed",
            fix="Call the model that parallelize(model, sp) returned: not its inner model, not its forward method. "
            "If that is what you did, use another family, or another rope_type.",
            module=type(module).__name__,
        )
    plan: Plan = found[0]
    return plan, found[1]
