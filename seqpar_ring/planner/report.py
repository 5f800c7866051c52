"""Report: the answer of the planner, and the same as plain data for programs.

`as_data` is the stable JSON of `seqpar-ring plan --json`; docs/cli.md has its schema. `sections` tells it to people. It
computes nothing that is not in the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from seqpar_ring import __version__
from seqpar_ring.planner.advice import advice
from seqpar_ring.planner.asked import Asked, decided
from seqpar_ring.planner.hardware import Device, Link
from seqpar_ring.planner.job import Choice
from seqpar_ring.planner.memory import Memory
from seqpar_ring.planner.reasons import Reason, reasons
from seqpar_ring.planner.remedy import remedies
from seqpar_ring.planner.savefile import FORMAT, block
from seqpar_ring.planner.search import Found, Option

SECONDS = {
    "forward": "attention, forward",
    "backward": "attention, backward",
    "again": "attention run again",
    "dense": "everything else in the layers",
    "recomputed": "the same, recomputed",
    "head": "logits and loss",
    "optimizer": "optimizer",
    "collectives": "ZeRO's traffic that shows",
}
"""What a step consists of, by the names of `Step`."""


class Answer(NamedTuple):
    """What the planner says to a question.

    Attributes:
        asked: the question.
        found: all options, the best first, and what was refused.
        reasons: of the best option's choices.
        advice: sentences about it.
        remedies: sentences that say what would make it fit, where nothing does.
    """

    asked: Asked
    found: Found
    reasons: tuple[Reason, ...]
    advice: tuple[str, ...]
    remedies: tuple[str, ...]

    @property
    def best(self) -> Option | None:
        """The chosen option; None: nothing fits."""
        return self.found.options[0] if self.found.options else None


def answer(asked: Asked, found: Found) -> Answer:
    """The answer to a question, from what the search found."""
    said = tuple(advice(found, asked.workload, asked.machine))
    return Answer(asked, found, reasons(found, asked), said, tuple(remedies(asked)) if found.too_large else ())


def as_data(answer: Answer, top: int = 10) -> dict[str, Any]:
    """The answer as JSON has it: names, strings, numbers in bytes and seconds."""
    best, asked = answer.best, answer.asked
    why = [reason._asdict() for reason in answer.reasons]
    return {
        "format": FORMAT,
        "seqpar_ring": __version__,
        "asked": asked_data(asked),
        "fits": best is not None,
        "chosen": None if best is None else {**option_data(best, asked), "reasons": why},
        "options": [option_data(option, asked) for option in answer.found.options[:top]],
        "refused": [refused._asdict() for refused in answer.found.refused],
        "looked_at": answer.found.looked_at,
        "advice": list(answer.advice),
        "would_fit": list(answer.remedies),
        "assumptions": [dict(zip(("what", "name", "source"), row, strict=True)) for row in assumed(asked)],
    }


def asked_data(asked: Asked) -> dict[str, Any]:
    """The question."""
    workload, machine, fixed = asked.workload, asked.machine, asked.fixed
    choices = {n: getattr(fixed, n) for n in ("checkpointing", "zero", "offload_optimizer", "offload_parameters")}
    return {
        "model": workload.model.name,
        "parameters": workload.model.parameters,
        "trained": workload.parameters_trained,
        "tokens": workload.tokens,
        "documents": len(workload.lengths),
        "batch": workload.batch,
        "dtype": workload.dtype,
        "causal": workload.causal,
        "gpus": asked.gpus,
        "device": machine.device.name,
        "inner": machine.inner.name,
        "outer": machine.outer.name,
        "node": machine.node,
        "fixed": {"settings": decided(fixed.settings), **{n: v for n, v in choices.items() if v is not None}},
    }


def option_data(option: Option, asked: Asked) -> dict[str, Any]:
    """An option: what is chosen, bytes, seconds."""
    step = option.step
    return {
        **choice_data(option.choice),
        "memory": _memory_data(option.memory, asked.machine.device),
        "seconds": {"step": step.seconds, **{name: getattr(step, name) for name in SECONDS}, "exposed": step.exposed},
        "tokens": step.tokens,
        "tokens_a_second": step.tokens_a_second,
        "flop": step.flop,
        "mfu": step.mfu,
    }


def choice_data(choice: Choice) -> dict[str, Any]:
    """What is chosen."""
    return {
        "settings": block(choice.settings),
        "gpus": choice.gpus,
        "data_groups": choice.data,
        "checkpointing": choice.checkpointing,
        "zero": choice.zero,
        "offload_optimizer": choice.offload_optimizer,
        "offload_parameters": choice.offload_parameters,
    }


def _memory_data(memory: Memory, device: Device) -> dict[str, Any]:
    return {
        "peak_bytes": memory.peak,
        "at": memory.at,
        "limit_bytes": device.memory,
        "host_bytes": memory.host,
        "parts": [part._asdict() for part in memory.parts],
        "moments": dict(memory.moments),
    }


def assumed(asked: Asked) -> Iterator[tuple[str, str, str]]:
    """What the numbers rest on: (what, name, source) of the device and the links."""
    machine = asked.machine
    described: list[tuple[str, Device | Link]] = [("device", machine.device), ("within a node", machine.inner)]
    if asked.gpus > machine.node:
        described.append(("between nodes", machine.outer))
    for what, one in described:
        yield what, one.name, " ".join(one.source.split())
