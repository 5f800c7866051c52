"""Activations: the tensors of a layer of transformers, their bytes a token, and when in the layer's backward they live.

What autograd saves was seen by tracking every allocation of training steps (transformers 5.23;
`benchmarks/planner_memory.py` compares); each line below is one such tensor. Norms in fp32, as RMSNorm computes them,
count twice in 16 bits: a wide copy of what they are given, and what they make of it. A layer is fullest where its
MLP's product is differentiated, in its second norm or in attention; which of them is `memory`'s to find, who also
knows how many tokens there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from seqpar_ring.planner.families import family
from seqpar_ring.planner.model import Model

MLP, NORM, ATTENTION = "mlp", "norm", "attention"
"""Moments of a layer's backward: its MLP's last product, the norm before the MLP, attention."""

ALL, BEFORE = (MLP, NORM, ATTENTION), (MLP,)

NORM_BACKWARD = 5
"""Tensors of fp32, as wide as its input, that an RMSNorm's backward holds at its fullest: the gradient of the product
with 1 / rms, that of the mean spread over the row, and x, 2 x and 2 x dx, of which the square's gradient is made."""

WIDE_NORM = ("gemma", "gemma2", "gemma3_text")
"""Families that multiply by a norm's weight in fp32, so that the normalised tensor is kept in fp32 too."""

NEW_GELU = ("gpt2", "gptj", "gpt_neo", "phi")
"""Families whose activation is a formula of many operations (`gelu_new`), each of which saves its own."""


class Live(NamedTuple):
    """A tensor.

    Attributes:
        name: what it is.
        bytes: of one token.
        at: moments of the layer's backward at which it lives.
        saved: whether forward leaves it.
        kept: who keeps it anyway where the layer is recomputed: "checkpoint", "remat" or nobody ("").
    """

    name: str
    bytes: float
    at: tuple[str, ...]
    saved: bool = True
    kept: str = ""


class Layer(NamedTuple):
    """Layers that are alike.

    Attributes:
        number: how many.
        frame: tensors of attention, norms and residuals.
        mlp: tensors of the MLP between them.
        matrix: parameters of the MLP's largest matrix, whose gradient is made there.
        tiles: whether its MLP can run in tiles.
    """

    number: int
    frame: tuple[Live, ...]
    mlp: tuple[Live, ...]
    matrix: int
    tiles: bool


def saved(tensors: tuple[Live, ...]) -> float:
    """Bytes of a token that forward leaves for backward."""
    return sum(t.bytes for t in tensors if t.saved)


def closing(model: Model, b: int, layer: Layer, kept: tuple[str, ...]) -> float:
    """Bytes of a token in the backward of a norm behind the MLP, when all that forward left in the layer is there
    yet, but for the normalised tensor of this norm; 0 where a layer ends without one."""
    if family(model.family).norms < 4:
        return 0.0
    there = sum(t.bytes for t in layer.frame + layer.mlp if t.saved and t.kept not in kept)
    normalised = (max(4, b) if model.family in WIDE_NORM else b) * model.hidden
    return there - normalised + norm_backward(model, b) + b * model.hidden  # the last: of the residual


def alive(tensors: tuple[Live, ...], moment: str, kept: tuple[str, ...] = ()) -> float:
    """Bytes of a token that live at a moment, but for what these keep and count already."""
    return sum(t.bytes for t in tensors if moment in t.at and t.kept not in kept)


def layers(model: Model, b: int) -> tuple[Layer, ...]:
    """The layers of a model whose numbers have `b` bytes: those with a dense MLP, those with a mixture of experts."""
    frame = (*_attention(model, b), *_second_norm(model, b))
    found = []
    if model.dense_layers:
        mlp, matrix = tuple(_dense(model, b, model.intermediate)), model.hidden * model.intermediate
        found.append(Layer(model.dense_layers, frame, mlp, matrix, tiles=True))
    if model.experts is not None:
        one = model.experts
        mixed = (*_experts(model, b), *(_dense(model, b, one.shared) if one.shared else ()))
        matrix = one.number * (1 + model.gated) * model.hidden * one.width
        found.append(Layer(one.layers, frame, mixed, matrix, tiles=False))
    return tuple(found)


def final_norm(model: Model, b: int) -> tuple[float, float]:
    """Bytes of a token of the norm after the last layer: what it saves, with its result, until the head's backward; and
    in its own backward, when what it was given is all that is left of these."""
    saved_there = [t.bytes for t in _norm(model, b, "the model's last hidden state", ())]
    return sum(saved_there) + b * model.hidden, saved_there[0] + norm_backward(model, b)


