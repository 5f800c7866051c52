"""Activations: the tensors of one layer, of which sizes, and from when to when each of them lives in a step.

What autograd saves in a layer of transformers, and what its backward makes, tensor by tensor, in the order in which
backward goes: from the MLP's last product to the first norm. Bytes are for one token. It knows neither how many tokens
a rank has nor which layers are recomputed: `memory` does.
"""

from __future__ import annotations

from typing import NamedTuple

from seqpar_ring.planner.model import Model

SAVED, DOWN, PRODUCT, ACTIVATED, UP, NORM, OUT, ATTENTION, ROTATED, PROJECTED, FIRST_NORM = range(-1, 10)
"""Moments of a layer's backward, by what is differentiated; `SAVED`: made in forward."""

MOMENTS = range(DOWN, FIRST_NORM + 1)


class Live(NamedTuple):
    """A tensor.

    Attributes:
        name: what it is.
        bytes: of one token.
        first, last: moments of backward between which it lives, both included.
    """

    name: str
    bytes: float
    first: int
    last: int


def saved(tensors: tuple[Live, ...]) -> float:
    """Bytes of a token that forward leaves for backward."""
    return sum(t.bytes for t in tensors if t.first == SAVED)


def alive(tensors: tuple[Live, ...], moment: int) -> float:
    """Bytes of a token that live at a moment of the layer's backward."""
    return sum(t.bytes for t in tensors if t.first <= moment <= t.last)


def layer(model: Model, itemsize: int) -> tuple[Live, ...]:
    """The tensors of a layer."""
    return (*_attention(model, itemsize), *_mlp(model, itemsize))


def _attention(model: Model, b: int) -> tuple[Live, ...]:
    wide, c = max(4, b), model.hidden
    q, k = model.heads * model.head_dim, model.kv_heads * model.head_dim
    v, out = model.kv_heads * model.value_dim, model.heads * model.value_dim
    return (
        Live("the layer's input, in fp32 for its norm", wide * c, SAVED, FIRST_NORM),
        Live("the input, normalised", b * c, SAVED, FIRST_NORM),
        Live("what the projections are given", b * c, SAVED, PROJECTED),
        Live("queries, keys and values", b * (q + k + v), SAVED, ATTENTION),
        Live("attention's result", b * out, SAVED, ATTENTION),
        Live("log-sum-exp", 4 * model.heads, SAVED, ATTENTION),
        Live("gradient of attention's result", b * out, OUT, ATTENTION),
        Live("gradients of queries, keys and values", b * (q + k + v), ATTENTION, PROJECTED),
        Live("gradient of what the projections were given", b * c, PROJECTED, FIRST_NORM),
    )


def _mlp(model: Model, b: int) -> tuple[Live, ...]:
    wide, c = max(4, b), model.hidden
    width = _width(model)
    return (
        Live("attention's sum with the input, in fp32 for its norm", wide * c, SAVED, NORM),
        Live("the sum, normalised", b * c, SAVED, NORM),
        Live("what the MLP is given", b * c, SAVED, UP),
        Live("gate", b * width * model.gated, SAVED, ACTIVATED),
        Live("gate, activated", b * width, SAVED, PRODUCT),
        Live("up", b * width, SAVED, PRODUCT),
        Live("their product", b * width * model.gated, SAVED, DOWN),
        Live("gradient of the layer's output", b * c, DOWN, NORM),
        Live("gradient of the product", b * width, DOWN, PRODUCT),
        Live("gradient of the activated gate", b * width, PRODUCT, ACTIVATED),
        Live("gradient of up", b * width * model.gated, PRODUCT, UP),
        Live("gradient of the gate", b * width * model.gated, ACTIVATED, UP),
        Live("gradient of what the MLP was given", b * c, UP, NORM),
        Live("gradient of the sum", b * c, NORM, FIRST_NORM),
    )


def _width(model: Model) -> int:
    """Intermediate numbers of a token: of a dense MLP, or of the experts that it goes through."""
    experts = model.experts
    return model.intermediate if experts is None else experts.active * experts.width + experts.shared
