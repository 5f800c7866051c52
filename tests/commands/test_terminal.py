"""Reports on a terminal: nothing of a number is lost, however narrow it is."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from seqpar_ring.commands.terminal import PAGE, console, show
from seqpar_ring.planner.sections import COLUMNS, Section

OPTION = ("1", "16", "8", "zigzag", "double_ring", "rank's", "layers", "1", "attention", "66.4", "117.44", "35,714")
TABLE = Section("The best of 47", (OPTION,), COLUMNS, (0, 1, 2, 5, 7, 9, 10, 11))


def drawn(section: Section, width: int) -> list[str]:
    out = Console(file=StringIO(), width=width, highlight=False, markup=False)
    show(out, [section])
    assert isinstance(out.file, StringIO)
    return out.file.getvalue().splitlines()


@pytest.mark.parametrize(("width", "options"), [(30, 1), (72, 4), (80, 4), (100, 5), (132, 5)])
def test_however_narrow_a_terminal_is_numbers_are_whole(width: int, options: int) -> None:
    """Where an option does not fit into a line it has a column, and so do words then."""
    lines = drawn(TABLE._replace(rows=(OPTION,) * options), width)
    assert max(map(len, lines)) <= width
    said = " ".join(lines).split()
    for value in OPTION[1:]:
        assert said.count(value) >= options, value


def test_where_nothing_else_helps_words_are_broken_and_no_numbers() -> None:
    said = " ".join(drawn(TABLE._replace(rows=(OPTION,) * 9), 80)).split()
    for number in TABLE.numbers[1:]:
        assert said.count(OPTION[number]) >= 9
    assert "double_ring" not in said


def test_where_there_is_room_each_option_is_one_line() -> None:
    assert len(drawn(TABLE, 132)) == 4


def test_a_pipe_is_a_page_wide_or_as_wide_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console().width == PAGE
    monkeypatch.setenv("COLUMNS", "80")
    assert console().width == 80
