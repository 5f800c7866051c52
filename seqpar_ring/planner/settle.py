"""Settle: what "auto" in the settings of a running job comes to, by the prices of the planner.

Size and memory are decided by then; what is left is how the ring runs: heads shared out, layout, schedule, block
size. All that could be is priced on the machine that the settings name, and the fastest taken, the plainest of
equals. It is arithmetic on what all ranks have in common, so all find the same without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from seqpar_ring.config import Settings
from seqpar_ring.errors import ConfigError, SeqparError
from seqpar_ring.planner import candidates
from seqpar_ring.planner.hardware import Machine, machine, reported
from seqpar_ring.planner.job import Choice, Workload
from seqpar_ring.planner.model import Model
from seqpar_ring.planner.search import AS_FAST
from seqpar_ring.planner.step import Prices


def on_device(settings: Settings, device: str) -> Settings:
    """The settings with the hardware of a ring whose ranks share a node, where they name none and it is known.

    Only the block size is decided by that, and only with what is known of the model.

    Args:
        settings: as the user gave them.
        device: the name that the driver reports; "" where there is no GPU, or where ranks are on several nodes.
    """
    if settings.hardware is not None or settings.block_tokens != "auto" or (found := reported(device)) is None:
        return settings
    return settings.model_copy(update={"hardware": found[0], "fabric": found[1]})


class Settled(NamedTuple):
    """Settings in which nothing is open, and what spoke for them; "" where nothing was open."""

    settings: Settings
    reason: str


class Decision:
    """What a group's settings come to: as they were asked for where nothing is open, else decided once.

    On a GPU that is known the block size is open without anybody's asking; where that cannot be decided, blocks are
    whole, as they are elsewhere.

    Args:
        asked: the settings as the user gave them.
        device: see `on_device`.
    """

    def __init__(self, asked: Settings, device: str) -> None:
        self._asked, self._open = asked, on_device(asked, device)
        self._model: tuple[Model, str] | None = None
        self._settled = None if self._open.undecided else Settled(asked, "")

    @property
    def undecided(self) -> tuple[str, ...]:
        """Names of what is decided, or was, by the model and its first batch."""
        return self._open.undecided

    @property
    def reason(self) -> str:
        """What it came to and why; "" where nothing was open, or nothing was decided yet."""
        return self._settled.reason if self._settled else ""

    def describe(self, model: Model, dtype: str) -> None:
        """Say what is computed."""
        self._model = model, dtype

    def settle(self, lengths: Sequence[int]) -> Settings:
        """The settings in which nothing is open: decided for `tokens`, or for the first lengths.

        Raises:
            ConfigError: something was asked to be decided, and neither the model nor the hardware is known, or nothing
                fits.
        """
        if self._settled is None:
            if self._model is None:
                if self._asked.undecided:
                    raise unsettled(self._open, known=False)
                return self._asked  # until the model is known
            model, dtype = self._model
            typical = tuple(lengths) if self._asked.tokens is None else (self._asked.tokens,)
            try:
                self._settled = settle(self._open, Workload(model, typical, dtype))
            except SeqparError:
                if self._asked.undecided:
                    raise
                self._settled = Settled(self._asked, "")
        return self._settled.settings


def settle(settings: Settings, workload: Workload) -> Settled:
    """Decide what the settings leave open, for documents of these lengths.

    Args:
        settings: "auto" in heads, layout, schedule or block_tokens is decided here, the last only where `hardware` is
            given: without it a block is whole.
        workload: what is computed; its tokens are those of a typical batch.

    Raises:
        ConfigError: something is open, and the settings name no hardware; or nothing that could be fits what is fixed.
    """
    left = settings.undecided
    if not left:
        return Settled(settings, "")
    if settings.hardware is None:
        raise unsettled(settings)
    on = machine(settings.hardware, settings.fabric, settings.node)
    return _cheapest(settings, workload, on)


def unsettled(settings: Settings, known: bool = True) -> ConfigError:
    """What is missing for "auto": all of it at once.

    Args:
        settings: that leave something open.
        known: whether it is known what the model computes.
    """
    missing, steps = [], []
    if not known:
        missing.append("nothing is known of the model")
        steps.append("call sp.describe(Model.of_attention(heads, kv_heads, head_dim)) first")
    if settings.hardware is None:
        missing.append("the settings do not say on what hardware")
        steps.append('give "hardware": a file that seqpar-ring probe wrote, or a preset with "fabric"')
    fix = " and ".join(steps)
    return ConfigError(
        f"{' and '.join(settings.undecided)} cannot be decided: {', and '.join(missing)}",
        fix=f"{fix[:1].upper()}{fix[1:]}; or give values.",
        **dict.fromkeys(settings.undecided, "auto"),
    )


def _cheapest(settings: Settings, workload: Workload, on: Machine) -> Settled:
    prices, left = Prices(workload, on), settings.undecided
    found: list[tuple[float, Settings]] = []
    asked = None if settings.heads == "auto" else settings.head_degree
    whys = []
    for degree in candidates.head_degrees(settings.size, workload, on, asked):
        if degree.why_not:
            whys.append(degree.why_not)
            continue
        plain = candidates.base(degree, workload, on)
        for one in ({}, *candidates.details(degree, workload, on)):
            every = {**plain, **one}
            update = {name: every[name] for name in left}
            if every["node"] is not None and settings.node is None:
                update["node"] = every["node"]
            try:
                chosen = Settings.parse({**settings.model_dump(), **update}, "the choice")
            except SeqparError as error:
                whys.append(error.what)
                continue
            if all(chosen != other for _, other in found):
                found.append((_seconds(prices, chosen), chosen))
    if not found:
        raise ConfigError("nothing fits what the settings fix", fix="Fix less.", undecided=left, reasons=whys[:4])
    least = min(seconds for seconds, _ in found)
    seconds, best = next((s, chosen) for s, chosen in found if s <= AS_FAST * least)
    values = ", ".join(f"{name} {getattr(best, name)}" for name in left)
    slowest = max(seconds for seconds, _ in found)
    return Settled(
        best,
        f"{values}: {1e3 * seconds:.3g} ms of attention a step on {on.device.name}, {on.inner.name} and "
        f"{on.outer.name}, for {workload.tokens:,} tokens; the slowest of {len(found)} takes {1e3 * slowest:.3g} ms",
    )


def _seconds(prices: Prices, settings: Settings) -> float:
    """Attention of all layers, both passes."""
    total, choice = 0.0, Choice(settings.size, settings)
    for span in prices.workload.model.spans:
        ring = prices.ring(choice, span)
        total += span.layers * (ring.forward.seconds + ring.backward.seconds)
    return total
