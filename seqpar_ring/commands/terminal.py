"""Terminal: sections of a report drawn by rich, as wide as the terminal, or as a page where there is none."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from seqpar_ring.planner.sections import Section

PAGE = 132
"""Columns where nothing says how wide the terminal is: a file, a pipe."""


def console(stderr: bool = False) -> Console:
    """A console that prints text as it is."""
    out = Console(highlight=False, markup=False, emoji=False, stderr=stderr)
    return out if out.is_terminal else Console(highlight=False, markup=False, emoji=False, stderr=stderr, width=PAGE)


def show(out: Console, sections: Iterable[Section]) -> None:
    """Draw each section, its title above it."""
    for i, section in enumerate(sections):
        if i:
            out.print()
        out.print(section.title, style="bold")
        if section.head:
            out.print(Padding(_table(section), (0, 0, 0, 1), expand=False))
        else:
            for (line,) in section.rows:
                out.print(Padding(line, (0, 0, 0, 2), expand=False))


def _table(section: Section) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    last = len(section.head) - 1
    for i, name in enumerate(section.head):
        number = i in section.numbers
        table.add_column(name, justify="right" if number else "left", no_wrap=number or i < last, overflow="fold")
    for row in section.rows:
        table.add_row(*row)
    return table
