"""Flight: the bytes that attention's backward holds on a rank beside its inputs: blocks, gradients, the kernel's own.

The rows are counted from the schedule's own columns, by the rules of `schedule.lives` and `schedule.buffers`, which are
the tests' oracle; that blocks of different sizes cannot always be placed without a gap is not counted. Memory of a pass
is held from its beginning to its end. Forward holds less, so backward is what decides. A schedule is looked at once for
all models and dtypes that share it. No torch, no seconds.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from seqpar_ring import layout as layouts
from seqpar_ring.config import Settings
from seqpar_ring.geometry import Ints, Mask
from seqpar_ring.packing import Balance
from seqpar_ring.planner.loads import Floats, loads
from seqpar_ring.schedule import Flows, Route, Row, Sides

CANONICAL = 1 << 14
"""Tokens a rank from which on one document's schedule is that of this many, stretched: only rows at borders differ."""


ENOUGH = 64
"""Ranks of a ring from which on a rank holds the same, or with "all_gather" a block more for each rank: what is seen
there is continued, so that a ring of thousands need not be built. For one document without a window; a test
compares."""


class Kernel(NamedTuple):
    """What block attention makes in backward beside its results in fp32, in numbers of a row's widths.

    Of each home row (of the side that stays) and each cargo row (of the side that travels), in bytes:
    `wide` x the inputs of that row (q, dout, out or k, v) + `result` x its gradient's width (dq or dk, dv).

    Attributes:
        widens: whether inputs of 16 bits are copied to fp32.
        own: bytes of a number of the results as the kernel returns them, before they become fp32; 0: it returns fp32.
        repeats: whether gradients of key heads are made for each query head, and then summed.
        accumulates: whether dq is summed in a tensor of fp32 of its own.
        lays_out: whether keys and values are copied so that the rows of a head lie together.
        scratch: bytes, however many rows.
    """

    widens: bool
    own: bool
    repeats: bool
    accumulates: bool
    lays_out: bool = False
    scratch: int = 0


KERNELS = {
    # torch's CPU flash kernel as `kernels/cpu.py` calls it: 16-bit inputs in fp32, keys and values by head, and two
    # tiles of 256 x 512 scores.
    "cpu": Kernel(
        widens=True, own=False, repeats=False, accumulates=False, lays_out=True, scratch=2 * 256 * 512 * 4
    ),
    # FlashAttention-2 (read in its source): results in the inputs' dtype, dq summed in fp32, dk, dv of each query head.
    "flash": Kernel(widens=False, own=True, repeats=True, accumulates=True),
}
"""By the name of the kernel that a device runs."""


class Rows(NamedTuple):
    """Rows at each step on each rank, arrays of (steps, world).

    Attributes:
        rows: of blocks that are not the rank's own, and of copies of its own that are under way.
        sums: of gradients of others' rows that are made here.
        back: of gradients that come in.
        out: of gradients that go out.
        home, cargo: spanned by the step's kernel calls, of the side that stays and the side that travels.
        view: of blocks that are laid together to be computed with.
        whole: of all blocks of the step.
        own: of each rank, (world,).
    """

    rows: Floats
    sums: Floats
    back: Floats
    out: Floats
    home: Floats
    cargo: Floats
    view: Floats
    whole: Floats
    own: Floats


def most_in_flight(lengths: tuple[int, ...], mask: Mask, settings: Settings, how: tuple[str, Row, str]) -> float:
    """Bytes on the fullest rank at the fullest step of attention's backward, for one sequence of a batch.

    Args:
        lengths, mask, settings: of the documents, the layer and the ring.
        how: what travels ("kv" or "q"), the heads as one rank of the ring sees them, and the kernel's name.
    """
    return _most(lengths, mask, _way(settings), how)


