"""`seqpar-ring doctor`: what this machine has, and whether a model of one's own is exact over a ring."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seqpar_ring.errors import ConfigError, SeqparError
from seqpar_ring.lengths import tokens as number
from seqpar_ring.lengths import tokens_of_each
from seqpar_ring.planner.asked import pairs

if TYPE_CHECKING:
    from rich.console import Console

    from seqpar_ring.environment import Finding
    from seqpar_ring.parallel import SequenceParallel

MARKS = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}
SHOWN = 5
RANKS, DTYPE = 2, "fp32"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}

HELP = "What is installed here, what works, and, with --model, whether your model is exact over a ring."

EPILOG = """\
Examples:

\b
  seqpar-ring doctor
  seqpar-ring doctor --model path/to/model --documents 700,1,323 --ranks 2

Exit codes: 0 all is well; 1 a problem, or the model differs; 2 it cannot be asked.
"""


def doctor(  # noqa: PLR0913 - options of a command line
    model: Annotated[Path | None, typer.Option(help="A model's folder: compare one rank with --ranks.")] = None,
    ranks: Annotated[int, typer.Option(help="Ranks that share the sequence.", min=1)] = RANKS,
    tokens: Annotated[str, typer.Option(help="Tokens of one document.  [default: 1024]", show_default=False)] = "",
    documents: Annotated[str, typer.Option(help="Lengths of packed documents instead: 700,1,323 or 8x1K,300.")] = "",
    layers: Annotated[int | None, typer.Option(help="Only so many of the model's first layers.", min=1)] = None,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16 (float32, bfloat16).")] = DTYPE,
    setting: Annotated[list[str] | None, typer.Option(help="A setting of the ring: layout=packed. Repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Exit code 0: all is well; 1: a problem, or a difference; 2: it could not be asked."""
    from rich.console import Console

    out = Console(highlight=False, markup=False, soft_wrap=True, stderr=as_json)
    if model is None and (documents or tokens or layers or setting or ranks != RANKS or dtype != DTYPE):
        raise ConfigError("nothing is compared without a model", fix="Give --model, or leave the other options out.")
    asked = (_lengths(documents, tokens), ranks, layers, DTYPES.get(dtype, dtype), pairs(setting or []))
    case = None if model is None else _case(model, asked)
    found = [*_findings(), _link()]
    report: dict[str, Any] = {"environment": [one._asdict() for one in found]}
    wrong = any(one.level == "problem" for one in found)
    if not as_json:
        for one in found:
            out.print(_line(one))
    if case is not None:
        result = _parity(out, case)
        report["model"] = result
        wrong = wrong or not result["good"]
    if as_json:
        print(json.dumps(report, indent=1))
    raise typer.Exit(int(wrong))


def _findings() -> Iterator[Finding]:
    from seqpar_ring.environment import findings

    return findings()


def _case(model: Path, asked: tuple[Any, ...]) -> Any:
    """What is to be compared, looked at before anything is started."""
    checks = import_module("seqpar_ring.integrations.doctor")
    case = checks.Case(str(model), *asked)
    checks.check(case)
    return case


def _parity(out: Console, case: Any) -> dict[str, Any]:
    """Compare, and print what was found; returns it as plain data."""
    checks = import_module("seqpar_ring.integrations.doctor")
    lengths, dtype = case.lengths, case.dtype
    cut = "" if case.layers is None else f", at most its first {case.layers} layers"
    kind = "" if case.weights else ", random weights (the folder holds none)"
    documents = f"{len(lengths)} document" + "s" * (len(lengths) > 1)
    asked = f"{documents}, {sum(lengths)} tokens, {dtype}, one process against {case.ranks} ranks"
    out.print(f"\n{case.path}{cut}{kind}: {asked}")
    found = checks.parity(case, lambda text: out.print(f"  {text} ..."))
    both = f"loss {found.alone:.6f} alone, {found.over:.6f} over the ring"
    out.print(f"  {both}: relative difference {found.loss_error:.1e}")
    for row in found.worst[:SHOWN]:
        out.print(f"  gradient off by {row.error:.1e}: {row.parameter}")
    if found.together is None:
        out.print(f"  bounds: loss {checks.LOSS:.0e}, gradients {checks.GRADIENT:.0e}")
    else:
        wider = "fp64" if dtype == "float32" else "fp32"
        allowed = f"{found.allowed:.2e} is allowed, {checks.AS_GOOD_AS} times what one process is off by"
        out.print(f"  all gradients against {wider}: off by {found.together:.2e}; {allowed}")
    verdict = "the same" if found.good else f"NOT THE SAME, worst in {found.worst[0].parameter}"
    out.print(f"  {verdict} ({found.seconds:.0f} s)")
    worst = [row._asdict() for row in found.worst[:SHOWN]]
    plain = {"alone": found.alone, "over": found.over, "worst": worst, "seconds": round(found.seconds, 1)}
    return {**plain, "loss_error": found.loss_error, "good": found.good}


def _link() -> Finding:
    """How fast two processes of this machine exchange tensors over gloo, which every set-up uses for control."""
    from seqpar_ring.environment import Finding
    from seqpar_ring.testing import RankPool

    try:
        with RankPool(2, timeout=60.0) as pool:
            speed = min(pool.run(_speed))
    except SeqparError as error:
        advice = "Two processes could not meet: see whether a firewall closes local ports."
        return Finding("problem", "gloo", str(error), advice)
    return Finding("ok", "gloo", f"{speed / 2**20:,.0f} MiB/s between two processes here")


def _speed(sp: SequenceParallel) -> float:
    from seqpar_ring.environment import exchange_speed

    return exchange_speed(sp.rank, 1 - sp.rank)


def _line(one: Finding) -> str:
    return f"{MARKS[one.level]} {one.what:<20} {one.found}" + (f"  -> {one.advice}" if one.advice else "")


def _lengths(documents: str, tokens: str) -> tuple[int, ...]:
    if documents and tokens:
        fix = "Give one of them."
        raise ConfigError("--documents and --tokens both say how long", fix=fix, documents=documents, tokens=tokens)
    return tuple(tokens_of_each(documents)) if documents else (number(tokens or "1024", "--tokens", 2),)
