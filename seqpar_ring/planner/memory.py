"""Memory: the bytes that a rank holds at each moment of a training step, and what they are.

A step has a few moments at which it may be fullest: the loss, the backward of a layer's MLP, of a norm and of
attention, the optimizer's update. For each the parts that live then are added up: model states as ZeRO shards them
(`states`), the tensors of the layers (`activations`), blocks and gradients in flight as the very schedule holds them
(`flight`). The largest sequence and the fewest devices follow by trying. It counts what tensors hold: what an
allocator wastes between them, and what libraries take for themselves, is the device's description to leave out. No
seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from seqpar_ring import layout as layouts
from seqpar_ring.config import Settings
from seqpar_ring.geometry import Mask
from seqpar_ring.lengths import MOST_TOKENS
from seqpar_ring.packing import Balance
from seqpar_ring.planner import activations
from seqpar_ring.planner.activations import Layer, alive, saved
from seqpar_ring.planner.families import family
from seqpar_ring.planner.flight import KERNELS, most_in_flight
from seqpar_ring.planner.hardware import Device
from seqpar_ring.planner.job import Choice, Workload
from seqpar_ring.planner.model import Span
from seqpar_ring.planner.states import (
    ATTENTION,
    END,
    FINAL,
    FIRST,
    LOSS,
    MLP,
    MOMENTS,
    NORM,
    Buckets,
    Held,
    Update,
    states,
)  # fmt: skip

TILE_BYTES, KEYS_WORTH_KEEPING = 2**28, 512
"""`tiling.TILE_BYTES` and `remat.KEYS_WORTH_KEEPING`, which stand beside torch; a test holds them equal."""

ENTROPY = 12
"""Bytes for each logit while cross entropy is differentiated: its logarithm of the softmax, the gradient of that, and
that of the logit, in fp32. In forward there are 10 at most: the logit in 16 bits and in fp32, and the logarithm."""

POWERS = tuple(2**i for i in range(13))
"""1 to 4,096 devices."""

UPDATES = {"cpu": Update(2, foreach=False), "flash": Update(1, foreach=True)}
"""torch's AdamW, by the kernel of the device: one by one it makes a root and a quotient, all at once a root."""

AT = {MLP: activations.MLP, NORM: activations.NORM, ATTENTION: activations.ATTENTION}

BEFORE = (END, LOSS, FINAL, MLP, NORM, ATTENTION)
"""Moments at which all layers but the last still hold what forward left."""


class Part(NamedTuple):
    """Bytes of one kind, at their most, and the moment of that: "always", "host", or one of `states.MOMENTS`."""

    name: str
    bytes: float
    when: str


class Memory(NamedTuple):
    """What a rank holds in a step.

    Attributes:
        parts: what there is.
        moments: bytes on the device at each moment.
        peak: the most of them.
        at: the moment of the peak.
        host: bytes in the host's memory, for each device.
    """

    parts: tuple[Part, ...]
    moments: dict[str, float]
    peak: float
    at: str
    host: float

    def fits(self, device: Device) -> bool:
        """Whether a device has as much."""
        return self.peak <= device.memory and self.host <= device.host_memory


def memory(workload: Workload, choice: Choice, device: Device, buckets: Buckets | None = None) -> Memory:
    """What a rank holds in a training step; of all ranks the one that holds most.

    Args:
        workload: what is trained.
        choice: how.
        device: what block attention runs on.
        buckets: DeepSpeed's buffers; None: its defaults.
    """
    kernel = choice.settings.kernel if choice.settings.kernel in KERNELS else device.kernel
    made = activations.layers(workload.model, workload.itemsize)
    matrix = max(layer.matrix for layer in made)
    held = [*states(workload, choice, buckets or Buckets(), UPDATES[kernel], matrix)]
    held += _activations(workload, choice, made, kernel)
    moments = {at: sum(one.at.get(at, 0.0) for one in held) for at in MOMENTS}
    at = max(moments, key=lambda name: moments[name])
    parts = tuple(_part(one) for one in held if one.host or any(one.at.values()))
    return Memory(parts, moments, moments[at], at, sum(one.host for one in held))


def largest(workload: Workload, choice: Choice, device: Device, buckets: Buckets | None = None) -> int:
    """The most tokens of one document that fit, to a thousandth, or can be counted; 0 if not even one for each rank."""
    size = choice.settings.size

    def fits(tokens: int) -> bool:
        return memory(workload._replace(lengths=(tokens,)), choice, device, buckets).fits(device)

    low, high = 0, size
    while fits(high):
        if high >= MOST_TOKENS:
            return MOST_TOKENS
        low, high = high, min(2 * high, MOST_TOKENS)
    while high - low > max(1, low // 1000):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fewest(
    workload: Workload, chosen: Callable[[int], Choice], device: Device, among: Sequence[int] = POWERS
) -> int | None:
    """The fewest devices of those asked about with which the sequence fits; None: with none of them.

    Args:
        workload: what is trained.
        chosen: how so many devices would be used.
        device: what they are.
        among: numbers of devices, ascending.
    """
    return next((n for n in among if memory(workload, chosen(n), device).fits(device)), None)


