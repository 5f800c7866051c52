"""The checker: proves on plain data that a schedule computes the right answer and cannot hang. Pure Python.

It shows that every allowed (q, k) pair is met exactly once and no other, that each use away from home has exactly one
dKV transfer, that a block is where it is used and sent from, that a rank computes with its own rows where they lie,
that no circular wait exists, and how many buffers are alive at most. It works for any schedule, whoever built it. It
knows nothing of tensors: that the executor obeys is for the tests.
"""

from __future__ import annotations

from collections import Counter, deque
from itertools import pairwise

from seqpar_ring.errors import ScheduleError
from seqpar_ring.geometry import Regions, area, view
from seqpar_ring.layout import Layout
from seqpar_ring.schedule.calls import tiles
from seqpar_ring.schedule.program import lives, peak
from seqpar_ring.schedule.traffic import Block, Traffic
from seqpar_ring.schedule.work import Sides

NEVER = 1 << 30


def check(traffic: Traffic, sides: Sides) -> dict[str, int]:
    """Prove a schedule, forward or backward, and give the peak of live buffers of any rank.

    Args:
        traffic: of the whole group.
        sides: layouts of queries and keys, and the mask.

    Returns:
        {"kv": received blocks, "made": partial dKV made, "got": partial dKV received}, each the most alive at one step.

    Raises:
        ScheduleError: the first property that does not hold, with the values.
    """
    home, cargo, regions = sides
    if traffic.travels == "q":
        home, cargo, regions = cargo, home, regions.transposed()
    _well_formed(traffic, cargo)
    _coverage(traffic, home, cargo, regions)
    _residence(traffic)
    if traffic.dkv:
        _gradients(traffic)
    _progress(traffic)
    alive = [lives(traffic, rank) for rank in range(traffic.world)]
    return {kind: max(peak(of_rank[kind]) for of_rank in alive) for kind in ("kv", "made", "got")}


def _expect(holds: bool, what: str, **values: object) -> None:
    if not holds:
        raise ScheduleError(what, **values)  # type: ignore[arg-type]


def _well_formed(traffic: Traffic, layout: Layout) -> None:
    _expect(traffic.world == len(layout), "the traffic is for another world", world=traffic.world, layout=len(layout))
    ranks, tokens = range(traffic.world), [sum(run.n for run in runs) for runs in layout]
    for move in traffic.kv + traffic.dkv:
        apart = move.src in ranks and move.dst in ranks and move.src != move.dst
        _expect(apart, "a move between no two ranks", move=move)
        _expect(0 <= move.post < move.due <= traffic.steps, "a move that is due before it can arrive", move=move)
    for block in {*(use.block for use in traffic.uses), *(move.block for move in traffic.kv)}:
        inside = all(0 <= a < b <= tokens[block.owner] for a, b in block.rows)
        _expect(inside, "a block holds rows that its owner has not", block=block, tokens=tokens[block.owner])
    met = Counter((use.rank, use.step) for use in traffic.uses)
    for use in traffic.uses:
        in_place = use.rank != use.block.owner or (len(use.block.rows) == 1 and met[use.rank, use.step] == 1)
        _expect(in_place, "a rank's own rows do not lie together, or other blocks are beside them", use=use)


def _coverage(traffic: Traffic, home: Layout, cargo: Layout, regions: Regions) -> None:
    """Every allowed pair exactly once. A tile holds allowed pairs only (geometry), and a rank meets no row of KV twice
    (shown here), so no pair comes twice; and as many pairs are computed as the mask allows, so none is missing."""
    computed = 0
    met: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for use in traffic.uses:
        owner, rows = use.block
        met.setdefault((use.rank, owner), []).extend(rows)
        computed += sum(map(area, tiles(home[use.rank], view(cargo[owner], rows), regions)))
    for (rank, owner), ranges in met.items():
        ranges.sort()
        once = all(a[1] <= b[0] for a, b in pairwise(ranges))
        _expect(once, "a rank meets the same rows twice", rank=rank, owner=owner, rows=ranges)
    allowed = regions.pairs()
    _expect(computed == allowed, "not every allowed pair is computed", computed=computed, allowed=allowed)


def _residence(traffic: Traffic) -> None:
    """A block is where it is sent from and where it is used, and comes to no rank twice."""
    has: dict[tuple[int, Block], int] = {}

    def there(rank: int, block: Block) -> int:
        return 0 if rank == block.owner else has.get((rank, block), NEVER)

    for move in sorted(traffic.kv, key=lambda m: m.due):
        _expect(there(move.src, move.block) <= move.post, "a block is sent on before it has arrived", move=move)
        _expect(there(move.dst, move.block) == NEVER, "a block comes to a rank that has it", move=move)
        has[move.dst, move.block] = move.due
    seen: set[tuple[int, Block]] = set()
    for use in traffic.uses:
        _expect(there(use.rank, use.block) <= use.step, "a block is used before it has arrived", use=use)
        _expect((use.rank, use.block) not in seen, "a block is used twice by one rank", use=use)
        _expect(0 <= use.step < traffic.steps, "a use after the last step", use=use, steps=traffic.steps)
        seen.add((use.rank, use.block))


def _gradients(traffic: Traffic) -> None:
    """dKV leaves once for each use away from home, after it was made and after all that joins it has come."""
    used = {(use.rank, use.block): use.step for use in traffic.uses}
    left: dict[tuple[int, Block], int] = {}
    for move in traffic.dkv:
        _expect((move.src, move.block) not in left, "a partial dKV is sent twice", move=move)
        left[move.src, move.block] = move.post
    away = {key for key in used if key[0] != key[1].owner}
    odd = sorted(set(left) ^ away)
    _expect(not odd, "a partial dKV is missing, or nobody made it", rank_and_block=odd[:1])
    for (rank, block), post in left.items():
        _expect(used[rank, block] < post, "a partial dKV leaves before it is made", rank=rank, block=block, post=post)
    for move in traffic.dkv:
        home = move.dst == move.block.owner
        in_time = home or move.due <= left.get((move.dst, move.block), -1)
        _expect(in_time, "a partial dKV misses what it joins", move=move)


def _progress(traffic: Traffic) -> None:
    """Let every rank run as far as it can: it enters a step when its partners have posted all that is due there."""
    due: list[dict[int, list[tuple[int, int]]]] = [{} for _ in range(traffic.world)]
    for move in traffic.kv + traffic.dkv:
        for rank, other in ((move.src, move.dst), (move.dst, move.src)):
            due[rank].setdefault(move.due, []).append((other, move.post))
    at, ready = [0] * traffic.world, deque(range(traffic.world))
    while ready:
        rank = ready.popleft()
        before = at[rank]
        while at[rank] < traffic.steps and all(at[o] >= post for o, post in due[rank].get(at[rank] + 1, ())):
            at[rank] += 1
        if at[rank] > before:
            ready.extend(range(traffic.world))
    stuck = at.index(min(at))
    _expect(at[stuck] == traffic.steps, "a circular wait: a rank never enters a step", rank=stuck, step=at[stuck] + 1)
