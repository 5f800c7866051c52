"""How well transfers hide: ring attention on links on which a pass's transfers take 0.8 or 3 times its computation.

    python benchmarks/overlap.py [--world 2 4] [--tokens 8192 16384 32768] [--times 0.8 3] [--turns 3] [--nice -10]
        [--out FOLDER]

Needs root (`netns.py`). First the same attention is timed without a limit: that is its computation. Then links are
shaped so that what the busiest rank sends takes that much longer or shorter, and forward and backward are timed with
blocks whole and in pieces, and on the slow link with keys and values as int8 and their gradients as bf16 too, in turn
with the computation, whose pace may change. Each figure is the wall time over the larger of the two: 1.0 is a transfer
that hides perfectly, or a link that never waits.

Where the computation is what takes the time, all cores are busy, and a packet costs them a few interrupts, which it
does not cost beside a network card; so links carry large packets there (`netns.LARGE`). A message that comes after a
pause is then ahead by one of them: 2 MiB come 3 % sooner than the rate says.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from machine import described
from netns import LARGE, PACKET
from shaped import Result, Setting, measure

from seqpar_ring.geometry import Mask
from seqpar_ring.layout import make
from seqpar_ring.schedule import Route, Row, Sides

HIDES, SHOWS = 0.8, 3.0
"""Transfer over computation: where all of it could hide, and where the link is what takes the time."""

PIECES = {HIDES: (1, 2, 4, 8), SHOWS: (1, 4, 8, 16)}
"""Pieces that a block travels in. Where the computation takes the time so do its pieces, so they are fewer."""

FORMS = (("same", "fp32"), ("same", "bf16"), ("int8", "fp32"), ("int8", "bf16"))
"""What keys and values travel in, and their gradients."""

LONG = 32768
"""Tokens from which on a computation takes so long that nothing but the ring is timed."""


def sent(setting: Setting) -> float:
    """Bytes that the busiest rank sends in forward and backward, from the schedules that are run."""
    side = make(setting.layout, (setting.tokens,), setting.world)
    route = Route.of(setting.settings, Sides(side, side, Mask().regions((setting.tokens,))))
    row = Row(setting.heads, setting.kv_heads, setting.head_dim, setting.head_dim, 4)
    row = row.sent(setting.kv_dtype, setting.dkv_dtype)
    by_rank = [0.0] * setting.world
    for backward in (False, True):
        flows = route.flows(backward=backward)
        for moves, size in ((flows.kv, row.out("kv")), (flows.dkv, row.back("kv"))):
            for rank, rows in zip(moves.src.tolist(), moves.rows.tolist(), strict=True):
                by_rank[rank] += rows * size
    return max(by_rank)


def pieces_of(setting: Setting, pieces: int) -> Setting:
    """The setting with blocks in so many pieces."""
    block = 0 if pieces == 1 else -(-setting.tokens // setting.world // pieces)
    return setting._replace(block_tokens=block)


def case(world: int, tokens: int, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one number of ranks and tokens."""
    plain = Setting(world, tokens)

    def timed(settings: list[Setting], turns: int, packet: int = PACKET) -> list[Result]:
        say = partial(print, flush=True)
        return measure(settings, nice=chosen.nice, progress=say, turns=turns, packet=packet)

    [first] = timed([plain], 2)
    rows = []
    for times in chosen.times if tokens == chosen.tokens[0] else chosen.times[:1]:
        rate = sent(plain) / (times * first.both)
        pieces, packet = PIECES[times], LARGE if times == HIDES else PACKET
        some = [pieces_of(plain, n) for n in pieces]
        if times == HIDES and world > 2 and tokens < LONG:  # at 2 ranks it is the ring
            some += [pieces_of(plain, n)._replace(schedule="direct") for n in pieces]
        if times == SHOWS:
            some += [pieces_of(plain, n)._replace(cut="halves") for n in pieces[-2:]]
            some += [pieces_of(plain, pieces[-1])._replace(kv_dtype=kv, dkv_dtype=dkv) for kv, dkv in FORMS[1:]]
        some = [plain, *(setting._replace(rate_bytes_per_s=rate) for setting in some)]
        alone, *results = timed(some, chosen.turns, packet)
        for result in results:
            transfer = sent(result.setting) / rate
            rows.append(
                {
                    **result.setting._asdict(),
                    "transfer_over_computation": times,
                    "packet": packet,
                    "computation": alone.both,
                    "transfer": transfer,
                    "forward": result.forward,
                    "backward": result.backward,
                    "both": result.both,
                    "over_the_larger": result.both / max(alone.both, transfer),
                    "cpu": result.cpu,
                }
            )
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, nargs="*", default=[2, 4], choices=[2, 4], help="numbers of ranks")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[8192, 16384, LONG],
        help="of the sequence; all but the first only for the first of --times",
    )
    several = "transfers over computation: where all of it could hide, and where the link is what takes the time"
    parser.add_argument("--times", type=float, nargs="+", default=[HIDES, SHOWS], choices=[HIDES, SHOWS], help=several)
    parser.add_argument("--turns", type=int, default=3, help="rounds, in each of which every setting runs once")
    parser.add_argument("--nice", type=int, default=0, help="priority of the ranks; below 0 where others compute too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON file")
    chosen = parser.parse_args()
    if chosen.turns < 1:
        parser.error(f"--turns {chosen.turns}: at least one")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that namespaces are removed
    chosen.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for world in chosen.world:
        for tokens in chosen.tokens:
            rows += case(world, tokens, chosen)
            # After each case: what has taken half an hour is not lost to the one that fails.
            record = {"machine": described(), "rows": rows}
            (chosen.out / "overlap.json").write_text(json.dumps(record, indent=1) + "\n")
    for r in rows:
        form = f"{r['cut']}, keys {r['kv_dtype']}, gradients {r['dkv_dtype']}"
        print(
            f"W={r['world']} {r['tokens']} tokens, {r['schedule']}, "
            f"transfer {r['transfer_over_computation']} x computation, "
            f"{r['block_tokens'] or 'whole':>5} rows, {form}: {r['both']:.3f} s, {r['over_the_larger']:.3f} of it"
        )


if __name__ == "__main__":
    main()