def _part(one: Held) -> Part:
    if one.host:
        return Part(one.name, one.host, "host")
    most = max(one.at, key=lambda name: one.at[name])
    always = len(one.at) == len(MOMENTS) and len(set(one.at.values())) == 1
    return Part(one.name, one.at[most], "always" if always else most)


def _activations(workload: Workload, choice: Choice, made: tuple[Layer, ...], kernel: str) -> Iterator[Held]:
    model, b, s = workload.model, workload.itemsize, choice.settings
    tokens = rank_tokens(workload.lengths, s) * workload.batch
    if not family(model.family).learned:
        tables = 2 if model.family == "gemma3_text" else 1
        width = model.latent.rotary if model.latent else model.head_dim
        yield Held("cosines and sines", dict.fromkeys((*BEFORE, FIRST), 2.0 * tables * b * width * tokens))
    if choice.checkpointing:
        yield from _checkpointed(workload, s, tokens)
    else:
        yield from _saved(made, s, tokens)
    yield from _live(workload, choice, made, _flight(workload, s, kernel) * workload.batch)
    there, backward = activations.final_norm(model, b)
    yield Held("the last norm, and what the head is given", {LOSS: tokens * there, FINAL: tokens * backward})
    yield from _loss(workload, s, tokens)


def _checkpointed(workload: Workload, s: Settings, tokens: int) -> Iterator[Held]:
    """What forward leaves where layers are recomputed."""
    model, b = workload.model, workload.itemsize
    one = float(tokens * b * model.hidden)
    yield Held("inputs of the layers", dict.fromkeys(BEFORE, model.layers * one) | {FIRST: one})
    kept = [span for span in model.spans if keeps(workload, span, s)]
    each = tokens * model.heads * (b * model.value_dim + 4.0)
    size = sum(span.layers for span in kept) * each
    if s.offload and size:
        yield Held("attention's results", {}, size)
        # The next layer's is on its way while this one's, which counts as made again, is used.
        yield Held("attention's results, fetched ahead", dict.fromkeys((MLP, NORM, ATTENTION, FIRST), each))
    elif size:
        yield Held("attention's results", dict.fromkeys(BEFORE, size) | {FIRST: each})


def _saved(made: tuple[Layer, ...], s: Settings, tokens: int) -> Iterator[Held]:
    """What forward leaves where layers are not recomputed: of the last layer until its backward begins."""
    of_layer = [tokens * (saved(one.frame) + saved(one.mlp) * (not _tiled(one, s))) for one in made]
    whole = sum(one.number * size for one, size in zip(made, of_layer, strict=True))
    yield Held("saved in the layers", dict.fromkeys((END, LOSS, FINAL), whole))
    yield Held("saved in the layers before", dict.fromkeys((MLP, NORM, ATTENTION), whole - of_layer[-1]))


def _live(workload: Workload, choice: Choice, made: tuple[Layer, ...], flight: float) -> Iterator[Held]:
    """What lives in the layer that is differentiated, whether forward left it or it is made again, and `flight`: what
    attention's backward holds beside that."""
    s = choice.settings
    tokens = rank_tokens(workload.lengths, s) * workload.batch
    kept: tuple[str, ...] = ("checkpoint",) if choice.checkpointing else ()
    if kept and not s.offload and any(keeps(workload, span, s) for span in workload.model.spans):
        kept += ("remat",)
    at = dict.fromkeys(AT, 0.0)
    for one in made:
        for moment, name in AT.items():
            mlp = 0.0 if _tiled(one, s) else alive(one.mlp, name, kept)
            at[moment] = max(at[moment], tokens * (alive(one.frame, name, kept) + mlp))
        if _tiled(one, s):
            tiles = _tiles(workload, one, s, tokens)
            at[MLP] = max(at[MLP], tokens * alive(one.frame, activations.MLP, kept) + tiles)
        else:
            at[MLP] = max(at[MLP], tokens * activations.closing(workload.model, workload.itemsize, one, kept))
    first = max(AT, key=lambda moment: at[moment] + flight * (moment == ATTENTION))
    yield Held("alive in a layer", at | {FIRST: at[first]})
    yield Held("attention in flight", {ATTENTION: flight, FIRST: flight * (first == ATTENTION)})