@lru_cache(maxsize=4096)
def _most(lengths: tuple[int, ...], mask: Mask, way: Settings, how: tuple[str, Row, str]) -> float:
    travels, row, kernel = how
    ring = way.size // way.head_degree
    size, node = ENOUGH * way.head_degree, way.node or way.size
    plain = len(lengths) == 1 and mask.window is None and mask.chunk is None and way.block_tokens == "auto"
    if ring <= ENOUGH or not plain or (size // 2 % node and node != way.size):
        return in_flight(rows_of(lengths, mask, way, travels), row, travels, KERNELS[kernel])
    ranks = (ENOUGH, ENOUGH // 2)
    at, before = (_most((lengths[0] * n // ring,), mask, _smaller(way, n * way.head_degree), how) for n in ranks)
    return at + (ring - ENOUGH) * (at - before) / (ENOUGH // 2)


def _smaller(way: Settings, size: int) -> Settings:
    node = None if way.node == way.size else way.node
    return way.model_copy(update={"size": size, "node": node})


def _way(s: Settings) -> Settings:
    """The settings on which a schedule depends, all others as they are by default, so that it is looked at once."""
    names = s.layout, s.schedule, s.cut, s.head_degree, s.node
    return _way_of(s.size, names, s.block_tokens, (s.balance_tokens, s.balance_area))


@lru_cache(maxsize=1024)
def _way_of(
    size: int, names: tuple[str, str, str, int, int | None], block: int | str, balance: tuple[float, float]
) -> Settings:
    layout, schedule, cut, heads, node = names
    ways = {"size": size, "layout": layout, "schedule": schedule, "cut": cut, "heads": heads, "node": node}
    return Settings.parse({**ways, "block_tokens": block, "balance_tokens": balance[0], "balance_area": balance[1]})


def in_flight(rows: Rows, row: Row, travels: str, kernel: Kernel) -> float:
    """Bytes on the fullest rank at the fullest step, for one sequence of a batch."""
    stays = "q" if travels == "kv" else "kv"
    made = {side: _made(row, side, kernel) for side in ("q", "kv")}
    as_they_are, wide = row._replace(coded=False).out(travels), not kernel.own or row.itemsize >= 4
    planned = rows.rows.max(0) * row.out(travels) + rows.own * row.home(travels) + rows.view.max(0) * row.home(travels)
    planned += (rows.whole if row.coded and travels == "kv" else rows.view).max(0) * as_they_are
    if row.narrow and travels == "kv":
        planned += rows.sums.max(0) * row.home(travels) + (rows.back + rows.out).max(0) * row.back(travels)
    else:
        planned += (rows.sums + rows.back).max(0) * row.home(travels)
    held = planned + rows.home * made[stays] + rows.cargo * made[travels]
    if wide:
        # The gradient of the side that stays begins as the first step's result.
        held += rows.home * row.home(stays) + rows.cargo * row.home(travels)
        held[1:] += rows.own * row.home(stays)
    else:
        held += rows.own * row.home(stays)
    of_rows, before = 2 * row.wide * row.heads, 0  # a gradient of the log-sum-exp (zeros), and itself without -inf
    if travels == "q":  # with delta, which is made before
        of_rows += row.wide * row.heads
        before = 3 * row.heads * row.value_dim * 4 if row.itemsize < 4 else 4 * row.heads * row.value_dim
    fullest = (held + rows.own * of_rows).max(initial=0)
    return float(max(fullest, (rows.own * (before + of_rows)).max(initial=0)) + kernel.scratch)


def _made(row: Row, side: str, kernel: Kernel) -> float:
    """Bytes that the kernel makes of one row of a side, beside its result in fp32."""
    q, out = row.heads * row.head_dim, row.heads * row.value_dim
    k, v = row.kv_heads * row.head_dim, row.kv_heads * row.value_dim
    inputs = q + 2 * out if side == "q" else k + v
    gradient = q if side == "q" else k + v
    made = 4.0 * inputs if kernel.widens and row.itemsize < 4 else 0.0
    if kernel.lays_out and not made and side == "kv" and row.kv_heads > 1:
        made += row.itemsize * inputs
    if kernel.own and row.itemsize < 4:
        made += row.itemsize * gradient
    if kernel.accumulates and side == "q":
        made += 4 * q
    if kernel.repeats and side == "kv" and row.heads > row.kv_heads:
        made += row.itemsize * (q + out)
    return made


def rows_of(lengths: tuple[int, ...], mask: Mask, settings: Settings, travels: str) -> Rows:
    """The rows of these documents under these settings."""
    ring = settings.size // settings.head_degree
    way = (settings.layout, settings.schedule, ring, settings.head_degree, settings.node or settings.size)
    block, stretch = settings.block_tokens, 1.0
    canonical = CANONICAL * ring
    if len(lengths) == 1 and lengths[0] > canonical and block == "auto" and (mask.window, mask.chunk) == (None, None):
        lengths, stretch = (canonical,), lengths[0] / canonical
    balance = Balance(settings.balance_tokens, settings.balance_area)
    found = _rows(lengths, mask, way, (block, settings.cut, travels), balance)
    return found if stretch == 1.0 else Rows(*(column * stretch for column in found))


@lru_cache(maxsize=512)
def _rows(
    lengths: tuple[int, ...],
    mask: Mask,
    way: tuple[str, str, int, int, int],
    how: tuple[int | str, str, str],
    balance: Balance,
) -> Rows:
    (layout, schedule, ring, heads, node), (block, cut, travels) = way, how
    side = layouts.make(layout, lengths, ring, balance)
    sides = Sides(side, side, mask.regions(lengths))
    names = {"size": ring * heads, "heads": heads, "schedule": schedule, "node": node}
    return rows_of_route(Route.of(Settings.parse({**names, "block_tokens": block, "cut": cut}), sides), travels)


def rows_of_route(route: Route, travels: str) -> Rows:
    """The rows of the backward pass of a route where keys travel, or queries."""
    flows = route.flows(backward=True, travels=travels)
    received, made, got = held_rows(flows)
    shape = (received.shape[0], received.shape[1])
    work = loads(flows, route.sides, route.cut(backward=True))
    home, cargo = (np.zeros(shape) for _ in range(2))
    home[: len(work.home)], cargo[: len(work.cargo)] = work.home, work.cargo
    own_out, back_out = _sent(flows, shape)
    view, whole = _laid_together(flows, route, shape)
    own = np.array((route.sides.k if travels == "kv" else route.sides.q).sizes, dtype=float)
    rows, sums, back, out = (x.astype(float) for x in (received + own_out, made, got, back_out))
    return Rows(rows, sums, back, out, home, cargo, view, whole, own)


def _sent(flows: Flows, shape: tuple[int, int]) -> tuple[Ints, Ints]:
    """Rows of copies under way, at each step on each rank: of own rows, and of gradients.

    Own rows are copied to be sent unless they lie together in memory, which those that rotary positions were applied to
    seldom do.
    """
    leaving = flows.kv.take(flows.kv.src == flows.kv.owner)
    # Of one piece different ranks may need different rows, which are blocks of their own.
    columns = np.stack([leaving.owner, leaving.piece, leaving.alike, leaving.rows])
    (owner, _, _, rows), which = np.unique(columns, axis=1, return_inverse=True)
    which = which.ravel()
    first, last = np.zeros_like(owner), np.zeros_like(owner)
    first[which] = leaving.post
    np.minimum.at(first, which, leaving.post)
    np.maximum.at(last, which, leaving.due - 1)
    back = _alive(shape, flows.dkv.src, (flows.dkv.post, flows.dkv.due - 1), flows.dkv.rows)
    return _alive(shape, owner, (first, last), rows), back


def _laid_together(flows: Flows, route: Route, shape: tuple[int, int]) -> tuple[Floats, Floats]:
    """Rows of others' blocks that a step computes with: those that must be laid together, and all."""
    kv, many = flows.kv, route.cut(backward=True).number
    away = flows.uses.owner != flows.uses.rank
    step, rank, owner, piece, _ = (column[away] for column in flows.uses)
    came = np.zeros(shape[1] * shape[1] * many, dtype=np.int64)  # of a block only what is needed comes
    came[(kv.dst * shape[1] + kv.owner) * many + kv.piece] = kv.rows
    whole, blocks = np.zeros(shape), np.zeros(shape)
    np.add.at(whole, (step, rank), came[(rank * shape[1] + owner) * many + piece])
    np.add.at(blocks, (step, rank), 1)
    return np.where(blocks > 1, whole, 0.0), whole


def held_rows(flows: Flows) -> tuple[Ints, Ints, Ints]:
    """Rows that each rank holds at each step beside its own, arrays of (steps, world): received blocks, partial
    gradients of its own making, and partial gradients received. The rules are those of `schedule.lives`."""
    kv, dkv, uses = flows.kv, flows.dkv, flows.uses
    pieces = 1 + int(max(kv.piece.max(initial=0), uses.piece.max(initial=0)))
    world, steps = flows.world, flows.steps + 1

    def key(rank: Ints, owner: Ints, piece: Ints) -> Ints:
        number: Ints = (rank * world + owner) * pieces + piece
        return number

    last = np.full(world * world * pieces, -1, dtype=np.int64)
    into = key(kv.dst, kv.owner, kv.piece)
    last[into] = kv.due
    on = kv.src != kv.owner
    np.maximum.at(last, key(kv.src, kv.owner, kv.piece)[on], kv.due[on] - 1)
    away = uses.rank != uses.owner
    np.maximum.at(last, key(uses.rank, uses.owner, uses.piece)[away], uses.step[away])
    received = _alive((steps, world), kv.dst, (kv.post, last[into]), kv.rows)
    made_at = np.zeros(world * world * pieces, dtype=np.int64)
    made_at[key(uses.rank, uses.owner, uses.piece)] = uses.step
    first = made_at[key(dkv.src, dkv.owner, dkv.piece)]
    made = _alive((steps, world), dkv.src, (first, dkv.due - 1), dkv.rows)
    got = _alive((steps, world), dkv.dst, (dkv.post, dkv.due - 1), dkv.rows)
    return received, made, got


def _alive(shape: tuple[int, int], rank: Ints, span: tuple[Ints, Ints], rows: Ints) -> Ints:
    """Rows that live at each step, from the first and last step of each interval."""
    change = np.zeros((shape[0] + 1, shape[1]), dtype=np.int64)
    np.add.at(change, (span[0], rank), rows)
    np.subtract.at(change, (span[1] + 1, rank), rows)
    alive: Ints = change.cumsum(0)[:-1]
    return alive
