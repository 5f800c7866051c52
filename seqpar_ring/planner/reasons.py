"""Reasons: why each choice of a plan is what it is, from what was compared and what was not affordable.

A reason is a comparison with numbers: what the next best value costs, or how many bytes the cheaper way would need.
What the user decided says so. Nothing is compared that was not priced, here or by the search.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from seqpar_ring.planner.asked import Asked, decided
from seqpar_ring.planner.job import Choice
from seqpar_ring.planner.memory import memory
from seqpar_ring.planner.search import AS_FAST, Found, Option
from seqpar_ring.planner.step import Prices, step

GIB = 2**30

USUAL = {
    "zigzag": "equal work on all ranks under a causal mask",
    "packed": "short documents stay whole and are never sent",
    "contiguous": "equal work on all ranks where every key is seen",
}
"""What is known of a layout where no other was compared."""


COMPARED = ("size", "heads", "layout", "schedule", "block_tokens")
"""Settings of which a reason names another value."""


class Reason(NamedTuple):
    """A choice, its value, and why."""

    choice: str
    value: str
    why: str


def reasons(found: Found, asked: Asked) -> tuple[Reason, ...]:
    """Why the best option is as it is; empty if there is none."""
    if not found.options:
        return ()
    best = found.options[0]
    return (*_of_settings(best, found, asked), *_Variants(best, asked).reasons())


def _of_settings(best: Option, found: Found, asked: Asked) -> Iterator[Reason]:
    """Size, head degree, layout, schedule, block: against the best option that differs in it."""
    chosen, fixed = best.choice.settings, decided(asked.fixed.settings)
    for name in COMPARED:
        value = getattr(chosen, name)
        if chosen.size == chosen.heads and name in ("layout", "schedule", "block_tokens") and name not in fixed:
            continue  # no ring runs, so these decide nothing
        if name in fixed:
            why = "as asked"
        else:
            why = _compared(best, found, name)
            if not why:
                why = USUAL.get(str(value), "") if name == "layout" else "nothing else fits or makes sense here"
        yield Reason(name, _shown(name, value), why)
    if chosen.node is not None and chosen.schedule == "double_ring":
        yield Reason("node", str(chosen.node), "devices of a node" if "node" not in fixed else "as asked")


def _compared(best: Option, found: Found, name: str) -> str:
    """What the best option with another value costs, one that differs in nothing else if there is one; empty if none.

    What else differs is said.
    """
    others = [option for option in found.options if _differing(option, best, name)]
    if not others:
        return ""
    alone = (option for option in others if _differing(option, best) == [name])
    other = next(alone, others[0])
    value = getattr(other.choice.settings, name)
    what = "a rank's block" if value == "auto" else f"{value:,}" if isinstance(value, int) else str(value)
    beside = [each for each in _differing(other, best) if each != name]
    if beside:
        said = ", ".join(f"{each} {_shown(each, getattr(other.choice.settings, each))}" for each in beside)
        what = f"{what} (with {said})"
    slower = other.seconds_a_token / best.seconds_a_token - 1
    if slower > AS_FAST - 1:
        return f"{what} takes {slower:.1%} longer"
    if other.memory.peak > best.memory.peak:
        return f"{what} is as fast, and needs {_gib(other.memory.peak)} instead of {_gib(best.memory.peak)}"
    return f"{what} is as fast"


def _differing(option: Option, best: Option, *among: str) -> list[str]:
    """Which of these settings, of all that are compared if none is named, two options have not in common."""
    mine, theirs = option.choice.settings, best.choice.settings
    return [name for name in among or COMPARED if getattr(mine, name) != getattr(theirs, name)]


class _Variants:
    """The best option with one of its ways to save memory changed."""

    def __init__(self, best: Option, asked: Asked) -> None:
        self._best, self._asked = best, asked
        self._prices = Prices(asked.workload, asked.machine)

    def reasons(self) -> Iterator[Reason]:
        """Checkpointing, remat, ZeRO, offload."""
        choice, fixed, settings = self._best.choice, self._asked.fixed, decided(self._asked.fixed.settings)
        on = choice.checkpointing
        compare = self._without if on else self._costs
        why = compare("no checkpointing" if on else "recomputing", checkpointing=not on)
        yield Reason("checkpointing", _yes(on), "as asked" if fixed.checkpointing is not None else why)
        if on:
            other = "none" if choice.settings.remat == "attention" else "attention"
            changed = choice.settings.model_copy(update={"remat": other})
            words = "running attention again" if other == "none" else "keeping its results"
            why = self._costs(words, settings=changed) if other == "none" else self._without(words, settings=changed)
            yield Reason("remat", choice.settings.remat, "as asked" if "remat" in settings else why)
        for name, usual, words in (("offload", False, "results on the device"), ("mlp", "whole", "whole MLPs")):
            value = getattr(choice.settings, name)
            if value != usual or name in settings:
                changed = choice.settings.model_copy(update={name: usual})
                why = "as asked" if name in settings else self._without(words, settings=changed)
                yield Reason(name, _yes(value) if value is True else str(value), why)
        yield Reason("zero", str(choice.zero), "as asked" if fixed.zero is not None else self._zero())
        for name, what in (("offload_optimizer", "optimizer"), ("offload_parameters", "weights")):
            there = getattr(choice, name)
            if not there and getattr(fixed, name) is None:
                continue  # what is not needed is not worth a line
            why = self._without(f"the {what} on the device", **{name: False}) if there else ""
            why = "as asked" if getattr(fixed, name) is not None else why
            yield Reason(name, _yes(there), why)

    def _zero(self) -> str:
        """Against the stage that shards less: it needs more memory, or sends no less."""
        stage = self._best.choice.zero
        if self._best.choice.gpus == 1:
            return "one device: there is nobody to share with"
        if stage == 0:
            return self._without("another stage", zero=1)
        less = {1: 0, 2: 1, 3: 2}[stage]
        return self._without(f"stage {less}", zero=less, offload_parameters=False)

    def _without(self, words: str, **changes: Any) -> str:
        """What a variant that saves less memory needs, or what it costs if it fits after all."""
        variant = self._variant(changes)
        device = self._asked.machine.device
        needed = memory(self._asked.workload, variant, device)
        if needed.peak > device.memory:
            return f"{words}: {_gib(needed.peak)} needed, there are {_gib(device.memory)}"
        if needed.host > device.host_memory:
            return f"{words}: {_gib(needed.host)} of the host needed, there are {_gib(device.host_memory)}"
        return self._costs(words, **changes)

    def _costs(self, words: str, **changes: Any) -> str:
        seconds = step(self._prices, self._variant(changes)).seconds
        slower = seconds / self._best.step.seconds - 1
        if abs(slower) < 0.0005:
            return f"{words}: as fast"
        return f"{words}: {abs(slower):.1%} {'longer' if slower > 0 else 'less time'}"

    def _variant(self, changes: dict[str, Any]) -> Choice:
        return self._best.choice._replace(**changes)


def _shown(name: str, value: Any) -> str:
    if name == "block_tokens":
        return "a rank's block" if value == "auto" else f"{value:,}"
    return str(value)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
