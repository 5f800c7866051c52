"""A probe from its parts to a file: what is measured in which order, and how a `Machine` is made of it.

The parts run one after the other on all ranks, either of a world that exists (`probe`) or of processes that are started
for it (`run`), and each is a plain value that crosses between processes, so that progress can be told as it happens.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import yaml

from seqpar_ring.errors import ConfigError, SeqparError, did_you_mean
from seqpar_ring.groups import Groups
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.planner.hardware import Device, Link, Machine
from seqpar_ring.probe import compute, links
from seqpar_ring.probe.compute import Paced, Shape
from seqpar_ring.probe.timing import QUICK, THOROUGH, Effort, device_of, per_call, shared
from seqpar_ring.testing import RankPool

Progress = Callable[[str], None]

ON = {"cpu": Shape(8, 2, 64), "cuda": Shape(32, 8, 128)}
"""The heads that are measured if nothing is said, by device."""

CPU = "one thread of a CPU"
DISTURBED = 0.8
"""Share of the processor time due to a rank below which others must have had the rest."""

LIMIT = 900.0
"""Seconds that one part may take."""


class Options(NamedTuple):
    """What to measure.

    Attributes:
        dtypes: of attention: "fp32", "bf16".
        node: ranks of a node; None: those of a host.
        quick: fewer and shorter timings; on a CPU under a minute.
        shape: heads and their width; None: usual ones of the device.
        device: what is known of the device already; then only links are measured.
    """

    dtypes: tuple[str, ...] = ("fp32", "bf16")
    node: int | None = None
    quick: bool = False
    shape: Shape | None = None
    device: Device | None = None

    @property
    def effort(self) -> Effort:
        """How thoroughly."""
        return QUICK if self.quick else THOROUGH


class Found(NamedTuple):
    """What is known so far; empty fields are still to be measured."""

    node: int = 0
    device: Device | None = None
    paced: tuple[Paced, ...] = ()
    matmul: dict[str, float] | None = None
    bandwidth: dict[str, float] | None = None
    memory: tuple[float, float] = (0.0, 0.0)
    messages: tuple[links.Message, ...] = ()
    overlap: tuple[links.Overlap | None, links.Overlap | None] = (None, None)


Part = Callable[[Groups, Options, Found], Found]


def probe(
    where: Groups | SequenceParallel, options: Options | None = None, progress: Progress | None = None
) -> Machine:
    """Measure the ranks of a ring. Collective over it; every rank returns the same machine.

    Args:
        where: the ranks.
        options: what to measure; the same on all ranks.
        progress: gets a line before each part; on the ranks that give it.

    Raises:
        ConfigError: an unknown dtype, heads that do not fit, or fewer than two ranks.
        GroupError: ranks that do not fit the nodes.
        DisagreementError: the ranks were given different options.
    """
    groups, options = where if isinstance(where, Groups) else where.groups, options or Options()
    problem: SeqparError | None = None
    try:
        check(options, groups.size)
    except SeqparError as error:
        problem = error
    groups.ring.agree("probe", options._asdict(), problem)
    found = Found()
    with compute.one_thread():
        for what, part in _parts(options):
            if progress is not None:
                progress(what)
            found = part(groups, options, found)
    return _machine(found, _described(groups))


def run(
    ranks: int, out: Path | None = None, options: Options | None = None, progress: Progress | None = None
) -> Machine:
    """Measure this machine with so many processes of its own over gloo, and write the result to `out`.

    Raises:
        ConfigError: as `probe`; or `out` cannot be written, which is found before anything is measured.
        TransportError: a process died or did not answer.
    """
    options = options or Options()
    check(options, ranks)
    if out is not None:
        writable(out)
    found = Found()
    with RankPool(ranks, timeout=LIMIT) as pool:
        for i, (what, _) in enumerate(_parts(options)):
            if progress is not None:
                progress(what)
            found = pool.run_groups(_one_part, i, options, found)[0]
        machine = _machine(found, pool.run_groups(_described)[0])
    if out is not None:
        save(machine, out)
    return machine


def save(machine: Machine, path: Path) -> None:
    """Write a machine as YAML, for `--hardware`.

    Raises:
        ConfigError: the file cannot be written, or has another ending than .yaml or .yml.
    """
    writable(path)
    path.write_text(yaml.safe_dump(_plain(machine.model_dump()), sort_keys=False, width=120), encoding="utf-8")


def check(options: Options, ranks: int) -> None:
    """Refuse what cannot be measured.

    Raises:
        ConfigError: an unknown dtype, heads that do not fit, fewer than two ranks, or a node that does not divide them.
    """
    if ranks < 2:
        raise ConfigError("links need two ranks", fix="Probe with at least 2.", ranks=ranks)
    if not options.dtypes:
        raise ConfigError("no dtype to measure", fix=f"Give {' or '.join(compute.DTYPES)}.")
    for dtype in options.dtypes:
        if dtype not in compute.DTYPES:
            raise ConfigError("unknown dtype", fix=did_you_mean(dtype, compute.DTYPES), dtype=dtype)
    if options.node is not None and (options.node < 1 or ranks % options.node):
        fitting = [n for n in range(1, ranks + 1) if ranks % n == 0]
        fix = f"Give {' or '.join(map(str, fitting))}."
        raise ConfigError("the ranks of a node do not divide the group", fix=fix, node=options.node, ranks=ranks)
    shape = options.shape
    if shape is not None and (min(shape) < 1 or shape.heads % shape.kv_heads):
        raise ConfigError("these heads do not fit", fix="Give positive numbers; key heads divide heads.", shape=shape)


def _parts(options: Options) -> list[tuple[str, Part]]:
    """Each part with the line that announces it."""
    parts: list[tuple[str, Part]] = [("nodes", _nodes)]
    if options.device is None:
        parts.append(("memory, sums and products of matrices", _device))
        parts += [(f"attention in {dtype} by block size", partial(_paces, dtype)) for dtype in options.dtypes]
    return [*parts, ("messages between ranks", _messages), ("computation and transfers at once", _overlap)]


def _paces(dtype: str, groups: Groups, options: Options, found: Found) -> Found:
    paced = compute.paces(groups, dtype, _shape(groups, options), options.effort)
    return found._replace(paced=(*found.paced, paced))


def _one_part(groups: Groups, i: int, options: Options, found: Found) -> Found:
    with compute.one_thread():
        return _parts(options)[i][1](groups, options, found)


def _nodes(groups: Groups, options: Options, found: Found) -> Found:
    return found._replace(node=links.node_size(groups, options.node), device=options.device)


def _device(groups: Groups, options: Options, found: Found) -> Found:
    free, host = _memory(groups, found.node)
    return found._replace(
        memory=(min(row[0] for row in shared(groups, [free])), min(row[0] for row in shared(groups, [host]))),
        bandwidth=compute.bandwidth(groups, _shape(groups, options), options.effort),
        matmul=compute.matmul(groups, options.dtypes, options.effort),
    )


def _messages(groups: Groups, options: Options, found: Found) -> Found:
    return found._replace(messages=tuple(links.table(groups, found.node, options.effort)))


def _overlap(groups: Groups, options: Options, found: Found) -> Found:
    rows = 1024 if device_of(groups).type == "cpu" else 4096
    work = compute.block_work(groups, options.dtypes[0], _shape(groups, options), rows)
    seconds = per_call(groups, work, options.effort)
    overlaps: dict[bool, links.Overlap] = {}
    for near in links.nearness(groups, found.node):
        link = links.link(found.messages, near, found.node, 0.0)
        assert link is not None
        overlaps[near] = links.overlap(groups, found.node, near, (work, seconds), link.bandwidth / link.shared_by)
    return found._replace(overlap=(overlaps.get(True), overlaps.get(False)))


def _machine(found: Found, described: dict[str, str]) -> Machine:
    """The description of what was measured."""
    steals = [0.0 if one is None else one.steals for one in found.overlap]
    inner, outer = (
        links.link(found.messages, near, found.node, steal) for near, steal in zip((True, False), steals, strict=True)
    )
    inner, outer = inner or _stand_in(outer, "within a node"), outer or _stand_in(inner, "between nodes")
    device = found.device or _built(found, described)
    return Machine(device=device, inner=inner, outer=outer, measured=_measured(found, described))


def _built(found: Found, described: dict[str, str]) -> Device:
    assert found.matmul is not None
    assert found.bandwidth is not None
    best = max(found.matmul.values())
    source = f"seqpar-ring probe: {described['ranks']} ranks on {described['device']}, torch {described['torch']}; "
    source += "peak is the best rate of matrix products, since no data sheet was read"
    share = min(p.measured["share of a core"] for p in found.paced)
    due = min(1.0, int(described["cores"]) / int(described["ranks"]))
    if described["device"].startswith(CPU) and share < DISTURBED * due:
        source += f"; a rank had {share:.0%} of a core only, so others computed meanwhile"
    return Device(
        name=described["device"],
        source=source,
        peak=best,
        matmul=found.matmul.get("bf16", best),
        matmul_of=found.matmul if len(found.matmul) > 1 else {},
        attention={dtype: p.attention for dtype, p in zip(_dtypes(found), found.paced, strict=True)},
        memory=found.memory[0],
        bandwidth=found.bandwidth["both"],
        host_memory=found.memory[1],
        node=found.node,
        kernel="cpu" if described["device"].startswith(CPU) else "flash",
    )


def _stand_in(other: Link | None, name: str) -> Link:
    assert other is not None  # two ranks have one link or the other
    return other.model_copy(update={"name": name, "source": f"not there to be measured: taken as {other.name}"})


def _dtypes(found: Found) -> Iterable[str]:
    return [cast(str, p.measured["dtype"]) for p in found.paced]


def _measured(found: Found, described: dict[str, str]) -> dict[str, Any]:
    """The raw timings."""
    overlaps = zip(("within a node", "between nodes"), found.overlap, strict=True)
    return {
        **described,
        "attention": {p.measured["dtype"]: p.measured for p in found.paced},
        "matmul, FLOP/s": found.matmul,
        "sums, bytes/s": found.bandwidth,
        "messages": [dict(zip(links.Message._fields, m, strict=True)) for m in found.messages],
        "overlap": {name: {**one._asdict(), "steals": one.steals} for name, one in overlaps if one is not None},
    }


def _described(groups: Groups) -> dict[str, str]:
    device = device_of(groups)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{CPU} ({platform.machine()})"
    cores = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return {"device": name, "ranks": str(groups.size), "torch": str(torch.__version__), "cores": cores}


def _shape(groups: Groups, options: Options) -> Shape:
    return options.shape or ON[device_of(groups).type]


def _memory(groups: Groups, node: int) -> tuple[float, float]:
    """Bytes free for this rank: of its device, and of its host beside that."""
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = Path("/proc/meminfo")
    if available.is_file():  # counts what caches would give back
        lines = [line for line in available.read_text().splitlines() if line.startswith("MemAvailable")]
        pages = int(lines[0].split()[1]) << 10 if lines else pages
    if device_of(groups).type == "cuda":
        return float(torch.cuda.mem_get_info()[0]), pages / node
    return pages / node, 0.0


def writable(path: Path) -> None:
    """Refuse a file that cannot be written.

    Raises:
        ConfigError: the ending is not .yaml or .yml, the folder is not there, or writing is not allowed.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError("a machine is written as YAML", fix="Give a file that ends in .yaml.", path=str(path))
    if not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError("the file cannot be written", fix="Give one in a folder that exists.", path=str(path))


def _plain(value: Any) -> Any:
    """Numbers with six digits, and mappings and lists that YAML writes short."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
