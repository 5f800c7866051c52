"""The command line: `seqpar-ring plan | schedule | timeline | probe | bench | doctor`.

Each command is a file of `commands`; here they get their names. Errors of the library are one message and exit code 2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from seqpar_ring import __version__
from seqpar_ring.commands import bench, doctor, plan, probe, schedule, timeline
from seqpar_ring.errors import SeqparError

EPILOG = """\
Exit codes of all commands: 0 fine; 1 a problem, or a difference; 2 the question makes no sense; 3 it fits nowhere.

Completion: seqpar-ring --install-completion.
"""


def _show_version(asked: bool) -> None:
    if asked:
        print(f"seqpar_ring {__version__}")
        raise typer.Exit


app = typer.Typer(
    help="Exact ring attention: plan a job, look at its schedule, measure this machine.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
COMMANDS: dict[str, tuple[Callable[..., None], str, str]] = {
    "plan": (plan.plan, plan.HELP, plan.EPILOG),
    "schedule": (schedule.schedule, schedule.HELP, schedule.EPILOG),
    "timeline": (timeline.timeline, timeline.HELP, timeline.EPILOG),
    "probe": (probe.probe, probe.HELP, probe.EPILOG),
    "bench": (bench.bench, bench.HELP, bench.EPILOG),
    "doctor": (doctor.doctor, doctor.HELP, doctor.EPILOG),
}
"""What runs, its help, and what stands below that."""

for name, (run, summary, epilog) in COMMANDS.items():
    app.command(name, help=summary, epilog=epilog)(run)


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """What is asked before any command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    try:
        app(args=None if arguments is None else list(arguments), standalone_mode=True)
    except SeqparError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
