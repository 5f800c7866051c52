"""Render: a schedule as text that a person can read. Ranks down, steps across.

It exists for bug reports, documents and the curious, `print(render(plan.schedule))`: what it prints is the very data
that the executor runs. It says which block each rank computes with and what it sends to whom; it does not say which
pairs a mask allows, and it measures nothing. Pure Python.
"""

from __future__ import annotations

from seqpar_ring.geometry import Rows, count
from seqpar_ring.schedule.traffic import Move, Traffic

Cell = list[str]
"""The lines of one rank at one step."""


def render(traffic: Traffic, width: int = 120) -> str:
    """A traffic as text, at most `width` characters wide where a single column fits.

    A cell holds first the blocks the rank computes with, `owner[rows]`, or `-` when there are none; then what it posts
    at the start of that step: `owner[rows] → rank` for what travels, `d owner[rows] ⇒ rank` for its gradient. A
    transfer is there at the next step, unless `@step` says when.
    """
    cells = {(rank, step): _cell(traffic, rank, step) for rank in range(traffic.world) for step in range(traffic.steps)}
    wide = [
        max([len(_title(step)), *(len(line) for rank in range(traffic.world) for line in cells[rank, step])])
        for step in range(traffic.steps)
    ]
    side = len(_name(traffic.world - 1))
    bands = _bands(wide, max(1, width - side))
    return "\n\n".join([_summary(traffic), *(_table(traffic.world, band, cells, wide) for band in bands)])


def _summary(traffic: Traffic) -> str:
    name = "backward" if traffic.dkv else "forward"
    there, back = ("Q", "dQ") if traffic.travels == "q" else ("KV", "dKV")
    name += ", queries travel" if traffic.travels == "q" else ""
    parts = [f"{traffic.world} ranks", f"{traffic.steps} steps", f"{len(traffic.uses)} uses", _sent(there, traffic.kv)]
    parts += [_sent(back, traffic.dkv)] if traffic.dkv else []
    return f"{name}: {', '.join(parts)}"


def _sent(what: str, moves: tuple[Move, ...]) -> str:
    return f"{what} sent {len(moves)} times ({sum(count(move.block.rows) for move in moves)} rows)"


def _cell(traffic: Traffic, rank: int, step: int) -> Cell:
    lines = [_block(use.block.owner, use.block.rows) for use in traffic.uses if (use.rank, use.step) == (rank, step)]
    lines = lines or ["-"]
    for moves, mark, arrow in ((traffic.kv, "", "→"), (traffic.dkv, "d ", "⇒")):
        for move in moves:
            if (move.src, move.post) == (rank, step):
                late = f" @{move.due}" if move.due != move.post + 1 else ""
                lines.append(f"{mark}{_block(move.block.owner, move.block.rows)} {arrow} {move.dst}{late}")
    return lines


def _block(owner: int, rows: Rows) -> str:
    return f"{owner}[{' '.join(f'{a}:{b}' for a, b in rows)}]"


def _bands(wide: list[int], width: int) -> list[range]:
    """The steps, cut so that the columns of each band fit the width."""
    bands, first, used = [], 0, 0
    for step, columns in enumerate(wide):
        if step > first and used + columns + 2 > width:
            bands.append(range(first, step))
            first, used = step, 0
        used += columns + 2
    bands.append(range(first, len(wide)))
    return bands


def _table(world: int, band: range, cells: dict[tuple[int, int], Cell], wide: list[int]) -> str:
    side = len(_name(world - 1))
    lines = [[" " * side, *(_title(step).ljust(wide[step]) for step in band)]]
    for rank in range(world):
        for i in range(max((len(cells[rank, step]) for step in band), default=1)):
            lines.append([(_name(rank) if i == 0 else "").ljust(side)])
            lines[-1] += [_line(cells[rank, step], i).ljust(wide[step]) for step in band]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _line(cell: Cell, i: int) -> str:
    return cell[i] if i < len(cell) else ""


def _name(rank: int) -> str:
    return f"rank {rank}"


def _title(step: int) -> str:
    return f"step {step}"
