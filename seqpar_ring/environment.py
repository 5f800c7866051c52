"""What a machine has for ring attention: torch, kernels, devices and their links, and versions of what it plugs in to.

Each finding is a fact with a verdict and, where something is wrong, what to do. Nothing is imported to find a version,
and nothing is measured but one exchange between two processes, by whoever calls `links`. Whether a model computes right
is not asked here: that is `seqpar_ring.integrations.doctor`.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from seqpar_ring import kernels
from seqpar_ring.kernels import Request, lacks, registered

TESTED = {
    "transformers": ("5.24", "models of HuggingFace"),
    "deepspeed": ("0.19", 'the "seqpar_ring" block'),
    "accelerate": ("1.15", "Trainer"),
    "trl": ("1.16", "SFTTrainer"),
    "peft": ("0.21", "LoRA"),
    "megatron-core": ("0.16", "attention in its layer specs"),
    "flash-attn": ("", 'kernel "flash2"; never run by us'),
    "flash-attn-4": ("", 'kernel "flash4"; never run by us'),
    "nvidia-cudnn-frontend": ("", 'kernel "cudnn"; never run by us'),
}
"""Packages, the version each was tested with, and what for."""

OLDEST_TORCH, TESTED_TORCH = (2, 6), ((2, 13), (2, 15))
"""The first that may work, and the first and last that tests were run with."""

PROBE_BYTES = 2**24


class Finding(NamedTuple):
    """One fact.

    Attributes:
        level: "ok", "note" (nothing wrong, but good to know) or "problem".
        what: what was looked at.
        found: what it is.
        advice: what to do; empty if nothing.
    """

    level: Literal["ok", "note", "problem"]
    what: str
    found: str
    advice: str = ""


def findings() -> Iterator[Finding]:
    """All that can be said without starting processes."""
    yield Finding("ok", "Python", platform.python_version())
    yield _torch()
    yield from _devices()
    yield from _kernels()
    yield from _packages()
    yield _machine()


def _torch() -> Finding:
    found = torch.__version__
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    if numbers < OLDEST_TORCH:
        return Finding("problem", "torch", found, f"Install torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer.")
    if not dist.is_available():
        return Finding("problem", "torch", f"{found}, built without distributed", "Install a build that has it.")
    first, last = TESTED_TORCH
    if not first <= numbers <= last:
        return Finding("note", "torch", found, f"Tested with {first[0]}.{first[1]} to {last[0]}.{last[1]}.")
    return Finding("ok", "torch", found)


def _devices() -> Iterator[Finding]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        yield Finding("note", "GPU", "none: everything runs on the CPU, over gloo", "That is for trying, not for size.")
        return
    names = {torch.cuda.get_device_name(i) for i in range(count)}
    yield Finding("ok", "GPU", f"{count} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}")
    if not dist.is_nccl_available():
        yield Finding("problem", "NCCL", "not in this build of torch", "Install a CUDA build of torch.")
    if count > 1:
        pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
        blind = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
        advice = "Transfers go through host memory: expect a slow ring." if blind else ""
        level: Literal["ok", "note"] = "note" if blind else "ok"
        yield Finding(level, "links", f"{len(pairs) - len(blind)} of {len(pairs)} pairs reach each other", advice)


def _kernels() -> Iterator[Finding]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    request = Request(device, torch.bfloat16, 128, 128, 32, 8)
    able, elsewhere = 0, []
    for kernel in registered():
        if not kernel.capabilities.made_for(device):
            elsewhere.append(f'"{kernel.name}"')
            continue
        missing = lacks(kernel.capabilities, request)
        able += not missing
        found = f"lacks {', '.join(missing)}" if missing else f"computes bf16 attention on {device}"
        yield Finding("note" if missing else "ok", f'kernel "{kernel.name}"', found)
    if elsewhere:
        yield Finding("note", "other kernels", f"{', '.join(elsewhere)} are not for {device}")
    if not able:
        yield Finding("problem", "kernels", f"none computes bf16 attention on {device}", f"Known: {kernels.names()}.")


def _packages() -> Iterator[Finding]:
    for name, (tested, purpose) in TESTED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding("note", name, f"not installed ({purpose})")
            continue
        if tested and not found.startswith(tested):
            yield Finding("note", name, found, f"Tested with {tested}: for {purpose} run doctor with --model.")
        else:
            yield Finding("ok", name, f"{found} ({purpose})")


def _machine() -> Finding:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return Finding("ok", "machine", f"{os.cpu_count()} cores, {pages / 2**30:.0f} GiB of memory")


def exchange_speed(rank: int, peer: int, rounds: int = 5) -> float:
    """Bytes a second of an exchange with another rank over the default group, the best of some; on both at once."""
    mine = torch.ones(PROBE_BYTES, dtype=torch.uint8)
    theirs, best = torch.empty_like(mine), float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        work = [dist.isend(mine, peer), dist.irecv(theirs, peer)]
        for one in work:
            if one is not None:
                one.wait()
        best = min(best, time.perf_counter() - begin)
    return PROBE_BYTES / best
