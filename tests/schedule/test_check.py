"""The checker refuses broken schedules: each kind of fault, seeded into many schedules; the error says what."""

from __future__ import annotations

import importlib
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from schedule_cases import plain

from seqpar_ring import layout as layouts
from seqpar_ring import schedule
from seqpar_ring.errors import ScheduleError
from seqpar_ring.geometry import Mask, count
from seqpar_ring.schedule import BUILDERS, Block, Move, Sides, Traffic, check

LENGTHS = [13, 1, 30, 7]


def faults(t: Traffic, rnd: random.Random) -> Iterator[tuple[str, Traffic]]:
    def at(items: Sequence[Any], n: int, **change: object) -> tuple[Any, ...]:
        return (*items[:n], items[n]._replace(**change), *items[n + 1 :])

    def without(items: Sequence[Any], n: int) -> tuple[Any, ...]:
        return (*items[:n], *items[n + 1 :])

    for name, moves in (("kv", t.kv), ("dkv", t.dkv)):
        n = rnd.randrange(len(moves))
        move = moves[n]
        yield f"{name} dropped", t._replace(**{name: without(moves, n)})
        yield f"{name} twice", t._replace(**{name: (*moves, move)})
        for elsewhere in wrong_ranks(t, move, name):
            yield f"{name} to a wrong rank", t._replace(**{name: at(moves, n, dst=elsewhere)})
        yield f"{name} to itself", t._replace(**{name: at(moves, n, dst=move.src)})
        yield f"{name} due when posted", t._replace(**{name: at(moves, n, post=move.due)})
        nowhere = Block(move.block.owner, ((0, 999),))
        yield f"{name} of rows nobody has", t._replace(**{name: at(moves, n, block=nowhere)})
    n = rnd.randrange(len(t.kv))
    yield "kv late", t._replace(kv=at(t.kv, n, due=t.kv[n].due + 1))
    n = rnd.randrange(len(t.dkv))
    (made,) = {u.step for u in t.uses if (u.rank, u.block) == (t.dkv[n].src, t.dkv[n].block)}
    yield "dkv before it is made", t._replace(dkv=at(t.dkv, n, post=made))
    n = rnd.randrange(len(t.uses))
    block = t.uses[n].block
    short = block._replace(rows=((block.rows[0][0], block.rows[-1][1] - 1),))
    yield "use dropped", t._replace(uses=without(t.uses, n))
    yield "use twice", t._replace(uses=(*t.uses, t.uses[n]))
    yield "use of too few rows", t._replace(uses=at(t.uses, n, block=short))
    own = [n for n, use in enumerate(t.uses) if use.rank == use.block.owner and count(use.block.rows) > 1]
    for n in own[:1]:
        [(a, b)] = t.uses[n].block.rows
        apart = t.uses[n].block._replace(rows=((a, a + 1), (a + 1, b)))
        yield "own rows apart", t._replace(uses=at(t.uses, n, block=apart))
    yield "use after the end", t._replace(uses=at(t.uses, n, step=t.steps + 1))


def wrong_ranks(t: Traffic, move: Move, name: str) -> list[int]:
    """Ranks at which a transfer is a fault: a dKV may as well go home, or to a user that sends its own sum on later."""
    sent_later = {m.src for m in t.dkv if m.block == move.block and m.post >= move.due} if name == "dkv" else set()
    right = {move.src, move.dst, *({move.block.owner} if name == "dkv" else ()), *sent_later}
    return [r for r in range(t.world) if r not in right][:1]


# Tokens a block is cut into or collected to; half a block, a block, two blocks.
CASES = list(itertools.product((3, 4), (1, 2, 99), sorted(layouts.LAYOUTS), sorted(BUILDERS), (7, None, 34)))
MASKS = [Mask(), Mask(causal=False), Mask(window=9), Mask(chunk=11), Mask(prefix=1)]


@pytest.mark.parametrize(("world", "node", "name", "how", "block_tokens"), CASES)
def test_seeded_faults_are_refused(world: int, node: int, name: str, how: str, block_tokens: int | None) -> None:
    mask = MASKS[(world + node + len(name) + len(how)) % len(MASKS)]
    options = {"node": 2 if world == 4 else 1, **({"block_tokens": block_tokens} if block_tokens else {})}
    problem = plain(name, LENGTHS, world, mask, how, **options)
    good = schedule.transpose(problem.traffic("q" if node == 2 else "kv", returns=True), node)
    check(good, problem.sides)
    rnd = random.Random(world * node)
    for what, bad in faults(good, rnd):
        if what == "kv late" and _still_in_time(bad, good):
            continue
        assert refused(bad, problem.sides), f"not refused: {what}"


def refused(traffic: Traffic, sides: Sides) -> bool:
    try:
        check(traffic, sides)
    except ScheduleError:
        return True
    return False


def _still_in_time(bad: Traffic, good: Traffic) -> bool:
    """A block that only passes through may come later than first planned, as long as it is sent on after that."""
    (late,) = set(bad.kv) - set(good.kv)
    used = any(u.rank == late.dst and u.block == late.block and u.step < late.due for u in bad.uses)
    sent = any(m.src == late.dst and m.block == late.block and m.post < late.due for m in bad.kv)
    return not used and not sent


def test_a_circular_wait_is_found_with_the_rank_and_step() -> None:
    # Rank 0 enters step 1 only with what rank 1 posts at step 1, and the other way round. The order of post and due
    # forbids this already, so the search itself is asked.
    progress = importlib.import_module("seqpar_ring.schedule.check")._progress
    block = Block(0, ((0, 1),))
    waiting = Traffic(2, 2, (), (Move(1, 1, 0, 1, block), Move(1, 1, 1, 0, block)))
    with pytest.raises(ScheduleError, match=r"circular wait.*rank=0, step=1"):
        progress(waiting)
    progress(waiting._replace(kv=(Move(0, 1, 0, 1, block), Move(0, 1, 1, 0, block))))


def test_own_rows_are_computed_with_by_themselves() -> None:
    """The executor takes them from where they lie, and lays only what others sent side by side."""
    problem = plain("zigzag", [64], 2, block_tokens=8)
    good = problem.traffic()
    check(good, problem.sides)
    own = next(use.step for use in good.uses if use.rank == use.block.owner == 0 and use.step > 0)
    n = next(n for n, use in enumerate(good.uses) if use.rank == 0 != use.block.owner and use.step < own)
    later = good._replace(uses=tuple(sorted((*good.uses[:n], good.uses[n]._replace(step=own), *good.uses[n + 1 :]))))
    with pytest.raises(ScheduleError, match="other blocks are beside them"):
        check(later, problem.sides)


def test_the_error_names_what_is_missing() -> None:
    problem = plain("zigzag", [40], 4)
    forward = problem.traffic()
    with pytest.raises(ScheduleError, match="not every allowed pair is computed"):
        check(forward._replace(uses=forward.uses[1:]), problem.sides)
    backward = schedule.transpose(forward, 4)
    with pytest.raises(ScheduleError, match="a partial dKV is missing"):
        check(backward._replace(dkv=backward.dkv[1:]), problem.sides)
