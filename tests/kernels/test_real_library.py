"""The GPU's kernels over their real libraries, as far as that goes without a GPU; each in a process of its own.

torch's own are always there. The others are installed by `make test-kernels`, which says by SEQPAR_RING_KERNELS where.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from running import said

PLACE = "SEQPAR_RING_KERNELS"
FOLDERS = {"flash2": "source", "flash3": "source", "flash4": "wheels", "cudnn": "wheels"}


def tried(name: str, architecture: str = "sm_90") -> str:
    """What the script prints, which ends well only if the library took every call."""
    if name not in FOLDERS:
        return said("real_library.py", name, architecture)
    if PLACE not in os.environ:
        pytest.skip(f"the library of {name} is not installed; `make test-kernels` installs it")
    return said("real_library.py", name, architecture, str(Path(os.environ[PLACE]) / FOLDERS[name]), timeout=870)


@pytest.mark.parametrize("name", ["torch_flash", "torch_cudnn", "cudnn", "flash2", "flash3"])
def test_the_library_takes_every_call_that_the_capabilities_declare(name: str) -> None:
    assert f"calls of {name}" in tried(name)


@pytest.mark.timeout(900)  # some two dozen kernels
@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
def test_flash_attention_4_compiles_for(architecture: str) -> None:
    assert f"calls of flash4 for {architecture}" in tried("flash4", architecture)
