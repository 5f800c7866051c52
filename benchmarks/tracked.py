"""Tracked: every block of memory that torch's CPU allocator hands out and takes back while something runs.

torch's profiler reports them exactly, also what kernels allocate for themselves, but those of its own thread only:
where one of gloo's frees a block, the next one at its place shows that it was gone, and what no tensor holds at the
beginning was gone too. It knows nothing of training.
"""

from __future__ import annotations

import gc
from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.profiler import profile

SMALL = 1 << 14
"""Bytes from which on a block counts as one that some tensor must hold."""


class Block(NamedTuple):
    """A block of memory that was handed out (bytes > 0) or taken back."""

    when: int
    bytes: int
    place: int


def events_of(seen: profile) -> Iterator[Any]:
    stack = list(seen.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    while stack:
        event = stack.pop()
        stack += event.children
        yield event


def blocks_of(seen: profile) -> Iterator[Block]:
    for event in events_of(seen):
        if event.tag == torch._C._profiler._EventType.Allocation:
            yield Block(event.start_time_ns, event.extra_fields.alloc_size, event.extra_fields.ptr)


def spans_of(seen: profile, name: str, begin: int) -> Iterator[tuple[int, int]]:
    for event in events_of(seen):
        late = event.tag == torch._C._profiler._EventType.TorchOp and event.start_time_ns >= begin
        if late and event.name == name:
            yield event.start_time_ns, event.end_time_ns


def places() -> set[int]:
    """Where the tensors lie that Python can reach."""
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    tensors += [x.grad for x in tensors if x.is_leaf and x.grad is not None]
    return {x.untyped_storage().data_ptr() for x in tensors if x.layout == torch.strided and x.device.type == "cpu"}


def mended(blocks: list[Block], held: set[int], begin: int) -> Iterator[Block]:
    """The blocks, with what other threads took back: see the module."""
    live: dict[int, int] = {}
    places: list[int] = []

    def gone(when: int, place: int) -> Block:
        places.pop(bisect_left(places, place))
        return Block(when, -live.pop(place), place)

    started = False
    for block in blocks:
        if not started and block.when >= begin:
            started = True
            yield from [gone(begin, place) for place in list(live) if place not in held and live[place] >= SMALL]
        if block.bytes < 0:
            if block.place in live:
                yield gone(block.when, block.place)
            continue
        at = bisect_left(places, block.place)
        at -= at > 0 and places[at - 1] + live[places[at - 1]] > block.place
        while at < len(places) and places[at] < block.place + block.bytes:
            yield gone(block.when, places[at])
        live[block.place] = block.bytes
        insort(places, block.place)
        yield block


def most_of(blocks: list[Block], begin: int, end: int, last: bool = False) -> int:
    """The most bytes that were handed out between two times, or those at the end of it."""
    most = now = 0
    for block in blocks:
        if block.when > end:
            break
        now += block.bytes
        most = max(most, now) if block.when >= begin else now
    return now if last else most
