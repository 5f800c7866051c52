"""`seqpar-ring plan`: what a job will need and how to share it out, before it runs. Needs no torch and no device."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from seqpar_ring import __version__
from seqpar_ring.commands import options as take
from seqpar_ring.errors import ConfigError
from seqpar_ring.planner.asked import Asked, Given, asked
from seqpar_ring.planner.remedy import Limit, fewest_devices, largest_sequences
from seqpar_ring.planner.report import answer, as_data, asked_data, choice_data
from seqpar_ring.planner.savefile import FORMAT, save
from seqpar_ring.planner.search import Fixed, Found, search
from seqpar_ring.planner.sections import Section, asked_section, limits_section, sections, sources_section

NOWHERE = 3
"""Exit code where nothing fits."""

HELP = "Memory, time and the best settings of a job, before it runs."

EPILOG = """\
Examples:

\b
  seqpar-ring plan --model llama-3.1-8b --seq-len 1M --gpus 64 --hardware h100 --fabric nvlink+ndr
  seqpar-ring plan ... --config ds_config.json --zero 3 --setting layout=packed --documents 16x8K,300
  seqpar-ring plan ... --trained 40M             LoRA: few gradients, and few states of the optimizer
  seqpar-ring plan ... --save plan.yaml        the choices, for SequenceParallel, DeepSpeed, and plan --config plan.yaml
  seqpar-ring plan ... --largest               the longest sequence that these devices hold; --fewest: how few suffice

Settings that a config, --setting or an option decides stay; what is "auto" or not given is searched.

Exit codes: 0 a plan; 2 the question makes no sense; 3 it fits nowhere, and what would make it fit is printed.
"""


def plan(  # noqa: PLR0913 - options of a command line
    model: take.Model = "",
    seq_len: take.SeqLen = "",
    documents: take.Documents = "",
    gpus: take.Gpus = None,
    hardware: take.Hardware = "",
    fabric: take.Fabric = "",
    node: take.Node = None,
    config: take.Config = None,
    batch: take.Batch = None,
    dtype: take.Dtype = "",
    full: take.Full = False,
    trained: take.Trained = "",
    zero: Annotated[int | None, typer.Option(help="ZeRO stage, 0 to 3.  [default: searched]")] = None,
    checkpointing: Annotated[
        bool | None, typer.Option(help="Whether layers are recomputed.  [default: searched]", show_default=False)
    ] = None,
    setting: take.Setting = None,
    top: Annotated[int, typer.Option(help="How many alternatives to list.", min=1)] = 5,
    largest: Annotated[bool, typer.Option("--largest", help="Only the longest sequence that fits.")] = False,
    fewest: Annotated[bool, typer.Option("--fewest", help="Only how few devices hold the sequence.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead (docs/cli.md).")] = False,
    save_to: Annotated[Path | None, typer.Option("--save", help="Write the chosen settings to this YAML file.")] = None,
) -> None:
    """Search the choices of a job, or ask how far its memory goes."""
    if largest and fewest:
        raise ConfigError("--largest and --fewest are two questions", fix="Ask one at a time.")
    if save_to is not None and (largest or fewest):
        raise ConfigError("--largest and --fewest choose nothing that could be saved", fix="Leave --save out.")
    fixed = Fixed(checkpointing=checkpointing, zero=zero)
    causal = False if full else None
    written = Given(model, hardware, fabric, seq_len, documents, gpus, node, batch, dtype, causal, trained, fixed)
    question = take.question(written, config, setting)
    if largest and not (question.seq_len or question.documents):
        question = question._replace(seq_len="1K")  # not looked at, but a question has a length
    if fewest and question.gpus is None:  # not looked at either
        size = question.fixed.settings.get("size")
        question = question._replace(gpus=size if isinstance(size, int) and size > 0 else 1)
    what = asked(question)
    if largest or fewest:
        code = _limits(what, largest, as_json)
    else:
        code = _search(what, top, as_json, save_to)
    raise typer.Exit(code)


def _search(what: Asked, top: int, as_json: bool, save_to: Path | None) -> int:
    """Search, print, save; returns the exit code."""
    found = answer(what, _searched(what, quiet=as_json))
    if found.best is not None and save_to is not None:
        save(save_to, what, found.best)
    if as_json:
        _print_json(as_data(found, top))
    else:
        saved = [Section("Saved", ((f"{save_to}",),))] if save_to is not None and found.best else []
        _show([*sections(found, top), *saved])
    return 0 if found.best is not None else NOWHERE


def _searched(what: Asked, quiet: bool) -> Found:
    """What the search finds. On a terminal it says what it looks at: with a thousand devices that takes a while."""
    if quiet or not sys.stderr.isatty():
        return search(what.workload, what.machine, what.gpus, what.fixed)
    from seqpar_ring.commands.terminal import console

    with console(stderr=True).status("searching") as status:
        return search(what.workload, what.machine, what.gpus, what.fixed, status.update)


def _limits(what: Asked, largest: bool, as_json: bool) -> int:
    """How far memory goes, each way of saving it; returns the exit code."""
    limits = largest_sequences(what) if largest else fewest_devices(what)
    if as_json:
        key = "largest" if largest else "fewest"
        whole = {"format": FORMAT, "seqpar_ring": __version__, "asked": asked_data(what)}
        _print_json({**whole, key: [_limit_data(limit, largest) for limit in limits]})
    else:
        _show([asked_section(what), limits_section(limits), sources_section(what)])
    return 0 if any(limit.tokens or limit.gpus for limit in limits) else NOWHERE


def _limit_data(limit: Limit, largest: bool) -> dict[str, Any]:
    reached = {"tokens": limit.tokens} if largest else {"gpus": limit.gpus}
    return {"way": limit.way, **reached, "with": choice_data(limit.choice)}


def _print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, indent=1))


def _show(parts: list[Section]) -> None:
    from seqpar_ring.commands.terminal import console, show

    show(console(), parts)
