"""The command line: `seqpar-ring plan | timeline | schedule | probe | bench | doctor`.

Each command is a file of `commands`; here they get their names. Errors of the library are one message and exit code 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from seqpar_ring.commands import doctor, plan
from seqpar_ring.errors import SeqparError
from seqpar_ring.schedule import __main__ as schedules

EPILOG = """\
Exit codes of all commands: 0 fine; 1 a problem, or a difference; 2 the question makes no sense; 3 it fits nowhere.

Completion: seqpar-ring --install-completion.
"""

app = typer.Typer(
    help="Exact ring attention: plan a job, look at its schedule, measure this machine.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("plan", help=plan.HELP, epilog=plan.EPILOG)(plan.plan)
app.command("doctor", help=doctor.HELP, epilog=doctor.EPILOG)(doctor.doctor)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    help="Print the schedule of some documents: ranks down, steps across. `seqpar-ring schedule --help` says more.",
)
def schedule(context: typer.Context) -> None:
    """As `python -m seqpar_ring.schedule`."""
    raise typer.Exit(schedules.main(context.args))


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
