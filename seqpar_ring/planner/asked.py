"""Asked: a question to the planner, made from what a user writes: "1M" tokens, "8K,300" documents, a config, settings.

It turns text and files into a workload, a machine and what is decided already, and refuses what makes no sense by name.
It answers nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate, cycle, takewhile
from typing import Any, NamedTuple

from seqpar_ring.config import Settings
from seqpar_ring.errors import ConfigError, did_you_mean
from seqpar_ring.layout import LAYOUTS
from seqpar_ring.lengths import MOST_DOCUMENTS, MOST_TOKENS, tokens, tokens_of_each
from seqpar_ring.planner.hardware import Machine, machine
from seqpar_ring.planner.job import ITEMSIZE, Workload
from seqpar_ring.planner.model import load_model
from seqpar_ring.planner.search import Fixed
from seqpar_ring.schedule import BUILDERS

MOST_DEVICES = 4096
"""What is looked at grows with the square of the ranks of a sequence: with more, no answer would come."""


class Given(NamedTuple):
    """What a user wrote; empty or None: nothing.

    Attributes:
        model, hardware, fabric: names or files.
        seq_len: tokens of a sequence, e.g. "1M".
        documents: their lengths, e.g. "8K,300"; with `seq_len` repeated until that is full.
        gpus, node: devices of the world, and of a node.
        batch: sequences that a group holds at a time.
        dtype: of weights and activations.
        causal: whether a query sees only what is before it.
        trained: parameters that are trained, e.g. "40M" or "0.5%".
        fixed: what is decided already.
    """

    model: str = ""
    hardware: str = ""
    fabric: str = ""
    seq_len: str = ""
    documents: str = ""
    gpus: int | None = None
    node: int | None = None
    batch: int | None = None
    dtype: str = ""
    causal: bool | None = None
    trained: str = ""
    fixed: Fixed = Fixed()


class Asked(NamedTuple):
    """The question.

    Attributes:
        workload: what is to be trained.
        machine: on what.
        gpus: devices of the world.
        fixed: what is decided already.
        given: the same as the user wrote it.
    """

    workload: Workload
    machine: Machine
    gpus: int
    fixed: Fixed
    given: Given


def asked(given: Given) -> Asked:
    """The question that was written.

    Raises:
        ConfigError: something is missing, unknown, negative, or does not fit the rest.
    """
    for name, example in (("model", "llama-3.1-8b"), ("hardware", "h100")):
        if not getattr(given, name):
            raise ConfigError(f"nothing says which {name}", fix=f"Give --{name}, e.g. --{name} {example}.")
    if given.gpus is None:
        raise ConfigError("nothing says how many devices there are", fix="Give --gpus, e.g. --gpus 64.")
    for name, value in (("gpus", given.gpus), ("node", given.node), ("batch", given.batch)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} is below 1", fix="Give 1 or more.", **{name: value})
    if given.gpus > MOST_DEVICES:
        fix = "Plan for fewer, of which the others repeat the sequence groups: they only average gradients with them."
        raise ConfigError("too many devices to plan for", fix=fix, gpus=given.gpus, most=MOST_DEVICES)
    dtype = given.dtype or "bf16"
    if dtype not in ITEMSIZE:
        raise ConfigError("unknown dtype", fix=did_you_mean(dtype, ITEMSIZE), dtype=dtype)
    model = load_model(given.model)
    on = machine(given.hardware, given.fabric or None, given.node)
    if given.gpus > on.node and given.gpus % on.node:
        fix = f"Give a multiple of {on.node}, or say with --node how many devices a node has."
        raise ConfigError("the devices do not fill whole nodes", fix=fix, gpus=given.gpus, node=on.node)
    on.device.paces(dtype)
    lengths = documents(given.documents, given.seq_len)
    if sum(lengths) > MOST_TOKENS:
        fix = "Give a shorter sequence; nothing runs a longer one."
        raise ConfigError("more tokens than can be counted", fix=fix, tokens=sum(lengths), most=MOST_TOKENS)
    few = trained(given.trained, model.parameters)
    workload = Workload(model, lengths, dtype, given.batch or 1, given.causal is not False, trained=few)
    _check_fixed(given.fixed, given.gpus)
    return Asked(workload, on, given.gpus, given.fixed, given)


def documents(text: str, seq_len: str) -> tuple[int, ...]:
    """Lengths of documents from "8K,300" or "16x8K,300"; with the length of a sequence they repeat until it is full.

    Raises:
        ConfigError: there is neither, or it is no list of lengths.
    """
    if not text:
        if not seq_len:
            raise ConfigError("nothing says how long a sequence is", fix="Give --seq-len 1M, or --documents 8K,300.")
        return (tokens(seq_len),)
    each = tokens_of_each(text)
    if not seq_len:
        return tuple(each)
    whole = tokens(seq_len)
    ends = list(takewhile(lambda end: end < whole, accumulate(cycle(each))))
    if len(ends) >= MOST_DOCUMENTS:
        fix = "Give longer documents or a shorter sequence."
        raise ConfigError("too many documents", fix=fix, documents=len(ends) + 1, most=MOST_DOCUMENTS)
    return tuple(b - a for a, b in zip([0, *ends], [*ends, whole], strict=True))


def trained(text: str, parameters: int) -> int | None:
    """How many parameters are trained, from "40M", "0.5%" or "40_000_000"; None: all of them, as of no text.

    Unlike tokens, parameters are counted in powers of ten: 40M is 40,000,000.

    Args:
        text: as written.
        parameters: of the model.

    Raises:
        ConfigError: it is no such number, or not between 1 and all of them.
    """
    if not text:
        return None
    found = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([kmb%]?)", text.strip().lower())
    unit = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "%": parameters / 100}
    asked = float(re.sub("[_,]", "", found[1])) * unit[found[2]] if found else 0.0
    number = round(min(asked, parameters + 1.0))  # which is infinite where somebody leans on a key
    if not 1 <= number <= parameters:
        fix = "Write e.g. 40M (40,000,000) or 0.5%: what LoRA's adapters have, of which PEFT prints the number."
        raise ConfigError(
            "--trained is no number of the model's parameters", fix=fix, value=text, parameters=parameters
        )
    return None if number == parameters else number


def pairs(texts: Sequence[str]) -> dict[str, Any]:
    """Settings from "name=value", the value read as JSON where it is any.

    Raises:
        ConfigError: there is no value.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError("--setting has no value", fix="Write e.g. layout=packed.", setting=text)
        try:
            found[name.strip()] = json.loads(value)
        except ValueError:
            found[name.strip()] = value
    return found


