"""The GPU's merge, run by Triton's interpreter on the CPU, against the plain one; and compiled for GPUs.

Whether Triton interprets is decided when a kernel is defined; a process of its own keeps that from other tests.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from running import said
from torch import Tensor

from seqpar_ring.kernels import merge
from seqpar_ring.kernels.merge import Part, merge_

there_is_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is made for Linux only, and is not installed here"
)


@there_is_triton
def test_the_kernel_merges_as_the_plain_merge_does_and_seeded_faults_show() -> None:
    assert "all right" in said("merge_cases.py", TRITON_INTERPRET="1")


@there_is_triton
def test_the_kernel_compiles_for_gpus_reads_16_bytes_at_once_and_spills_nothing(tmp_path: Path) -> None:
    assert "all right" in said("merge_compiled.py", TRITON_CACHE_DIR=str(tmp_path))


def test_on_a_cpu_parts_are_merged_one_by_one_and_none_waits() -> None:
    generator = torch.Generator().manual_seed(1)

    def some(rows: int) -> tuple[Tensor, Tensor]:
        return torch.randn(2, rows, 3, 5, generator=generator), torch.randn(2, 3, rows, generator=generator)

    (out, lse), parts = some(9), [Part(2, *some(4)), Part(0, *some(9)), Part(8, *some(1))]
    want_out, want_lse = out.clone(), lse.clone()
    for q0, part_out, part_lse in parts:
        rows = slice(q0, q0 + part_lse.shape[2])
        merge_(want_out[:, rows], want_lse[:, :, rows], part_out, part_lse)
    assert merge.at_once(out) == 1
    merge.merge_parts_(out, lse, parts)
    assert torch.equal(out, want_out)
    assert torch.equal(lse, want_lse)