def _tiles(workload: Workload, layer: Layer, s: Settings, tokens: int) -> float:
    """Bytes of an MLP in tiles: what lives of one; the gradient of what the MLP was given, put together of theirs;
    and the gradients of its matrices, which are added up."""
    count = -(-tokens // int(s.mlp))
    model, one = workload.model, alive(layer.mlp, activations.MLP)
    whole = tokens * model.hidden + min((2 + model.gated) * layer.matrix, workload.parameters_trained)
    return float(-(-tokens // count) * one + workload.itemsize * whole)


def _tiled(layer: Layer, s: Settings) -> bool:
    return layer.tiles and s.mlp != "whole"


def _loss(workload: Workload, s: Settings, tokens: int) -> Iterator[Held]:
    """Logits and what cross entropy makes of them: whole, or of a tile, whose part of the head's gradient is added
    then."""
    model, b = workload.model, workload.itemsize
    count = 1
    if isinstance(s.logits, int):
        count = max(1, -(-tokens // s.logits))
    elif s.logits == "auto":
        count = max(1, -(-tokens * model.vocabulary * 4 // TILE_BYTES))
    size = float(ENTROPY * model.vocabulary * -(-tokens // count))
    yield Held("logits, and what cross entropy makes", {LOSS: size})
    if count > 1:
        head = 2.0 * b * min(model.vocabulary * model.hidden, workload.parameters_trained)
        yield Held("gradients of the head and of what it is given", {LOSS: head + float(tokens * b * model.hidden)})


def keeps(workload: Workload, span: Span, s: Settings) -> bool:
    """Whether the results of attention of these layers are kept for the recompute: as `remat.choose` decides."""
    if s.remat != "auto":
        return s.remat == "attention"
    return _keys_per_query(workload.lengths, mask_of(span, workload)) >= KEYS_WORTH_KEEPING


@lru_cache(maxsize=1024)
def _keys_per_query(lengths: tuple[int, ...], mask: Mask) -> float:
    return float(mask.regions(lengths).pairs()) / sum(lengths)


def mask_of(span: Span, workload: Workload) -> Mask:
    """What queries of these layers see."""
    longest = max(workload.lengths)
    window, chunk = (n if n is not None and n < longest else None for n in (span.window, span.chunk))
    return Mask.make(workload.causal, window if workload.causal else None, chunk)


def rank_tokens(lengths: tuple[int, ...], s: Settings) -> int:
    """Tokens of the fullest rank, for one sequence of a batch."""
    if len(lengths) == 1:
        return -(-lengths[0] // s.size)
    return _rank_tokens(lengths, s.layout, (s.size, s.head_degree), Balance(s.balance_tokens, s.balance_area))


@lru_cache(maxsize=1024)
def _rank_tokens(lengths: tuple[int, ...], name: str, degrees: tuple[int, int], balance: Balance) -> int:
    size, heads = degrees
    return max(layouts.split(layouts.make(name, lengths, size // heads, balance), heads).sizes)


def _flight(workload: Workload, s: Settings, kernel: str) -> float:
    """Bytes of attention's backward beside its inputs, of the layers that hold most, for one sequence of a batch."""
    row = workload.model.row(workload.itemsize)
    shared = row.shared(s.head_degree).sent(s.kv_dtype, s.dkv_dtype)
    travels = s.backward if s.backward != "auto" else shared.cheaper(workload.tokens, workload.tokens)
    masks = {mask_of(span, workload) for span in workload.model.spans}
    held = [most_in_flight(workload.lengths, mask, s, (travels, shared, kernel)) for mask in masks]
    if s.head_degree == 1:
        return max(held)
    # q, k, v, out, its gradient and log-sum-exp again, of more tokens and fewer heads. Beside them: on the way there
    # what others get, and of a batch where it comes to; in the ring what that holds; on the way back gradients as they
    # were summed, as they travel, as they come, and together.
    tokens, others = rank_tokens(workload.lengths, s), (s.head_degree - 1) / s.head_degree
    keys = max(row.kv_heads, s.head_degree) * (row.head_dim + row.value_dim)
    exchanged = row.itemsize * (row.heads * (row.head_dim + 2 * row.value_dim) + keys) + row.wide * row.heads
    there = exchanged * others * (1 if workload.batch == 1 else 2)
    apart = row.itemsize if row.itemsize < row.wide else 0
    back = (row.heads * row.head_dim + keys) * (row.wide + apart + (1 + others) * row.itemsize)
    return tokens * exchanged + max(*held, tokens * there, tokens * back)
