"""Pictures are written, are not blank, and show what they should. What they look like, people judge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from seqpar_ring.config import Settings
from seqpar_ring.errors import ConfigError
from seqpar_ring.geometry import Mask
from seqpar_ring.planner.cost import Ring
from seqpar_ring.planner.hardware import machine
from seqpar_ring.planner.picture import AROUND, COLOURS, COMPUTE, HOME, OUT, WAIT, Panel, draw, predicted, written
from seqpar_ring.planner.schedule_picture import draw_schedule
from seqpar_ring.schedule import Row, Traffic
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


def panel(ranks: int, tokens: int = 2**14, **settings: object) -> Panel:
    chosen = Settings.parse({"size": ranks, **settings})
    on = machine("h100", "nvlink+ndr", 4)
    return predicted(Ring((tokens,), Mask(), chosen, Row(8, 2, 64, 64, 2), (on, "bf16")), "a title")


def test_a_predicted_panel_tells_the_seconds_of_the_run() -> None:
    chosen, on = Settings(size=8), machine("h100", "nvlink+ndr", 4)
    ring = Ring((2**14,), Mask(), chosen, Row(8, 2, 64, 64, 2), (on, "bf16"))
    found = predicted(ring, "a title")
    assert found.ranks == 8
    assert found.seconds == pytest.approx(ring.forward.seconds + ring.backward.seconds)
    assert max(bars.end.max(initial=0) for bars in found.bars) == pytest.approx(found.seconds)
    total = {
        kind: sum(float((b.end - b.begin).sum()) for b in found.bars if b.kind == kind) for kind in (COMPUTE, WAIT)
    }
    assert sum(total.values()) == pytest.approx(8 * found.seconds), "a rank computes or waits"
    arrive = sum(len(b.rank) for b in found.bars if b.kind in (OUT, HOME))
    passes = (ring.forward.flows, ring.backward.flows)
    assert arrive == sum(len(flows.kv.post) + len(flows.dkv.post) for flows in passes)
    exposed = (ring.forward.exposed + ring.backward.exposed) / found.seconds
    assert float(found.note.split("exposed ")[1].split("%")[0]) == pytest.approx(100 * exposed, abs=0.6)


def test_heads_that_are_exchanged_stand_before_and_after_the_ring() -> None:
    found = panel(8, heads=2)
    around = [bars for bars in found.bars if bars.kind == AROUND]
    assert found.ranks == 4
    assert len(around) == 4, "before and after, in both passes"
    assert around[0].begin.min() == 0.0


def test_a_timeline_shows_computation_waits_and_transfers(tmp_path: Path) -> None:
    path = tmp_path / "timeline.png"
    draw(path, [panel(8)])
    picture = pixels(path)
    assert picture.shape[1] > 1000
    for kind in (COMPUTE, WAIT, OUT, HOME):
        assert has(picture, COLOURS[kind]) > 200, kind
    assert has(picture, COLOURS[AROUND]) == 0


@pytest.mark.parametrize(("ranks", "rows"), [(3, 3), (64, 64), (192, 128)])
def test_every_rank_has_a_row_up_to_the_most_that_can_be_read(tmp_path: Path, ranks: int, rows: int) -> None:
    path = tmp_path / "timeline.png"
    draw(path, [panel(ranks, 2**16)])
    blue = np.abs(pixels(path).astype(int) - (0x00, 0x72, 0xB2)).max(-1) <= 6
    there = blue[:-60].sum(1) > 10  # rows of pixels with computation, above the legend
    begins = int((there[1:] & ~there[:-1]).sum()) + int(there[0])
    assert begins == rows


def test_a_second_panel_makes_a_taller_picture(tmp_path: Path) -> None:
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    draw(one, [panel(4)])
    draw(two, [panel(4), panel(4, 2**15)], one_scale=False)
    assert pixels(two).shape[0] > 1.7 * pixels(one).shape[0]


def test_seconds_are_written_in_a_unit_that_suits_them() -> None:
    assert [written(s) for s in (12.34, 1.5, 0.4621, 0.00399, 2.5e-6)] == [
        "12.3 s",
        "1.5 s",
        "462 ms",
        "3.99 ms",
        "2.5 µs",
    ]
