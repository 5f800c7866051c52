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


@pytest.mark.parametrize("width", [72, 80, 100, 132])
def test_a_narrow_terminal_breaks_words_and_no_numbers(width: int) -> None:
    lines = drawn(TABLE, width)
    assert max(map(len, lines)) <= width
    row = next(line for line in lines if "117.44" in line)
    for number in TABLE.numbers:
        assert OPTION[number] in row.split()
    words = "".join("".join(line.split()) for line in lines[3:])
    assert "zigzag" in words or width < 100


def test_where_there_is_room_each_option_is_one_line() -> None:
    assert len(drawn(TABLE, 132)) == 4


def test_a_pipe_is_a_page_wide_or_as_wide_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console().width == PAGE
    monkeypatch.setenv("COLUMNS", "80")
    assert console().width == 80
