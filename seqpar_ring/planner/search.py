"""Search: every choice that could run a job, priced, those that fit ranked by time, and what was refused with the
reason.

Sizes and head degrees are all compared, each with the plain ring; schedules, layouts and block sizes then for those
that came out near the best. For each the cheapest way to fit into memory is taken: what costs no time first,
recomputing and offloading last. A setting that the user gave stays as it is. Nothing is drawn at random: all ranks
find the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

from seqpar_ring.config import Settings
from seqpar_ring.errors import ConfigError, SeqparError, did_you_mean
from seqpar_ring.layout import LAYOUTS
from seqpar_ring.planner import candidates
from seqpar_ring.planner.hardware import Machine
from seqpar_ring.planner.job import Choice, Workload
from seqpar_ring.planner.memory import Memory, memory
from seqpar_ring.planner.step import Prices, Step, step
from seqpar_ring.schedule import BUILDERS

MLP_TILE = 8192
"""Tokens of a tile where MLPs run in tiles to save memory."""

AS_FAST = 1.005
"""Options within this factor of the fastest count as equally fast: less than what a prediction can tell apart."""

NEAR = 1.25
"""Sizes and head degrees within this factor of the best are looked at in detail."""

DETAILED = 4
"""And at most so many of them."""

ZEROS = (1, 2, 3, 0)
"""Stages of ZeRO, those first that send little for what they save."""


class Fixed(NamedTuple):
    """What the user decided; None: the search decides.

    Attributes:
        settings: settings of the ring by name.
        checkpointing, zero, offload_optimizer, offload_parameters: see `Choice`.
    """

    settings: Mapping[str, Any] = {}
    checkpointing: bool | None = None
    zero: int | None = None
    offload_optimizer: bool | None = None
    offload_parameters: bool | None = None


class Option(NamedTuple):
    """A choice that fits, and its price."""

    choice: Choice
    step: Step
    memory: Memory

    @property
    def seconds_a_token(self) -> float:
        """What options are ranked by: choices with more sequence groups train on more tokens in a step."""
        return self.step.seconds / self.step.tokens


class Refused(NamedTuple):
    """What was not taken, and why; `too_large` where it is for want of memory."""

    what: str
    why: str
    too_large: bool = False


class Found(NamedTuple):
    """All options, the best first, and what was refused."""

    options: tuple[Option, ...]
    refused: tuple[Refused, ...]
    looked_at: int

    @property
    def too_large(self) -> bool:
        """Whether there is no option for want of memory, and not because of what was decided."""
        return not self.options and any(refused.too_large for refused in self.refused)


Progress = Callable[[str], None]


def search(
    workload: Workload, machine: Machine, gpus: int, fixed: Fixed | None = None, progress: Progress = lambda _: None
) -> Found:
    """The options for this job, the fastest first. May be empty: then `refused` says why.

    Args:
        workload: what is to be trained.
        machine: devices and links.
        gpus: of the world.
        fixed: what is decided already.
        progress: told what is being looked at.

    Raises:
        ConfigError: a fixed setting that does not exist, or degrees that do not fit together whatever the rest.
    """
    return _Search(workload, machine, gpus, fixed or Fixed()).run(progress)


class _Search:
    def __init__(self, workload: Workload, machine: Machine, gpus: int, fixed: Fixed) -> None:
        if gpus < 1:
            raise ConfigError("a job needs at least one device", fix="Give 1 or more.", gpus=gpus)
        self._workload, self._machine, self._gpus, self._fixed = workload, machine, gpus, fixed
        self._prices = Prices(workload, machine)
        self._refused: list[Refused] = []
        self._looked_at = 0
        self._settings = {k: v for k, v in fixed.settings.items() if v != "auto"}
        for key, known in (("layout", LAYOUTS), ("schedule", BUILDERS)):
            name = self._settings.get(key)
            if name is not None and name not in known:
                raise ConfigError(f"unknown {key}", fix=did_you_mean(str(name), known), **{key: name})
        self._expect_size()

    def run(self, progress: Progress) -> Found:
        coarse: list[Option] = []
        for degree in self._degrees():
            progress(f"{degree.size} ranks a sequence, heads over {degree.heads}")
            coarse += self._option(degree, {})
        coarse = ranked(coarse)
        found = {option.choice: option for option in coarse}
        near = [o for o in coarse if o.seconds_a_token <= NEAR * coarse[0].seconds_a_token][:DETAILED]
        for option in near:
            s = option.choice.settings
            progress(f"{s.size} ranks a sequence, heads over {s.heads}: schedules, layouts, block sizes")
            degree = candidates.Degree(s.size, s.head_degree)
            for details in candidates.details(degree, self._workload, self._machine):
                for other in self._option(degree, details):
                    found.setdefault(other.choice, other)
        return Found(tuple(ranked(found.values())), tuple(self._refused), self._looked_at)

    def _expect_size(self) -> None:
        size = self._settings.get("size")
        if isinstance(size, int) and size >= 1 and self._gpus % size:
            fitting = ", ".join(map(str, candidates.divisors(self._gpus)))
            fix = f"Give one of {fitting}."
            raise ConfigError("the size does not divide the devices", fix=fix, size=size, gpus=self._gpus)

    def _degrees(self) -> Iterator[candidates.Degree]:
        asked = self._settings.get("size"), self._settings.get("heads")
        for sized in candidates.sizes(self._gpus, self._workload, self._machine, asked[0]):
            if sized.why_not:
                self._refuse(f"size {sized.size}", sized.why_not)
                continue
            for degree in candidates.head_degrees(sized.size, self._workload, self._machine, asked[1]):
                if degree.why_not:
                    self._refuse(f"size {degree.size}, heads {degree.heads}", degree.why_not)
                else:
                    yield degree

    def _option(self, degree: candidates.Degree, details: Mapping[str, Any]) -> list[Option]:
        """The fastest way in which this fits into memory, or none."""
        block = {**candidates.base(degree, self._workload, self._machine), **details, **self._settings}
        block |= {"size": degree.size, "heads": degree.heads}
        if block["schedule"] == "double_ring" and block["node"] is None:
            self._refuse(f"size {degree.size}, double_ring", "all ranks of a sequence are in one node")
            return []
        try:
            settings = Settings.parse(block, "the choice")
        except SeqparError as error:
            self._refuse(f"size {degree.size}, heads {degree.heads}", error.what)
            return []
        return self._fitting(settings)

    def _fitting(self, settings: Settings) -> list[Option]:
        ways = [(step(self._prices, choice), choice) for choice in self._ways(settings)]
        ways.sort(key=lambda way: float(f"{way[0].seconds:.4g}"))
        device = self._machine.device
        smallest: Memory | None = None
        for seconds, choice in ways:
            self._looked_at += 1
            needed = memory(self._workload, choice, device)
            if needed.peak <= device.memory and needed.host <= device.host_memory:
                return [Option(choice, seconds, needed)]
            if smallest is None or needed.peak < smallest.peak:
                smallest = needed
        if smallest is not None:
            limit = device.memory
            why = f"needs {smallest.peak / 2**30:.1f} GiB at least ({smallest.at}); there are {limit / 2**30:.1f}"
            if smallest.peak <= limit:
                why = f"needs {smallest.host / 2**30:.1f} GiB of the host's memory for each device"
            self._refused.append(Refused(_named(settings), why, too_large=True))
        return []

    def _ways(self, settings: Settings) -> Iterator[Choice]:
        """Ways to save memory. Of those that cost the same time the first that fits is taken: less traffic first."""
        fixed, asked = self._fixed, self._settings
        remats = [asked["remat"]] if asked.get("remat", "auto") != "auto" else ["attention", "none"]
        tiles = [asked["mlp"]] if "mlp" in asked else ["whole", MLP_TILE]
        offloads = [asked["offload"]] if "offload" in asked else [False, True]
        kept = asked.get("remat", "auto").replace("auto", "attention"), asked.get("offload", False)
        modes = [(False, kept[0], "whole", kept[1])] if fixed.checkpointing is not True else []
        modes += (
            [(True, *mode) for mode in product(remats, tiles, offloads)] if fixed.checkpointing is not False else []
        )
        zeros = ZEROS if fixed.zero is None else (fixed.zero,)
        optimizers = (False, True) if fixed.offload_optimizer is None else (fixed.offload_optimizer,)
        parameters = (False, True) if fixed.offload_parameters is None else (fixed.offload_parameters,)
        for (checkpointing, remat, mlp, offload), optimizer, weights, zero in product(
            modes, optimizers, parameters, zeros
        ):
            if (weights and zero != 3) or (optimizer and zero == 0) or (offload and remat == "none"):
                continue  # ZeRO 3 alone moves weights away, 1 to 3 the optimizer; what is not kept cannot be moved
            update = {"remat": remat, "mlp": asked.get("mlp", mlp), "offload": offload}
            chosen = settings.model_copy(update=update)
            yield Choice(self._gpus, chosen, checkpointing, zero, optimizer, weights)

    def _refuse(self, what: str, why: str) -> None:
        self._refused.append(Refused(what, why))


def ranked(options: Iterable[Option]) -> list[Option]:
    """By time. What is as fast as the best, but for half a percent, is ranked by memory, and then by how plain it is.

    Sorting keeps the order of equals, and options come the plainest first.
    """
    options = list(options)
    least = min((option.seconds_a_token for option in options), default=0.0)
    return sorted(options, key=lambda o: (max(o.seconds_a_token, least * AS_FAST), float(f"{o.memory.peak:.2g}")))


def _named(settings: Settings) -> str:
    block = "" if settings.block_tokens == "auto" else f", blocks of {settings.block_tokens}"
    return f"size {settings.size}, heads {settings.heads}, {settings.layout}, {settings.schedule}{block}"
