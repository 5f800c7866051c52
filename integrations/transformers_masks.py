"""Which masks of transformers the plan stands for: causal, sliding windows and chunks, which layers say as arguments.

Everything else would need a mask tensor over all tokens, and is refused where transformers would make one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seqpar_ring.errors import BatchError, UnsupportedError

from .transformers_calls import bidirectional

FOLLOWED_MASKS = (
    *("causal_mask_function", "sliding_window_overlay", "chunked_overlay", "and_masks"),
    *("packed_sequence_mask_function", "remap_positions_for_packed_sequence"),
)
"""Functions of transformers' masking_utils whose masks are followed; packed rows are told from positions, which is of
no matter here."""


def check_mask(mask_function: Any, padding: Tensor | None, own: bool) -> None:
    """Refuse what is not said by the plan and the layers' arguments, where transformers would make a mask tensor.

    Args:
        mask_function: of transformers' masking_utils, as they hand it to the function that makes the tensor.
        padding: attention_mask (B, S), if it has come this far.
        own: whether the model has combined the mask with one of its own.

    Raises:
        UnsupportedError, BatchError: a mask that is not known; padding.
    """
    unknown = _unknown(mask_function)
    if unknown is not None and "bidirectional" in unknown:
        raise bidirectional(mask_function=unknown)
    if own or unknown is not None:
        raise UnsupportedError(
            "the model adds a mask of its own to the causal one, which cannot be followed exactly",
            fix="Use a model whose masks are causal or sliding windows, and leave out what makes blocks of its tokens.",
            mask_function=unknown,
        )
    if padding is not None and not bool((padding != 0).all()):
        raise BatchError(
            "a padding mask reached the sharded model",
            fix="Call the model that parallelize returned with the whole batch: it reads the mask before sharding.",
            attention_mask=tuple(padding.shape),
        )


def _unknown(mask: Any) -> str | None:
    """The name of an unknown function within a mask function; they are closures over others, or over tuples of them."""
    if isinstance(mask, tuple):
        return next((name for name in map(_unknown, mask) if name is not None), None)
    if not callable(mask):
        return None
    name = getattr(mask, "__qualname__", type(mask).__name__).split(".")[0]
    if name not in FOLLOWED_MASKS:
        return name
    return _unknown(tuple(cell.cell_contents for cell in getattr(mask, "__closure__", None) or ()))
