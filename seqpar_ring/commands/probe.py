"""`seqpar-ring probe`: measure this machine and write it down for plan. Starts processes over gloo; needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seqpar_ring.planner.picture import written
from seqpar_ring.planner.sections import Section

if TYPE_CHECKING:
    from seqpar_ring.planner.hardware import Machine

HELP = "Measure this machine: attention by block size, links between ranks, how far both overlap."

EPILOG = """\
Examples:

\b
  seqpar-ring probe --out machine.yaml
  seqpar-ring probe --ranks 4 --node 2 --quick --dtype fp32 --out machine.yaml
  torchrun --nproc-per-node 8 -m seqpar_ring.probe --out machine.yaml        the devices of a job, on every node

The file is what plan and timeline take as --hardware. The command itself starts processes on the CPU.

Exit codes: 0 measured; 2 it cannot be.
"""

STEPS = 4
"""Parts of a probe beside one for each dtype, for the progress bar."""


def probe(
    out: Annotated[Path, typer.Option(help="The YAML file to write.", metavar="FILE")] = Path("machine.yaml"),
    ranks: Annotated[int, typer.Option(help="Processes to start.", metavar="N")] = 2,
    dtype: Annotated[
        list[str] | None, typer.Option(help="Of attention: fp32 or bf16. Repeatable.  [default: both]", metavar="D")
    ] = None,
    node: Annotated[int | None, typer.Option(help="Ranks of a node.  [default: those of a host]", metavar="N")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter timings: under a minute.")] = False,
) -> None:
    """Measure, write, and say what was found."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from seqpar_ring.commands.terminal import console, show
    from seqpar_ring.probe import Options, run

    options = Options(node=node, quick=quick)
    if dtype:
        options = options._replace(dtypes=tuple(dict.fromkeys(dtype)))
    err = console(stderr=True)
    columns = (BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=err, transient=err.is_terminal, disable=not err.is_terminal) as bar:
        task = bar.add_task("processes start", total=STEPS + len(options.dtypes))
        done: dict[str, int] = {}

        def told(what: str) -> None:
            done.setdefault(what, len(done))
            if not err.is_terminal:
                err.print(f"{what} ...")
            bar.update(task, description=what, completed=done[what])

        machine = run(ranks, out, options, told)
    show(console(), [*found(machine), Section("Written", ((f"{out}",),))])


def found(machine: Machine) -> list[Section]:
    """What was measured, in a few numbers."""
    device = machine.device
    paces = [
        (f"attention {name}, {dtype}", f"{pace.rate / 1e9:,.1f}", written(pace.call), f"{pace.row:,.0f}")
        for dtype, both in device.attention.items()
        for name, pace in (("forward", both.forward), ("backward", both.backward))
    ]
    paces.append(("products of matrices", f"{device.matmul / 1e9:,.1f}", "", ""))
    links = [
        (where, one.name, f"{one.bandwidth / 2**30:.2f}", written(one.latency), str(one.shared_by), f"{one.steals:.0%}")
        for where, one in (("within a node", machine.inner), ("between nodes", machine.outer))
    ]
    memory = f"{device.memory / 2**30:.1f} GiB of memory, sums at {device.bandwidth / 2**30:.1f} GiB/s"
    rates = Section(
        f"{device.name}: {memory}", tuple(paces), ("what", "GFLOP/s", "a call", "half the rate at, keys"), (1, 2, 3)
    )
    head = ("where", "link", "GiB/s", "latency", "shared by", "slows computing by")
    return [rates, Section("Links", tuple(links), head, (2, 3, 4, 5)), Section("Source", ((device.source,),))]
