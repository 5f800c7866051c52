"""All benchmarks that this machine can run, one after the other: `make bench`.

    python benchmarks [--quick] [--only PART ...] [--list] [--out benchmarks/results]

Each part is a process of its own (so one that fails ends nothing else) and writes its rows as JSON. Afterwards
`<date>-<hardware>.csv` holds every figure with the machine, the versions and the commit, and tables for README are
printed. A part that this machine cannot run is named with the reason. `--quick` takes sizes at which one only sees that
everything runs (less than 3 minutes on two idle cores) and keeps nothing but a CSV file that ends in -quick.

Exit codes: 0 all done; 1 a part failed, and its last lines are shown; 2 the question makes no sense.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import report
import torch
from machine import described
from netns import missing
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from seqpar_ring.errors import ConfigError, did_you_mean

HERE = Path(__file__).parent
LIMIT = 7200.0
"""Seconds that one part may take."""

LAST = 30
"""Lines of a part's output that are shown when it fails."""


class Part(NamedTuple):
    """One benchmark.

    Attributes:
        about: what it answers.
        command: what follows `python`, without --out.
        quick: the same for a short run.
        file: pattern of the JSON file that it writes.
        hindered: why it cannot run here; empty if it can.
    """

    about: str
    command: tuple[str, ...]
    quick: tuple[str, ...]
    file: str
    hindered: Callable[[], str] = lambda: ""


def _no_gpus(least: int) -> Callable[[], str]:
    def hindered() -> str:
        count = torch.cuda.device_count()
        return "" if count >= least else f"needs {least} GPU{'s' if least > 1 else ''}, and there are {count}"

    return hindered


def _attention(name: str, about: str) -> Part:
    command = (str(HERE / "attention.py"), name)
    return Part(about, command, (*command, "--quick"), f"attention-{name}.json")


def _shaped(script: str, about: str, quick: tuple[str, ...], file: str) -> Part:
    path = str(HERE / script)
    return Part(about, (path,), (path, *quick), file, missing)


def _gpu(script: str, about: str, least: int) -> Part:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(torch.cuda.device_count())]
    command = (*(launch if least > 1 else ()), str(HERE / script))
    stem = "multi-gpu" if least > 1 else "gpu"
    return Part(about, command, (*command, "--tokens", "1024"), f"{stem}-*.json", _no_gpus(least))


PARTS: dict[str, Part] = {
    "planning": _attention("planning", "host time of layout, schedule and kernel calls"),
    "overhead": _attention("overhead", "CPU time of two and four ranks over that of one process, in fp32"),
    "overhead16": _attention("overhead16", "the same in bf16"),
    "packed": _attention("packed", "packed documents: bytes, and wall time with and without a slow link"),
    "memory": _attention("memory", "blocks of keys and values alive at once"),
    "peers": _attention("peers", "against other packages, on one block kernel, in fp32"),
    "peers16": _attention("peers16", "the same in bf16"),
    "host": Part(
        "what a layer costs the host, beside other packages' loops",
        (str(HERE / "host.py"),),
        (str(HERE / "host.py"), "--quick"),
        "host.json",
    ),
    "overlap": _shaped(
        "overlap.py",
        "transfers under computation, on shaped links",
        ("--world", "2", "--tokens", "1024", "--turns", "1"),
        "overlap.json",
    ),
    "shaped": _shaped(
        "shaped.py",
        "schedules and block sizes on shaped links",
        ("--suite", "quick", "--seconds", "0.1"),
        "shaped-*.json",
    ),
    "gpu": _gpu("gpu.py", "one GPU: rings of threads, kernels side by side", 1),
    "multi_gpu": _gpu("multi_gpu.py", "a ring over all GPUs of this machine", 2),
}


class Outcome(NamedTuple):
    """How a part ended: "done", "skipped" or "failed"; with its figures, or why there are none."""

    how: str
    why: str = ""
    found: tuple[tuple[report.Figure, Mapping[str, object]], ...] = ()


