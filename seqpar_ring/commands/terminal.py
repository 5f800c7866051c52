"""Terminal: sections of a report drawn by rich, as wide as the terminal, or as a page where there is none."""

from __future__ import annotations

from collections.abc import Iterable
from shutil import get_terminal_size

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from seqpar_ring.planner.sections import Section

PAGE = 132
"""Columns where nothing says how wide the terminal is: a file, a pipe."""

GAP = 3
"""Columns between two of a table."""

LEGIBLE = 20
"""Columns that the last of a table's needs, whose words go over several lines."""


def console(stderr: bool = False) -> Console:
    """A console that prints text as it is."""
    out = Console(highlight=False, markup=False, emoji=False, stderr=stderr)
    if out.is_terminal:
        return out
    width = get_terminal_size((PAGE, 24)).columns  # COLUMNS, where somebody has said so
    return Console(highlight=False, markup=False, emoji=False, stderr=stderr, width=width)


def show(out: Console, sections: Iterable[Section]) -> None:
    """Draw each section, its title above it."""
    for i, section in enumerate(sections):
        if i:
            out.print()
        out.print(section.title, style="bold")
        if section.head:
            out.print(Padding(_table(section, out.width - 1), (0, 0, 0, 1), expand=False))
        else:
            for (line,) in section.rows:
                out.print(Padding(line, (0, 0, 0, 2), expand=False))


def _table(section: Section, room: int) -> Table:
    """Where there is no room, rows and columns change places, or else words go over several lines.

    Numbers never do: one that is cut off looks like another.
    """
    cramped = _needs(section) > room
    if cramped and _needs(_turned(section)) <= room:
        section, cramped = _turned(section), False
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    last = len(section.head) - 1
    for i, (name, width) in enumerate(zip(section.head, _widths(section), strict=True)):
        number = i in section.numbers
        table.add_column(
            name,
            justify="right" if number else "left",
            no_wrap=number or (i < last and not cramped),
            min_width=width if number else None,
            overflow="fold",
        )
    for row in section.rows:
        table.add_row(*row)
    return table


def _widths(section: Section) -> list[int]:
    return [max(map(len, column)) for column in zip(section.head, *section.rows, strict=True)]


def _needs(section: Section) -> int:
    """Columns of the page that a table takes if only the words of its last column go over several lines."""
    *widths, last = _widths(section)
    words = len(section.head) - 1 not in section.numbers
    return sum(widths) + GAP * len(widths) + (min(last, LEGIBLE) if words else last)


def _turned(section: Section) -> Section:
    """The same with a column for each row, under what stood in front of it."""
    first, *others = zip(*section.rows, strict=True)
    rows = tuple((name, *values) for name, values in zip(section.head[1:], others, strict=True))
    return Section(section.title, rows, (section.head[0], *first), tuple(range(1, len(first) + 1)))
