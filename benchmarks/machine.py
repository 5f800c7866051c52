"""The machine and the versions that a figure belongs to."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

from seqpar_ring.kernels.cpu import TILES


def described() -> dict[str, object]:
    """Hardware (GPUs, or the processor where there are none), cores, versions and commit, as plain values."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    processor = names[0].partition(":")[2].strip() if names else platform.processor()
    gpus = torch.cuda.device_count()
    return {
        "hardware": f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else processor,
        "processor": processor,
        # Of which torch's CPU kernels make use.
        "instructions": torch.backends.cpu.get_cpu_capability() + (" AMX" if TILES else ""),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": _commit(),
    }


def _commit() -> str:
    """Of the code that runs; "" where there is no git, or this is no clone."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return found.stdout.strip()
