"""Pictures are written, are not blank, and show what they should. What they look like, people judge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from seqpar_ring.errors import ConfigError
from seqpar_ring.planner.schedule_picture import draw_schedule
from seqpar_ring.schedule import Traffic
from seqpar_ring.schedule import __main__ as schedules


def pixels(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path).convert("RGB"))


def has(picture: NDArray[np.uint8], colour: str) -> int:
    """How many pixels are of this colour, but for what a palette rounds."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(picture.astype(int) - wanted).max(-1) <= 6).sum())


def traffic(*arguments: str) -> Traffic:
    return schedules.planned(schedules.parse(arguments)).traffic


def test_a_schedule_is_drawn_in_the_colours_of_its_ranks(tmp_path: Path) -> None:
    path = tmp_path / "schedule.png"
    draw_schedule(path, traffic("--lengths", "60", "--size", "3", "--backward"), "a ring")
    picture = pixels(path)
    assert picture.shape[0] > 200
    assert picture.shape[1] > 600
    for colour in ("#2f6fab", "#e08a1e", "#3d9970"):
        assert has(picture, colour) > 1000
    assert has(picture, "#b0487f") == 0, "there is no fourth rank"


def test_a_schedule_that_nobody_could_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be drawn legibly"):
        draw_schedule(tmp_path / "x.png", traffic("--lengths", "640", "--size", "32"), "")


def test_a_picture_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the picture cannot be written"):
        draw_schedule(tmp_path / "no" / "folder.png", traffic("--lengths", "40", "--size", "2"), "")
