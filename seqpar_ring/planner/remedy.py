"""Remedy: what would make a job fit: the largest sequence on these devices, and the fewest devices for this sequence.

Both are asked for a few ways to save memory, from what costs little to what costs most, with the sequence shared by all
devices; what the user decided stays. They are limits by memory alone: whether it is fast there, `search` tells.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm
from typing import Any, NamedTuple

from seqpar_ring.config import Settings
from seqpar_ring.errors import SeqparError
from seqpar_ring.planner.asked import MOST_DEVICES, Asked, decided
from seqpar_ring.planner.candidates import straddles
from seqpar_ring.planner.job import Choice
from seqpar_ring.planner.memory import largest, memory
from seqpar_ring.planner.search import MLP_TILE, Fixed


class Limit(NamedTuple):
    """How far a way to save memory goes.

    Attributes:
        way: what is done, in words.
        choice: the same as data, for the devices it was asked for.
        tokens: the largest sequence on these devices; None: not asked.
        gpus: the fewest devices for this sequence; None: not asked, or not even the most that are tried.
    """

    way: str
    choice: Choice
    tokens: int | None = None
    gpus: int | None = None


class Way(NamedTuple):
    """A way to save memory: words, fields of the choice, settings."""

    words: str
    choice: dict[str, Any]
    settings: dict[str, Any]


STATES = ("offload_optimizer", "offload_parameters")
AGAIN: dict[str, Any] = {"checkpointing": True}
LEAST: dict[str, Any] = {"remat": "none", "mlp": MLP_TILE}

WAYS = (
    Way("nothing recomputed", {"checkpointing": False}, {}),
    Way("layers recomputed, attention's results kept", AGAIN, {"remat": "attention"}),
    Way("layers and attention recomputed", AGAIN, {"remat": "none"}),
    Way("all recomputed, MLPs in tiles", AGAIN, LEAST),
    Way("all recomputed, MLPs in tiles, optimizer on the host", {**AGAIN, "offload_optimizer": True}, LEAST),
    Way("all recomputed, MLPs in tiles, all states on the host", {**AGAIN, **dict.fromkeys(STATES, True)}, LEAST),
)
"""From what costs least time to what needs least memory."""

QUICK = 64
"""Ranks of a ring that is priced in no time."""


def largest_sequences(asked: Asked) -> tuple[Limit, ...]:
    """For each way the largest sequence of one document that fits on these devices, shared by all of them."""
    device, found = asked.machine.device, []
    for way in WAYS:
        each = [
            Limit(way.words, choice, tokens=largest(asked.workload, choice, device))
            for choice in _choices(asked, way, asked.gpus)
        ]
        if each:
            found.append(max(each, key=lambda limit: limit.tokens or 0))
    return tuple(found)


def fewest_devices(asked: Asked) -> tuple[Limit, ...]:
    """For each way the fewest devices, of those that are tried (`_numbers`), that hold this sequence."""
    found = (_fewest(asked, way) for way in WAYS)
    return tuple(limit for limit in found if limit is not None)


def remedies(asked: Asked) -> Iterator[str]:
    """Sentences that say what would make it fit."""
    yield from _enough(asked, "")
    if asked.fixed != Fixed():
        yield from _enough(asked._replace(fixed=Fixed()), "With nothing decided beforehand, ")
    best = max(largest_sequences(asked), key=lambda limit: limit.tokens or 0, default=None)
    if best is not None and best.tokens:
        yield (
            f"{asked.gpus:,} of these devices hold a sequence of up to {best.tokens:,} tokens "
            f"({best.way}, ZeRO {best.choice.zero}, heads over {best.choice.settings.head_degree})."
        )
    elif best is not None:
        yield f"{asked.gpus:,} of these devices hold no sequence of any length: the model's states are too large."
    for name in STATES:
        if getattr(asked.fixed, name) is False:
            yield f"{name} is switched off: allowing it would leave more room."


def _enough(asked: Asked, given: str) -> Iterator[str]:
    """How few devices suffice, without the host's memory and with it."""
    needed = [limit for limit in fewest_devices(asked) if limit.gpus is not None]
    least = min(needed, key=lambda limit: limit.gpus or 0, default=None)
    inside = [limit for limit in needed if not limit.choice.offload_optimizer]
    cheap = min(inside, key=lambda limit: limit.gpus or 0, default=least)
    for limit in [cheap] if least is None or cheap is None or cheap.gpus == least.gpus else [cheap, least]:
        if limit is not None:
            yield f"{given}{limit.gpus:,} devices hold this sequence ({limit.way}, ZeRO {limit.choice.zero})."
    if not needed:
        unit, decided_first = _unit(asked), "As decided, " if asked.fixed != Fixed() else ""
        tried = "powers of two" if unit == 1 else f"{unit} times a power of two, and whole nodes of such groups"
        said = f"no number of devices up to {MOST_DEVICES:,} that was tried holds this sequence: {tried}."
        start = given or decided_first
        yield start + said if start else said[0].upper() + said[1:]


