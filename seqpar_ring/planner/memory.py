"""Memory: the bytes that a rank holds at each moment of a training step, and what they are.

A step has a few moments at which it may be fullest: the loss, the backward of a layer's MLP and of its attention, the
optimizer's update. For each the parts that live then are added up, tensor by tensor: model states as ZeRO shards them,
activations as `activations` lists them, keys and values in flight as the very schedule holds them. The largest sequence
and the fewest devices follow by bisection. Bytes only, no seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from seqpar_ring import layout as layouts
from seqpar_ring.config import Settings
from seqpar_ring.geometry import Ints, Mask
from seqpar_ring.packing import Balance
from seqpar_ring.planner import activations
from seqpar_ring.planner.hardware import Device
from seqpar_ring.planner.job import Choice, Workload
from seqpar_ring.planner.model import Span
from seqpar_ring.schedule import Flows, Route, Row, Sides

TILE_BYTES = 2**28
"""Most bytes of the fp32 logits of a tile with `logits: "auto"`: `tiling.TILE_BYTES`, which cannot be imported here."""

ALWAYS, LOSS, MLP, ATTENTION, UPDATE = (
    "always",
    "loss",
    "backward of the last layer's MLP",
    "backward of the last layer's attention",
    "optimizer step",
)
END, FIRST_LAYER = "end of forward", "backward of the first layer"
MOMENTS = (END, LOSS, MLP, ATTENTION, FIRST_LAYER, UPDATE)


class Part(NamedTuple):
    """Bytes of one kind, and when they are held."""

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
        host: bytes in the host's memory.
    """

    parts: tuple[Part, ...]
    moments: dict[str, float]
    peak: float
    at: str
    host: float


class Buckets(NamedTuple):
    """DeepSpeed's buffers, in numbers: `reduce_bucket_size`, `stage3_prefetch_bucket_size`."""

    reduce: int
    prefetch: int

    @staticmethod
    def of(workload: Workload) -> Buckets:
        """What transformers makes of "auto"."""
        square = workload.model.hidden**2
        return Buckets(square, int(0.9 * square))


def memory(workload: Workload, choice: Choice, device: Device, buckets: Buckets | None = None) -> Memory:
    """What a rank holds in a training step; of all ranks the one that holds most."""
    buckets = buckets or Buckets.of(workload)
    held = [*_states(workload, choice, buckets), *_activations(workload, choice)]
    moments = dict.fromkeys(MOMENTS, 0.0)
    host = 0.0
    parts = []
    for part, when in held:
        parts.append(part)
        if part.when == "host":
            host += part.bytes
            continue
        for at in when:
            moments[at] += part.bytes
    at = max(moments, key=lambda name: moments[name])
    return Memory(tuple(p for p in parts if p.bytes), moments, moments[at], at, host)


def largest(workload: Workload, choice: Choice, device: Device) -> int:
    """The most tokens of one document that fit; 0 if not even one for each rank does."""
    size = choice.settings.size

    def fits(tokens: int) -> bool:
        needed = memory(workload._replace(lengths=(tokens,)), choice, device)
        return needed.peak <= device.memory and needed.host <= device.host_memory

    low, high = 0, size
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 1000):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fewest(workload: Workload, chosen: Callable[[int], Choice], device: Device, most: int = 1 << 14) -> int | None:
    """The fewest devices, of powers of two, with which the sequence fits; None: not even with `most`."""
    for gpus in _doubling(most):
        needed = memory(workload, chosen(gpus), device)
        if needed.peak <= device.memory and needed.host <= device.host_memory:
            return gpus
    return None


def _doubling(most: int) -> Iterator[int]:
    gpus = 1
    while gpus <= most:
        yield gpus
        gpus *= 2


Held = tuple[Part, tuple[str, ...]]


def _states(workload: Workload, choice: Choice, buckets: Buckets) -> Iterator[Held]:
    """Weights, gradients and the optimizer's, as ZeRO shards them."""
    model, b, zero = workload.model, workload.itemsize, choice.zero
    trained = model.parameters if workload.trained is None else workload.trained
    share = choice.gpus if zero else 1
    weights = model.parameters * b / (choice.gpus if zero == 3 else 1)
    yield _placed("weights", weights, choice.offload_parameters)
    backward = (MLP, ATTENTION, FIRST_LAYER, UPDATE)
    gradients = trained * b / (choice.gpus if zero >= 2 else 1)
    if choice.offload_optimizer and zero >= 2:
        yield Part("gradients", gradients, "host"), ()
    else:
        yield Part("gradients", gradients, "backward"), (FIRST_LAYER, UPDATE) if zero < 2 else backward
    moments = 8 * trained / share if workload.optimizer == "adamw" else 0
    master = 4 * trained / share if b < 4 else 0
    yield _placed("fp32 weights of the optimizer", master, choice.offload_optimizer)
    yield _placed("optimizer's moments", moments, choice.offload_optimizer)
    if zero and choice.gpus > 1:
        yield Part("gradients on their way", buckets.reduce * b, "always"), MOMENTS
    if zero == 3:
        gathered = 2 * model.layer_parameters * b
        yield Part("gathered weights", gathered, "in the layers"), (END, LOSS, MLP, ATTENTION, FIRST_LAYER)


def _placed(name: str, size: float, offloaded: bool) -> Held:
    return (Part(name, size, "host"), ()) if offloaded else (Part(name, size, ALWAYS), MOMENTS)