def decided(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are decided: "auto" and none leave it to the search."""
    return {name: value for name, value in settings.items() if value is not None and value != "auto"}


def _check_fixed(fixed: Fixed, gpus: int) -> None:
    """What would make every choice impossible is said at once, and by its name."""
    settings = decided(fixed.settings)
    for key, known in (("layout", LAYOUTS), ("schedule", BUILDERS)):
        name = settings.get(key)
        if name is not None and name not in known:
            raise ConfigError(f"unknown {key}", fix=did_you_mean(str(name), known), **{key: name})
    size = settings.get("size", gpus)
    if isinstance(size, int) and size >= 1 and gpus % size:
        fix = f"Give one of {', '.join(str(n) for n in range(1, gpus + 1) if gpus % n == 0)}."
        raise ConfigError("the size does not divide the devices", fix=fix, size=size, gpus=gpus)
    whole = {"node": size} if settings.get("schedule") == "double_ring" else {}
    Settings.parse({**whole, **settings, "size": size}, "the settings")
    if settings.get("offload") is True and settings.get("remat") == "none":
        fix = "Leave one of them out: what is not kept cannot wait in the host's memory."
        raise ConfigError("offload moves what remat keeps, and it keeps nothing", fix=fix, offload=True, remat="none")
    if fixed.zero is not None and fixed.zero not in (0, 1, 2, 3):
        raise ConfigError("there is no such ZeRO stage", fix="Give 0, 1, 2 or 3.", zero=fixed.zero)
    if fixed.offload_parameters and fixed.zero not in (None, 3):
        fix = "Give zero 3, or leave the weights on the device."
        raise ConfigError("weights are offloaded with ZeRO 3 only", fix=fix, zero=fixed.zero)
    if fixed.offload_optimizer and fixed.zero == 0:
        fix = "Give zero 1, 2 or 3, or leave the optimizer on the device."
        raise ConfigError("the optimizer is offloaded with ZeRO 1 to 3 only", fix=fix, zero=fixed.zero)