def _fewest(asked: Asked, way: Way) -> Limit | None:
    """The fewest devices with which this way does; None where it contradicts what the user decided."""
    device, choice = asked.machine.device, None
    for gpus in _numbers(asked):
        for here in _choices(asked, way, gpus):  # none where so many devices cannot be shared out as decided
            choice = here
            needed = memory(asked.workload, choice, device)
            if needed.peak <= device.memory and needed.host <= device.host_memory:
                return Limit(way.words, choice, gpus=gpus)
    return None if choice is None else Limit(way.words, choice)


def _unit(asked: Asked) -> int:
    """Of which numbers of devices are multiples: the size of a sequence group, where it is decided."""
    size = decided(asked.fixed.settings).get("size", 1)
    return size if isinstance(size, int) and size > 0 else 1


def _numbers(asked: Asked) -> list[int]:
    """Devices that are tried: powers of two times the size that is decided, in one node or in whole ones."""
    unit, node = _unit(asked), asked.machine.node
    doubled = [first << k for first in {unit, lcm(unit, node)} for k in range(MOST_DEVICES.bit_length())]
    return sorted({n for n in doubled if n <= MOST_DEVICES and (n <= node or n % node == 0)})


def _choices(asked: Asked, way: Way, gpus: int) -> list[Choice]:
    """This way with what the user decided, and heads shared out as far as they go or, in rings that are quick to price,
    not at all; none where that contradicts what is decided."""
    size = decided(asked.fixed.settings).get("size", gpus)
    if gpus % size or straddles(size, gpus, asked.machine.node):
        return []
    degrees = [_heads(asked, size), *([1] if size <= QUICK else [])]
    made = dict.fromkeys(_choice(asked, way, (gpus, size, heads)) for heads in degrees)  # one, where that is decided
    return [choice for choice in made if choice is not None]


def _choice(asked: Asked, way: Way, among: tuple[int, int, int]) -> Choice | None:
    """The same over so many devices, with this size and this head degree."""
    gpus, size, heads = among
    fixed, settings = asked.fixed, decided(asked.fixed.settings)
    choice: dict[str, Any] = {"checkpointing": True, "zero": 3, "offload_optimizer": False, "offload_parameters": False}
    for name in choice:
        mine = getattr(fixed, name)
        if mine is not None and name in way.choice and way.choice[name] != mine:
            return None
        choice[name] = way.choice.get(name, choice[name]) if mine is None else mine
    if (choice["offload_parameters"] and choice["zero"] != 3) or (choice["offload_optimizer"] and not choice["zero"]):
        return None
    if any(settings.get(name, value) != value for name, value in way.settings.items()):
        return None
    layout = "packed" if len(asked.workload.lengths) > 1 else "zigzag" if asked.workload.causal else "contiguous"
    block = {"layout": layout, "heads": heads, **way.settings, **settings, "size": size}
    try:
        return Choice(gpus, Settings.parse(block, "the choice"), **choice)
    except SeqparError:
        return None


def _heads(asked: Asked, size: int) -> int:
    """The largest degree of head sharding in a node: it leaves the smallest ring."""
    model = asked.workload.model
    most = min(asked.machine.node, model.kv_heads, size)
    return max(d for d in range(1, most + 1) if size % d == 0 and model.kv_heads % d == 0 and model.heads % d == 0)
