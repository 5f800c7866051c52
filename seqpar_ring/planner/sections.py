"""Sections: an answer of the planner for people, as titled tables and lines of text.

A terminal draws them as it likes (`commands.terminal`); `text` writes them with blanks alone, for logs. It computes
nothing that is not in the answer, and knows neither a terminal nor torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from seqpar_ring.planner.asked import Asked
from seqpar_ring.planner.hardware import Device
from seqpar_ring.planner.memory import Memory
from seqpar_ring.planner.remedy import Limit
from seqpar_ring.planner.report import SECONDS, Answer, assumed
from seqpar_ring.planner.search import Found, Option
from seqpar_ring.planner.step import Step

GIB = 2**30

SHOWN_REFUSED = 8

COLUMNS = ("", "size", "heads", "layout", "schedule", "block", "recomputed", "ZeRO", "host", "GiB", "s", "tokens/s")
"""Of the table of options."""


class Section(NamedTuple):
    """A part of a report: lines of text, or a table with a head.

    Attributes:
        title: above it.
        rows: of the table; a line is a row of one cell.
        head: names of the columns; empty: lines.
        numbers: columns that are numbers, by their place.
    """

    title: str
    rows: tuple[tuple[str, ...], ...]
    head: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()


def sections(answer: Answer, top: int = 5) -> Iterator[Section]:
    """The report, part by part."""
    yield asked_section(answer.asked)
    best = answer.best
    if best is None and not answer.found.too_large:
        yield Section("Nothing is possible", (("Memory is not the reason: what was decided rules out every choice.",),))
    elif best is None:
        yield Section("Nothing fits", (("No choice fits into the memory of these devices.",),))
        yield Section("What would make it fit", tuple((line,) for line in answer.remedies))
    else:
        yield _chosen(best, answer)
        yield _parts(best.memory)
        yield _moments(best.memory, answer.asked.machine.device)
        yield _time(best.step, answer.asked)
        if len(answer.found.options) > 1:
            yield _options(answer.found.options, top)
    if answer.found.refused:
        yield _refused(answer.found)
    if answer.advice:
        yield Section("Advice", tuple((line,) for line in answer.advice))
    yield sources_section(answer.asked)


def _millions(number: int) -> str:
    return f"{number / 1e6:,.0f}" if number >= 1e9 else f"{number / 1e6:.4g}"


def asked_section(asked: Asked) -> Section:
    """What was asked."""
    workload, machine, lengths = asked.workload, asked.machine, asked.workload.lengths
    many = f"{len(lengths):,} documents of {min(lengths):,} to {max(lengths):,}"
    document = "one document" if len(lengths) == 1 else many
    mask = "causal" if workload.causal else "full attention"
    counted = "" if workload.model.exact else " (estimated as of a Llama: this family is not known)"
    size = f"{workload.model.parameters / 1e9:.2f} billion parameters{counted}"
    if workload.trained is not None:
        size += f", of which {_millions(workload.trained)} million are trained"
    joined = machine.inner.name
    if asked.gpus > machine.node:
        joined = f"{machine.node} a node: {machine.inner.name} within, {machine.outer.name} between"
    rows = [
        (f"{workload.model.name}, {size}, {workload.dtype}",),
        (f"{workload.tokens:,} tokens ({document}), {mask}, {workload.batch} a group",),
        (f"{asked.gpus} x {machine.device.name}, {joined}",),
    ]
    return Section("Asked", tuple(rows))


def _chosen(best: Option, answer: Answer) -> Section:
    groups = best.choice.data
    rows = [tuple(reason) for reason in answer.reasons]
    title = f"Chosen: {groups} group{'s' * (groups > 1)} of {best.choice.settings.size} devices"
    return Section(title, tuple(rows), ("choice", "value", "why"))


def _parts(memory: Memory) -> Section:
    ordered = sorted(memory.parts, key=lambda part: -part.bytes)
    rows = tuple((part.name, gib(part.bytes), part.when) for part in ordered)
    return Section("Memory of a device, by part", rows, ("part", "GiB", "when"), (1,))


def _moments(memory: Memory, device: Device) -> Section:
    rows = [
        (name, gib(size), f"peak: {(device.memory - memory.peak) / GIB:.1f} of {device.memory / GIB:.1f} GiB left over")
        if name == memory.at
        else (name, gib(size), "")
        for name, size in memory.moments.items()
    ]
    if memory.host:
        rows.append(("host's memory, for each device", gib(memory.host), f"of {device.host_memory / GIB:.1f} GiB"))
    return Section("Memory of a device, by moment", tuple(rows), ("moment", "GiB", ""), (1,))


def _time(step: Step, asked: Asked) -> Section:
    total = step.seconds
    attention = step.forward + step.backward
    rows = []
    for name, words in SECONDS.items():
        seconds = getattr(step, name)
        if seconds:
            rows.append((words, f"{seconds:.3f}", f"{seconds / total:.1%}"))
        if name == "backward" and step.exposed:
            rows.append(("  of both, nothing computed", f"{step.exposed:.3f}", f"{step.exposed / total:.1%}"))
    rows.append(("step", f"{total:.3f}", "100.0%"))
    rate = f"{step.tokens_a_second:,.0f} tokens/s of all devices, MFU {step.mfu:.1%}, {step.tokens:,} tokens a step"
    exposed = f", {step.exposed / attention:.1%} of attention exposed" if attention else ""
    return Section(f"Time: {rate}{exposed}", tuple(rows), ("seconds of a step", "s", "share"), (1, 2))


def _options(options: Sequence[Option], top: int) -> Section:
    rows = []
    kinds: dict[object, Option] = {}
    for option in options:
        s = option.choice.settings
        kinds.setdefault((s.size, s.heads, s.schedule if s.size > s.head_degree else ""), option)
    for place, option in enumerate(list(kinds.values())[:top], 1):
        choice, s, step = option.choice, option.choice.settings, option.step
        recomputed = "no" if not choice.checkpointing else "layers" if s.remat == "attention" else "attention too"
        away = {"optimizer": choice.offload_optimizer, "weights": choice.offload_parameters, "attention": s.offload}
        host = " + ".join(name for name, there in away.items() if there)
        tokens = "rank's" if s.block_tokens == "auto" else f"{s.block_tokens:,}"
        ring = (s.layout, s.schedule, tokens) if s.size > s.head_degree else ("", "no ring", "")
        sizes = (str(place), str(s.size), str(s.heads))
        made = (recomputed, str(choice.zero), host or "-", gib(option.memory.peak))
        rows.append((*sizes, *ring, *made, f"{step.seconds:.2f}", f"{step.tokens_a_second:,.0f}"))
    title = f"The best of {len(options)} that fit, one for each size, head degree and schedule"
    return Section(title, tuple(rows), COLUMNS, (0, 1, 2, 5, 7, 9, 10, 11))


def _refused(found: Found) -> Section:
    rows = [(refused.what, refused.why) for refused in found.refused[:SHOWN_REFUSED]]
    if len(found.refused) > SHOWN_REFUSED:
        rows.append((f"and {len(found.refused) - SHOWN_REFUSED} more", "--json lists all"))
    return Section("Refused", tuple(rows), ("what", "why"))


def sources_section(asked: Asked) -> Section:
    """What the numbers rest on."""
    measured = bool(asked.machine.measured)
    title = "Rates measured by a probe" if measured else "Assumed rates: `seqpar-ring probe` measures your own"
    return Section(title, tuple(assumed(asked)), ("what", "name", "source"))


def limits_section(limits: Sequence[Limit]) -> Section:
    """The largest sequences, or the fewest devices, for each way to save memory."""
    rows = []
    for limit in limits:
        s = limit.choice.settings
        degrees = f"size {s.size}, heads {s.heads}, ZeRO {limit.choice.zero}"
        if limit.tokens is not None:
            rows.append((limit.way, f"{limit.tokens:,}" if limit.tokens else "none", degrees))
        else:
            rows.append((limit.way, "none" if limit.gpus is None else f"{limit.gpus:,}", degrees if limit.gpus else ""))
    largest = any(limit.tokens is not None for limit in limits)
    if largest:
        return Section("The largest sequence that fits", tuple(rows), ("way", "tokens", "with"), (1,))
    return Section("The fewest devices that hold the sequence", tuple(rows), ("way", "devices", "with"), (1,))


def text(parts: Iterable[Section]) -> str:
    """Sections as plain text: columns aligned with blanks."""
    lines: list[str] = []
    for part in parts:
        lines += ["", part.title] if lines else [part.title]
        rows = [part.head, *part.rows] if part.head else list(part.rows)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
        for row in rows:
            cells = zip(row, widths, strict=True)
            aligned = [c.rjust(w) if i in part.numbers else c.ljust(w) for i, (c, w) in enumerate(cells)]
            lines.append(("  " + "  ".join(aligned)).rstrip())
    return "\n".join(lines)


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / GIB:.1f}" if size >= GIB / 10 or not size else f"{size / GIB:.3f}"
