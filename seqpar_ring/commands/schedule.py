"""`seqpar-ring schedule`: the steps of a schedule as a table, and with --png as a picture. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seqpar_ring.schedule import BUILDERS
from seqpar_ring.schedule import __main__ as schedules

HELP = "Who sends what to whom, and who computes what: ranks down, steps across."

EPILOG = """\
Examples:

\b
  seqpar-ring schedule --lengths 64 --size 4
  seqpar-ring schedule --lengths 5000,300,12001 --size 4 --layout packed --schedule direct --check
  seqpar-ring schedule --lengths 128 --size 8 --schedule double_ring --node 4 --backward --png rings.png

Exit codes: 0 fine; 2 it is impossible.
"""


def _schedules(incomplete: str) -> list[str]:
    return [name for name in sorted(BUILDERS) if name.startswith(incomplete)]


def schedule(  # noqa: PLR0913 - options of a command line
    lengths: Annotated[str, typer.Option(metavar="N[,N..]", help="Tokens of each document: 64K, 16x8K,300.")] = "4096",
    kv_lengths: Annotated[
        str | None, typer.Option(metavar="N[,N..]", help="Keys of each document: cross-attention (with --full).")
    ] = None,
    size: Annotated[int, typer.Option(metavar="W", help="Ranks that share the sequence.")] = 4,
    layout: Annotated[str, typer.Option(help="zigzag, striped, contiguous or packed.")] = "zigzag",
    schedule: Annotated[
        str, typer.Option(help="ring, double_ring, all_gather or direct.", autocompletion=_schedules)
    ] = "ring",
    node: Annotated[
        int | None, typer.Option(metavar="N", help="Ranks of a node, for double_ring.  [default: all]")
    ] = None,
    block_tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens computed with at a time.  [default: a rank's block]")
    ] = None,
    cut: Annotated[str, typer.Option(help="How blocks are cut into pieces: even or halves.")] = "even",
    full: Annotated[bool, typer.Option("--full", help="Every key of the document, instead of causal.")] = False,
    window: Annotated[str | None, typer.Option(metavar="N", help="Only the last N keys.")] = None,
    chunk: Annotated[str | None, typer.Option(metavar="N", help="Only keys of the same chunk of N positions.")] = None,
    prefix: Annotated[str | None, typer.Option(metavar="N", help="The first N keys are seen by all queries.")] = None,
    backward: Annotated[
        bool, typer.Option("--backward", help="Backward: keys travel, their gradients return.")
    ] = False,
    queries: Annotated[
        bool, typer.Option("--queries", help="Backward in which queries travel, and dq returns.")
    ] = False,
    calls: Annotated[int | None, typer.Option(metavar="RANK", help="List this rank's kernel calls.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Prove the schedule; how many buffers live at once.")] = False,
    python: Annotated[bool, typer.Option("--python", help="The traffic as Python data instead of a table.")] = False,
    width: Annotated[
        int | None, typer.Option(metavar="N", help="Columns of the page.  [default: the terminal's]")
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it to this file, too.")] = None,
) -> None:
    """As `python -m seqpar_ring.schedule`, whose words these are, and drawn."""
    values = {
        "lengths": lengths, "kv-lengths": kv_lengths, "size": size, "layout": layout, "schedule": schedule,
        "node": node, "block-tokens": block_tokens, "window": window, "chunk": chunk, "prefix": prefix, "calls": calls,
        "cut": cut, "width": width,
    }  # fmt: skip
    flags = {"full": full, "backward": backward, "queries": queries, "check": check, "python": python}
    arguments = [f"--{name}={value}" for name, value in values.items() if value is not None]
    arguments += [f"--{name}" for name, there in flags.items() if there]
    asked = schedules.parse(arguments, "seqpar-ring schedule")
    lines = schedules.report(asked)
    if png is not None:
        from seqpar_ring.planner.schedule_picture import draw_schedule

        made = schedules.planned(asked)
        way = "backward" if backward or queries else "forward"
        documents = f"{len(asked.lengths)} documents, " if len(asked.lengths) > 1 else ""
        title = f"{schedule}, {way}: {documents}{sum(asked.lengths)} tokens over {size} ranks, {made.mask}, {layout}"
        draw_schedule(png, made.traffic, title, node)
        lines += ["", f"drawn: {png}"]
    print("\n".join(lines))
