"""Options: what several commands ask for in the same words, and the question that they make of it.

A type for each option that is shared, so that help and completion are the same wherever it appears.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seqpar_ring.errors import ConfigError
from seqpar_ring.planner.asked import Given, pairs
from seqpar_ring.planner.data import names
from seqpar_ring.planner.savefile import load, merged

INSTEAD = {"hardware": "--hardware and --fabric", "tokens": "--seq-len or --documents"}
"""Settings by which size="auto" is decided where a job starts; here options say the same."""


def _devices(incomplete: str) -> list[str]:
    return [name for name in names("hardware") if name.startswith(incomplete.lower())]


def _models(incomplete: str) -> list[str]:
    return [name for name in names("models") if name.startswith(incomplete.lower())]


Model = Annotated[str, typer.Option(help="A preset (llama-3.1-8b), or a config.json.", autocompletion=_models)]
SeqLen = Annotated[str, typer.Option(help="Tokens of a sequence: 1M is 2^20, 128K is 2^17; 1_000_000 works too.")]
Documents = Annotated[
    str, typer.Option(help="Packed documents: 5000,300 or 16x8K,300. With --seq-len they repeat until that is full.")
]
Gpus = Annotated[int | None, typer.Option(help="Devices of the whole job.")]
Hardware = Annotated[
    str, typer.Option(help="A device's preset (h100), or a YAML file, as probe writes it.", autocompletion=_devices)
]
Fabric = Annotated[str, typer.Option(help="Links within a node + between nodes: nvlink+ndr. One name stands for both.")]
Node = Annotated[int | None, typer.Option(help="Devices of a node.  [default: as the device says]")]
Config = Annotated[
    Path | None, typer.Option(help="A DeepSpeed config, a YAML file with a settings block, or a saved plan.")
]
Batch = Annotated[int | None, typer.Option(help="Sequences that a group holds at a time.  [default: 1]")]
Dtype = Annotated[str, typer.Option(help="bf16, fp16 or fp32, of weights and activations.  [default: bf16]")]
Trained = Annotated[
    str, typer.Option(help="Parameters that are trained, where others are frozen (LoRA): 40M, or 0.5%.  [default: all]")
]
Full = Annotated[bool, typer.Option("--full", help="Every query sees every key of its document, instead of causal.")]
Setting = Annotated[
    list[str] | None, typer.Option(help="A setting that is decided: layout=packed, size=8. Repeatable.")
]


def question(written: Given, config: Path | None, setting: list[str] | None) -> Given:
    """What was written on the command line, filled up from a config.

    Raises:
        ConfigError: a setting that would be ignored, as an option of its own says it.
    """
    settings = pairs(setting or [])
    for name, option in INSTEAD.items():
        if name in settings:
            raise ConfigError(f"{name} is no setting of a plan", fix=f"Give {option}.", setting=settings[name])
    fixed = written.fixed._replace(settings=settings)
    given = written._replace(fixed=fixed)
    return given if config is None else merged(given, load(config))