def run(name: str, quick: bool, out: Path, say: Callable[[str], None]) -> Outcome:
    """Run a part in a process of its own; `say` gets its last line as it goes."""
    part = PARTS[name]
    if why := part.hindered():
        return Outcome("skipped", why)
    command = [sys.executable, *(part.quick if quick else part.command), "--out", str(out)]
    before = {path: path.stat().st_mtime_ns for path in out.glob(part.file)}
    lines: deque[str] = deque(maxlen=LAST)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:
        clock = threading.Timer(LIMIT, _end, (process,))
        clock.start()
        try:
            for line in process.stdout or ():
                if line.strip():
                    lines.append(line.rstrip())
                    say(line.strip())
            code = process.wait()
        except BaseException:  # an interrupt
            _end(process)
            raise
        finally:
            clock.cancel()
    if code:
        return Outcome("failed", "\n".join([*lines, f"exit code {code}: {' '.join(command)}"]))
    written = [path for path in out.glob(part.file) if before.get(path) != path.stat().st_mtime_ns]
    records = [json.loads(path.read_text()) for path in sorted(written)]
    found = ((f, record["machine"]) for record in records for f in report.figures(name, record["rows"]))
    return Outcome("done", found=tuple(found))


def _end(process: subprocess.Popen[str]) -> None:
    """End a part and its ranks: those of its own session, and nobody else. It may first remove its namespaces."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, kind)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                continue


def asked(names: Sequence[str]) -> list[str]:
    """The parts of these names, in order; all if there are none.

    Raises:
        ConfigError: no part has that name.
    """
    for name in names:
        if name not in PARTS:
            raise ConfigError("no such benchmark", fix=did_you_mean(name, PARTS), name=name, known=", ".join(PARTS))
    return [name for name in PARTS if not names or name in names]


def measured(names: Sequence[str], quick: bool, out: Path, console: Console) -> dict[str, Outcome]:
    """Run parts under a progress bar that names the current one."""
    bar = Progress(
        SpinnerColumn(),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
    )
    found: dict[str, Outcome] = {}
    with bar:
        task = bar.add_task("", total=len(names))
        for name in names:

            def say(line: str, name: str = name) -> None:
                bar.update(task, description=f"[bold]{name}[/bold] {line[:70]}".replace("[W", "\\[W"))

            say(PARTS[name].about)
            began = time.monotonic()
            found[name] = run(name, quick, out, say)
            ended = found[name]
            detail = ended.why if ended.how == "skipped" else f"{time.monotonic() - began:.0f} s"
            bar.console.print(f"{name}: {ended.how}, {detail}", markup=False, highlight=False)
            bar.advance(task)
    return found


def main() -> int:
    """Run what was asked for, write the CSV file, print tables."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: to see that everything runs")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="these parts only (see --list)")
    parser.add_argument("--list", action="store_true", help="print the parts and what hinders them here; run nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the files")
    chosen = parser.parse_args()
    console = Console()
    try:
        names = asked(chosen.only)
    except ConfigError as error:
        parser.error(str(error))
    if chosen.list:
        for name in names:
            why = PARTS[name].hindered()
            print(f"{name:10} {PARTS[name].about}{f' (not here: {why})' if why else ''}")
        return 0
    with tempfile.TemporaryDirectory() as aside:
        chosen.out.mkdir(parents=True, exist_ok=True)
        ended = measured(names, chosen.quick, Path(aside) if chosen.quick else chosen.out, console)
    found = [figure for outcome in ended.values() for figure in outcome.found]
    date, hardware = datetime.now(timezone.utc).strftime("%Y-%m-%d"), str(described()["hardware"])
    slug = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    path = chosen.out / f"{date}-{slug}{'-quick' if chosen.quick else ''}.csv"
    if found:
        report.write(path, found, date)
        print(f"\n{report.tables([figure for figure, _ in found])}\n\n{hardware}, {date}. Every figure: {path}")
    failed = {name: outcome.why for name, outcome in ended.items() if outcome.how == "failed"}
    for name, why in failed.items():
        print(f"\n{name} failed. Its last lines:\n{why}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
