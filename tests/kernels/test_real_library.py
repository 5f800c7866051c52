"""The GPU's kernels over their real libraries, as far as that goes without a GPU; each in a process of its own.

torch's own are always there. The others are installed by `make test-kernels`, which says by SEQPAR_RING_KERNELS where.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("real_library.py")
PLACE = "SEQPAR_RING_KERNELS"
FOLDERS = {"flash2": "source", "flash3": "source", "flash4": "wheels", "cudnn": "wheels"}


def said(name: str, architecture: str = "sm_90") -> str:
    """What the script prints, which ends well only if the library took every call."""
    folders = []
    if name in FOLDERS:
        if PLACE not in os.environ:
            pytest.skip(f"the library of {name} is not installed; `make test-kernels` installs it")
        folders = [str(Path(os.environ[PLACE]) / FOLDERS[name])]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), name, architecture, *folders],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=870,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["torch_flash", "torch_cudnn", "cudnn", "flash2", "flash3"])
def test_the_library_takes_every_call_that_the_capabilities_declare(name: str) -> None:
    assert f"calls of {name}" in said(name)


@pytest.mark.timeout(900)  # some two dozen kernels
@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
def test_flash_attention_4_compiles_for(architecture: str) -> None:
    assert f"calls of flash4 for {architecture}" in said("flash4", architecture)