def norm_backward(model: Model, b: int) -> float:
    """Bytes of a token that a norm's backward makes at its fullest."""
    if family(model.family).vectors == 2:
        return 2 * b * model.hidden  # LayerNorm is one operation: the gradient that it gets, and the one it makes
    return NORM_BACKWARD * max(4, b) * model.hidden


def _norm(model: Model, b: int, what: str, at: tuple[str, ...], width: int = 0, kept: str = "") -> Iterator[Live]:
    """What a norm saves of its input; its result is whoever's it is given to. Its backward first uses the
    normalised."""
    width, wide = width or model.hidden, max(4, b)
    if family(model.family).vectors == 2:
        yield Live(what, b * width, at, kept=kept)  # LayerNorm takes its input as it is
        return
    yield Live(what, wide * width, at, kept=kept if wide == b else "")
    normalised = wide if model.family in WIDE_NORM else b
    before = tuple(moment for moment in at if moment != NORM or ATTENTION in at)
    yield Live(f"{what}, normalised", normalised * width, before)


def _attention(model: Model, b: int) -> tuple[Live, ...]:
    c, has = model.hidden, family(model.family)
    q, k = model.heads * model.head_dim, model.kv_heads * model.head_dim
    v, out = model.kv_heads * model.value_dim, model.heads * model.value_dim
    found = [*_norm(model, b, "the layer's input", ALL, kept="checkpoint")]
    found.append(Live("what the projections are given", b * c, ALL))
    if model.qk_norm:
        found += _norm(model, b, "queries before their norm", ALL, q)
        found += _norm(model, b, "keys before their norm", ALL, k)
    if model.latent is not None:
        for rank in (model.latent.q_rank or 0, model.latent.kv_rank):
            found += _norm(model, b, "a compressed row", ALL, rank)
            found.append(Live("a compressed row after its norm", b * rank, ALL))
    found += [
        Live("queries, keys and values", b * (q + k + v), ALL),
        Live("attention's result", b * out, ALL, kept="remat"),
        Live("log-sum-exp", 4 * model.heads, ALL, kept="remat"),
        Live("gradient of attention's result", b * out, (ATTENTION,), saved=False),
        Live("gradient of the sum behind attention", b * c, (NORM, ATTENTION), saved=False),
    ]
    if has.norms == 4:
        found += _norm(model, b, "what attention's own last norm is given", (MLP, NORM))
    return tuple(found)


def _second_norm(model: Model, b: int) -> Iterator[Live]:
    """The norm before the MLP, where there is one, and one behind it."""
    has, c = family(model.family), model.hidden
    yield Live("gradient of the layer's output", b * c, (MLP, NORM), saved=False)
    if has.norms > 1:
        yield from _norm(model, b, "attention's sum with the layer's input", (MLP, NORM))
        yield Live("what the MLP is given", b * c, (MLP,))
        yield Live("what a norm's backward makes", norm_backward(model, b), (NORM,), saved=False)
    if has.norms == 4:
        yield from _norm(model, b, "what the layer's last norm is given", ())


def _dense(model: Model, b: int, width: int) -> Iterator[Live]:
    """An MLP. `at` its product's backward the product itself is gone, and its gradient there."""
    one = b * width
    if model.gated:
        yield Live("gate", one, BEFORE)
        yield Live("gate, activated", one, BEFORE)
        yield Live("up", one, BEFORE)
        yield Live("their product", one, ())
        yield Live("gradients of the product and its factors", 3 * one, BEFORE, saved=False)
    elif model.family in NEW_GELU:
        yield Live("what the activation is given", one, BEFORE)
        yield Live("half of it, tanh, and 1 + tanh", 3 * one, BEFORE)
        yield Live("their product", one, ())
        yield Live("gradients of the product and its factors", 3 * one, BEFORE, saved=False)
    else:
        yield Live("what the activation is given", one, BEFORE)
        yield Live("what it makes of it", one, BEFORE)
        yield Live("its gradient", one, BEFORE, saved=False)


def _experts(model: Model, b: int) -> Iterator[Live]:
    """A mixture of experts as transformers' grouped products compute it: all rows of all experts, sorted by expert."""
    experts = model.experts
    assert experts is not None
    rows, factors = b * experts.active, 2 if model.gated else 1
    yield Live("rows of the experts", rows * model.hidden, BEFORE)
    yield Live("gate and up", rows * factors * experts.width, BEFORE)
    yield Live("gate, activated", rows * experts.width, BEFORE)
    yield Live("their product", rows * experts.width * model.gated, BEFORE)
    yield Live("results of the experts", rows * model.hidden, BEFORE)
    # Of the results, weighted, put back in order and in order, as their weights' backward holds them.
    yield Live("gradients of the results", 3 * rows * model.hidden, BEFORE, saved=False)