def _activations(workload: Workload, choice: Choice) -> Iterator[Held]:
    model, b, s = workload.model, workload.itemsize, choice.settings
    tokens = rank_tokens(workload.lengths, s) * workload.batch
    tensors = activations.layer(model, b)
    before = (END, LOSS, MLP, ATTENTION)
    if choice.checkpointing:
        yield Part("inputs of the layers", model.layers * tokens * b * model.hidden, "end of forward"), before
        kept = model.layers * tokens * model.heads * (b * model.value_dim + 4) if s.remat != "none" else 0.0
        if s.offload:
            yield Part("attention's results", kept, "host"), ()
        else:
            yield Part("attention's results", kept, "end of forward"), before
    else:
        kept = (model.layers - 1) * tokens * activations.saved(tensors)
        yield Part("saved in the layers", kept, "end of forward"), before
        yield Part("saved in the last layer", tokens * activations.saved(tensors), "end of forward"), (END, LOSS)
    for name, moment in ((MLP, activations.PRODUCT), (ATTENTION, activations.ATTENTION)):
        live = tokens * activations.alive(tensors, moment)
        at = (name, FIRST_LAYER) if name == MLP else (name,)
        yield Part(f"alive in the {name}", live, name), at
    yield Part("attention in flight", _in_flight(workload, s) * workload.batch, ATTENTION), (ATTENTION,)
    size = tokens * model.vocabulary
    tiles = 1
    if s.logits != "whole":
        tiles = -(-tokens // s.logits) if isinstance(s.logits, int) else -(-size * 4 // TILE_BYTES)
    yield Part("logits", 12 * size / max(1, tiles), LOSS), (LOSS,)


def rank_tokens(lengths: tuple[int, ...], settings: Settings) -> int:
    """Tokens of the fullest rank."""
    return max(_sides(lengths, settings.layout, settings.size, settings.heads).sizes)


@lru_cache(maxsize=256)
def _sides(lengths: tuple[int, ...], name: str, size: int, heads: int) -> layouts.Layout:
    return layouts.split(layouts.make(name, lengths, size // heads, Balance()), heads)


def _in_flight(workload: Workload, settings: Settings) -> float:
    """Bytes of a row's worth of buffers on the fullest rank in the backward pass, with fp32 totals of dq, dk and dv."""
    row = workload.model.row(workload.itemsize).shared(settings.heads)
    most = 0.0
    for span in workload.model.spans:
        most = max(most, _flight(workload.lengths, span._replace(layers=0), settings, row))
    tokens = rank_tokens(workload.lengths, settings)
    return most + 2 * tokens * (row.home("q") + row.home("kv"))


@lru_cache(maxsize=1024)
def _flight(lengths: tuple[int, ...], span: Span, s: Settings, row: Row) -> float:
    window = span.window if span.window is not None and span.window < max(lengths) else None
    side = layouts.make(s.layout, lengths, s.size // s.heads, Balance(s.balance_tokens, s.balance_area))
    sides = Sides(side, side, Mask.make(True, window, None).regions(lengths))
    route = Route.of(s, sides)
    flows = route.flows(backward=True)
    kv, made, got = held(flows)
    return float((kv * row.out("kv") + (made + got) * row.home("kv")).max(initial=0))


def held(flows: Flows) -> tuple[Ints, Ints, Ints]:
    """Rows that each rank holds at each step beside its own, arrays of (steps, world): received blocks, partial
    gradients of its own making, partial gradients received. See `schedule.lives`."""
    kv, dkv, uses = flows.kv, flows.dkv, flows.uses
    pieces = 1 + int(max(kv.piece.max(initial=0), uses.piece.max(initial=0)))
    world, steps = flows.world, flows.steps + 2

    def key(rank: Ints, owner: Ints, piece: Ints) -> Ints:
        number: Ints = (rank * world + owner) * pieces + np.maximum(piece, 0)
        return number

    last = np.full(world * world * pieces, -1, dtype=np.int64)
    into = key(kv.dst, kv.owner, kv.piece)
    last[into] = kv.due
    on = kv.src != kv.owner
    np.maximum.at(last, key(kv.src, kv.owner, kv.piece)[on], kv.due[on] - 1)
    away = uses.rank != uses.owner
    np.maximum.at(last, key(uses.rank, uses.owner, uses.piece)[away], uses.step[away])
    received = _alive((steps, world), kv.dst, (kv.post, last[into]), kv.rows)
    if not len(dkv.post):
        none = np.zeros_like(received)
        return received, none, none
    made_at = np.zeros(world * world * pieces, dtype=np.int64)
    made_at[key(uses.rank, uses.owner, uses.piece)] = uses.step
    first = made_at[key(dkv.src, dkv.owner, dkv.piece)]
    made = _alive((steps, world), dkv.src, (first, dkv.due - 1), dkv.rows)
    got = _alive((steps, world), dkv.dst, (dkv.post, dkv.due - 1), dkv.rows)
    return received, made, got


def _alive(shape: tuple[int, int], rank: Ints, span: tuple[Ints, Ints], rows: Ints) -> Ints:
    change = np.zeros((shape[0] + 1, shape[1]), dtype=np.int64)
    np.add.at(change, (span[0], rank), rows)
    np.subtract.at(change, (span[1] + 1, rank), rows)
    alive: Ints = change.cumsum(0)[:-1]
    return alive
