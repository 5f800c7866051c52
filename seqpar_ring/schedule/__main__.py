"""`python -m seqpar_ring.schedule`: plan some documents and print the schedule, ranks down and steps across.

For the curious, for bug reports, and to see what a setting changes before a job is started. It needs no torch and no
ranks: it prints the very data that a training run with these settings executes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from seqpar_ring import layout as layouts
from seqpar_ring.config import Settings
from seqpar_ring.errors import ConfigError, SeqparError, did_you_mean
from seqpar_ring.geometry import INF, Mask, area
from seqpar_ring.lengths import tokens, tokens_of_each
from seqpar_ring.packing import Balance
from seqpar_ring.schedule import (
    BUILDERS,
    CUTS,
    Route,
    Sides,
    Traffic,
    Work,
    rows_sent,
    tiles,
    work,
)
from seqpar_ring.schedule import check as prove
from seqpar_ring.schedule.render import render

T = TypeVar("T")

EXAMPLE = """example:
  python -m seqpar_ring.schedule --lengths 5000,300,12001 --size 4 --layout packed --schedule direct --check
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the schedule that the arguments ask for. Returns the exit code: 2 where they ask for the impossible."""
    asked = parse(arguments)
    try:
        print("\n".join(report(asked)))
    except SeqparError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def parse(arguments: Sequence[str] | None = None, called: str = "python -m seqpar_ring.schedule") -> argparse.Namespace:
    """What the arguments ask for, of a command that is called so."""
    return _parser(called).parse_args(arguments)


def _parser(called: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=called,
        description="Plan documents for a sequence group and print the schedule: ranks down, steps across.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--lengths", type=_lengths, default=[4096], metavar="N[,N..]", help="tokens of each document: 16x8K,300 (4096)")
    add("--kv-lengths", type=_lengths, metavar="N[,N..]", help="keys of each document: cross-attention (with --full)")
    add("--size", type=int, default=4, metavar="W", help="ranks that share the sequence (4)")
    add("--layout", default="zigzag", help=f"{', '.join(sorted(layouts.LAYOUTS))} (zigzag)")
    add("--schedule", default="ring", help=f"{', '.join(sorted(BUILDERS))} (ring)")
    add("--node", type=int, metavar="N", help="ranks of a node, for double_ring (all)")
    add("--block-tokens", type=_tokens, metavar="N", help="tokens computed with at a time (a rank's block)")
    add("--cut", default="even", help=f"how blocks are cut into pieces: {', '.join(CUTS)} (even)")
    add("--full", action="store_true", help="every key of the document, instead of causal")
    add("--window", type=_tokens, metavar="N", help="only the last N keys")
    add("--chunk", type=_tokens, metavar="N", help="only keys of the same chunk of N positions")
    add("--prefix", type=_tokens, metavar="N", help="the first N keys of a document are seen by all its queries")
    add("--backward", action="store_true", help="the backward pass: keys travel, their gradients return")
    add("--queries", action="store_true", help="the backward pass in which queries travel, and dq returns")
    add("--calls", type=int, metavar="RANK", help="list this rank's kernel calls")
    add("--check", action="store_true", help="prove the schedule, and print how many buffers live at once")
    add("--python", action="store_true", help="print the traffic as Python data instead of a table")
    add("--width", type=int, metavar="N", help="columns of the page (the terminal's)")
    return parser


def _lengths(text: str) -> list[int]:
    return _read(tokens_of_each, text)


def _tokens(text: str) -> int:
    return _read(tokens, text)


def _read(reader: Callable[[str, str, int], T], text: str) -> T:
    """What is too small is refused later, by those who know why."""
    try:
        return reader(text, "this", 0)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class Planned(NamedTuple):
    """What was asked for, planned: layouts, mask, traffic, and why this variant of the schedule."""

    settings: Settings
    sides: Sides
    mask: Mask
    traffic: Traffic
    why: str


def planned(asked: argparse.Namespace) -> Planned:
    """The schedule that was asked for.

    Raises:
        SeqparError: it is impossible.
    """
    settings = _settings(asked)
    mask = Mask.make(not asked.full, asked.window, asked.chunk, asked.prefix)
    regions = mask.regions(asked.lengths, asked.kv_lengths)
    balance = Balance(settings.balance_tokens, settings.balance_area)
    q = k = layouts.make(settings.layout, asked.lengths, settings.size, balance)
    if asked.kv_lengths is not None:
        k = layouts.make(settings.layout, asked.kv_lengths, settings.size, balance, least=0)
    sides = Sides(q, k, regions)
    return Planned(settings, sides, mask, *_traffic(asked, settings, sides))


def report(asked: argparse.Namespace) -> list[str]:
    """The lines to print."""
    _, sides, mask, traffic, why = planned(asked)
    lines = [*_summary(asked, sides, traffic, mask, why), ""]
    if asked.check:
        held = prove(traffic, sides)
        shown = ", ".join(f"{count} {name}" for name, count in held.items())
        lines += [f"proven: every allowed pair once, no circular wait; most buffers at once: {shown}", ""]
    width = asked.width or shutil.get_terminal_size((120, 24)).columns
    lines.append(repr(traffic) if asked.python else render(traffic, width))
    if asked.calls is not None:
        lines += ["", *_calls(asked, work(traffic, asked.calls, sides))]
    return lines


def _settings(asked: argparse.Namespace) -> Settings:
    block = {"size": asked.size, "layout": asked.layout, "schedule": asked.schedule, "node": asked.node}
    block_tokens = "auto" if asked.block_tokens is None else asked.block_tokens
    settings = Settings.parse({**block, "block_tokens": block_tokens, "cut": asked.cut}, "the command line")
    if settings.schedule not in BUILDERS:
        fix = did_you_mean(settings.schedule, BUILDERS)
        raise ConfigError("unknown schedule", fix=fix, schedule=settings.schedule)
    if asked.calls is not None and not 0 <= asked.calls < settings.size:
        raise ConfigError("no such rank", fix=f"Give 0 to {settings.size - 1}.", calls=asked.calls)
    return settings


def _traffic(asked: argparse.Namespace, settings: Settings, sides: Sides) -> tuple[Traffic, str]:
    route = Route.of(settings, sides)
    traffic, why = route.forward("q" if asked.queries else "kv")
    return (route.returned(traffic) if asked.backward or asked.queries else traffic), why


def _summary(asked: argparse.Namespace, sides: Sides, traffic: Traffic, mask: Mask, why: str) -> list[str]:
    cargo = sides.q if traffic.travels == "q" else sides.k
    total, world = sum(cargo.sizes), len(cargo)
    worked = [sum(map(area, tiles(q, [r for k in sides.k for r in k], sides.regions))) for q in sides.q]
    even = max(worked) * world / max(1, sum(worked))
    ring = (world - 1) * total
    share = f"{rows_sent(traffic) / ring:.2f} of what a full ring sends" if ring else "nothing to send"
    calls = max((len(done.calls) for rank in range(world) for done in work(traffic, rank, sides).values()), default=0)
    documents = f"{len(asked.lengths)} document" + "s" * (len(asked.lengths) > 1)
    return [
        f"{documents}, {sum(asked.lengths)} tokens over {world} ranks, {mask}, {asked.layout}",
        f"tokens of a rank: {min(sides.q.sizes)} to {max(sides.q.sizes)}; at most {even:.3f} of the mean work; "
        f"at most {calls} kernel call" + "s" * (calls != 1) + " a step",
        f"{asked.schedule}: {share} ({why})",
    ]


def _calls(asked: argparse.Namespace, steps: dict[int, Work]) -> list[str]:
    lines = [f"kernel calls of rank {asked.calls}"]
    for step, done in steps.items():
        owners = ", ".join(str(block.owner) for block in done.blocks)
        for call in done.calls:
            segments = list(zip(call.cu_q, call.cu_q[1:], call.cu_k, call.cu_k[1:], strict=False))
            empty = sum(a == b or c == d for a, b, c, d in segments)
            left, right = ("all" if edge >= INF else str(edge) for edge in (call.left, call.right))
            lines.append(
                f"  step {step}, blocks of {owners}: q {call.q0}:{call.q1}, k {call.k0}:{call.k1}, "
                f"window ({left}, {right}), {len(segments)} segments, {empty} of them empty"
            )
    return lines


if __name__ == "__main__":
    sys.exit(main())
