"""Cost: one layer's attention over a ring, priced: the seconds of each step from its loads, and both passes simulated.

What is counted beside the kernel is what the executor does: partial results merged in a wide dtype, partial gradients
added up, heads exchanged before and after the ring where they are shared out. Rates are the machine's, and work is the
schedule's (`loads`); formulas for schedules there are none.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np

from seqpar_ring import layout as layouts
from seqpar_ring.config import Settings
from seqpar_ring.geometry import Mask
from seqpar_ring.packing import Balance
from seqpar_ring.planner.hardware import BACKWARD, Machine, Pace
from seqpar_ring.planner.loads import Floats, Loads, loads
from seqpar_ring.planner.simulate import Place, Run, simulate
from seqpar_ring.schedule import Flows, Route, Row, Sides

FORWARD, BACK = "qkvoL", "qkvooLqgh"
"""What is exchanged around the ring in each pass: see `exchanged`. In backward dout and out; then the gradients."""

TOUCHED = 3
"""Numbers that cross memory for each one that is merged or added: both operands are read, the sum is written."""


class Pass(NamedTuple):
    """A pass, priced.

    Attributes:
        flows: its traffic.
        loads: its work.
        run: how it went.
        around: seconds before and after the ring that nothing hides: heads exchanged.
    """

    flows: Flows
    loads: Loads
    run: Run
    around: float

    @property
    def seconds(self) -> float:
        """Seconds of the whole pass."""
        return self.run.seconds + self.around

    @property
    def exposed(self) -> float:
        """Seconds of it in which the busiest rank does not compute."""
        return self.seconds - self.run.computing

    def sending(self, far: bool, place: Place, sizes: tuple[float, float]) -> float:
        """Seconds that the busiest rank sends over links between nodes (`far`) or within, if nothing disturbs it."""
        seconds = np.zeros(self.flows.world)
        for moves, size in zip((self.flows.kv, self.flows.dkv), sizes, strict=True):
            crosses = (place.node_of(moves.src) != place.node_of(moves.dst)) == far
            np.add.at(seconds, moves.src[crosses], moves.rows[crosses] * size * place.crowd(far))
        return float(seconds.max(initial=0.0)) / place.link(far).bandwidth


class Ring:
    """One layer's attention, for given documents, mask, settings and machine. Prices are made when asked for.

    Args:
        lengths: tokens of the documents.
        mask: what a query sees.
        settings: of the ring; names must be known.
        row: the heads of the whole layer.
        machine: devices and links.
        dtype: whose paces to take: "bf16", "fp32".
    """

    def __init__(
        self, lengths: tuple[int, ...], mask: Mask, settings: Settings, row: Row, priced: tuple[Machine, str]
    ) -> None:
        self.machine, dtype = priced
        self.settings, self.row = settings, row.shared(settings.head_degree).sent(settings.kv_dtype, settings.dkv_dtype)
        self._whole, self._tokens = row, sum(lengths)
        self.paces = self.machine.device.paces(dtype)
        side = _side(settings.layout, lengths, settings.size // settings.head_degree, settings)
        self.sides = Sides(side, side, mask.regions(lengths))
        self.route = Route.of(settings, self.sides)
        self.place = Place(self.machine, settings.head_degree, settings.size)

    @cached_property
    def travels(self) -> str:
        """What travels in backward: "kv" or "q"."""
        asked = self.settings.backward
        return asked if asked != "auto" else self.row.cheaper(self._tokens, self._tokens)

    @cached_property
    def forward(self) -> Pass:
        """The forward pass."""
        flows = self.route.flows()
        work = loads(flows, self.sides, self.route.cut(backward=False))
        row, device = self.row, self.machine.device
        seconds = kernel_seconds(work, self.paces.forward, row, 1.0)
        merged = _later(work.home) * row.heads * row.value_dim * row.wide * TOUCHED / device.bandwidth
        run = simulate(flows, seconds + merged, (row.out("kv"), 0), self.place)
        return Pass(flows, work, run, exchanged(FORWARD, self._whole, self.settings, (self._tokens, self.machine)))

    @cached_property
    def backward(self) -> Pass:
        """The backward pass."""
        travels = self.travels
        flows = self.route.flows(backward=True, travels=travels)
        work = loads(flows, self.sides, self.route.cut(backward=True))
        row, device = self.row, self.machine.device
        seconds = kernel_seconds(work, self.paces.backward, row, BACKWARD)
        home, back = (row.home("q"), row.home("kv")) if travels == "kv" else (row.home("kv"), row.home("q"))
        added = _later(work.home) * home + _joined(flows, seconds.shape) * back
        seconds = seconds + added * TOUCHED / device.bandwidth
        run = simulate(flows, seconds, (row.out(travels), row.back(travels)), self.place)
        return Pass(flows, work, run, exchanged(BACK, self._whole, self.settings, (self._tokens, self.machine)))

    @cached_property
    def sending(self) -> tuple[float, float]:
        """Seconds of both passes that the busiest rank sends, within nodes and between them."""
        travels = self.travels
        sizes = (self.row.out("kv"), 0), (self.row.out(travels), self.row.back(travels))
        both = zip((self.forward, self.backward), sizes, strict=True)
        near, far = zip(
            *((one.sending(False, self.place, s), one.sending(True, self.place, s)) for one, s in both), strict=True
        )
        return sum(near), sum(far)


def exchanged(what: str, row: Row, settings: Settings, on: tuple[int, Machine]) -> float:
    """Seconds in which ranks that share out the heads exchange tokens for heads, before the ring and after it.

    Args:
        what: the tensors, one letter each: q, k, v, o for out, L for a log-sum-exp, g and h for gradients of k and v.
        row: the heads of the whole layer.
        settings: of the ring.
        on: tokens of the sequence, and the machine.
    """
    degree, (tokens, machine) = settings.head_degree, on
    if degree == 1:
        return 0.0
    keys = max(row.kv_heads, degree)  # a key head that several ranks need is sent to each
    summed = row.wide if row.kv_heads < degree else row.itemsize  # gradients of a key head that several ranks have
    nbytes = {"q": row.heads * row.head_dim * row.itemsize, "o": row.heads * row.value_dim * row.itemsize}
    nbytes |= {"k": keys * row.head_dim * row.itemsize, "v": keys * row.value_dim * row.itemsize}
    nbytes |= {"g": keys * row.head_dim * summed, "h": keys * row.value_dim * summed, "L": row.heads * row.wide}
    sent = tokens / settings.size * sum(nbytes[letter] for letter in what) * (degree - 1) / degree
    sharing = min(machine.inner.shared_by, machine.node)  # all devices of a node exchange at once
    return 2 * machine.inner.latency + sent * sharing / machine.inner.bandwidth


def kernel_seconds(work: Loads, pace: Pace, row: Row, passes: float) -> Floats:
    """Seconds that the kernel takes for each step and rank, at this pace.

    Args:
        work: pairs, rows and calls.
        pace: of the pass.
        row: the heads.
        passes: FLOP of the pass for each of forward.
    """
    flop = 2.0 * passes * row.heads * (row.head_dim + row.value_dim)
    return work.calls * pace.call + flop * (work.pairs + pace.row * work.home) / pace.rate


def _later(rows: Floats) -> Floats:
    """Rows that meet a result that is there already: all but those of a rank's first step."""
    later = rows.copy()
    first = (rows > 0).argmax(0)
    later[first, np.arange(rows.shape[1])] = 0
    return later


def _joined(flows: Flows, shape: tuple[int, ...]) -> Floats:
    """Rows of gradients that each rank adds to its own when they arrive."""
    rows = np.zeros(shape)
    np.add.at(rows, (flows.dkv.due, flows.dkv.dst), flows.dkv.rows)
    return rows


def _side(name: str, lengths: tuple[int, ...], world: int, settings: Settings) -> layouts.Layout:
    return layouts.make(name, lengths, world, Balance(settings.balance_tokens, settings.balance_area))
