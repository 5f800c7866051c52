"""Whole rings on each of the GPU's kernels, over stand-ins for their libraries, against dense attention in fp64.

The contract suite gives kernels tensors that it has made; here they get rows as a run lays them: views of what arrived,
parts of blocks, fields that lie one after the other in one memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stand_ins import gpu_kernels, on_cpu, only

from seqpar_ring.kernels import varlen
from seqpar_ring.layout import LAYOUTS
from seqpar_ring.schedule import BUILDERS
from seqpar_ring.testing import Case, assert_matches_dense

KERNELS = {kernel.name: on_cpu(kernel) for kernel in gpu_kernels()}
WIDTHS = [(8, 8), (8, 3), (3, 8), (5, 5)]
"""Of keys and values: in fp64 a row of 3 numbers, or one behind an odd number of them, begins at an odd 8 bytes."""


@pytest.fixture(scope="module", autouse=True)
def _on_stand_ins() -> Iterator[None]:
    with only(KERNELS.values()):
        yield


SIZES = st.integers(1, 12)
MASKS = st.one_of(
    st.just({}),
    st.just({"causal": False}),
    st.fixed_dictionaries({"window": SIZES}),
    st.fixed_dictionaries({"chunk": SIZES}),
)
SETTINGS = st.fixed_dictionaries(
    {
        "layout": st.sampled_from(sorted(LAYOUTS)),
        "schedule": st.sampled_from(sorted(BUILDERS)),
        "backward": st.sampled_from(["kv", "q"]),
        "block_tokens": st.sampled_from(["auto", 3, 20]),
    }
)


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(1, 17), min_size=1, max_size=3),
    world=st.integers(2, 4),
    mask=MASKS,
    widths=st.sampled_from(WIDTHS),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    batch=st.integers(1, 2),
    how=SETTINGS,
)
def test_a_ring_equals_dense_in_fp64(
    name: str,
    lengths: list[int],
    world: int,
    mask: dict[str, Any],
    widths: tuple[int, int],
    heads: tuple[int, int],
    batch: int,
    how: dict[str, Any],
) -> None:
    can = KERNELS[name].capabilities
    if not can.window:
        mask = {"causal": mask.get("causal", True)}
    lengths = lengths if can.varlen else lengths[:1]
    case = Case(*heads, *widths, batch, **mask)
    assert_matches_dense(lengths, world, case, 1e-11, kernel=name, node=1, **how)


@pytest.mark.parametrize("name", KERNELS)
def test_rows_that_libraries_cannot_read_would_be_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values lie behind an odd number of keys, each of an odd number of fp64 numbers."""
    case, how = Case(1, 1, 3, 8), {"layout": "contiguous", "block_tokens": 3, "kernel": name}
    assert_matches_dense(37, 4, case, 1e-11, **how)
    monkeypatch.setattr(varlen, "_askew", lambda _: False)
    with pytest.raises(AssertionError, match="no multiple of 16 bytes"):
        assert_matches_dense(37, 4, case, 1e-11, **how)


@pytest.mark.parametrize(
    ("x", "same"),
    [
        (torch.zeros(1, 5, 2, 8), True),
        (torch.zeros(2, 5, 2, 16)[:, 1:4, :, 8:], True),
        (torch.zeros(1, 5, 2, 9)[..., :8], False),  # rows at 36 bytes
        (torch.zeros(5 * 16 + 1)[1:].view(1, 5, 2, 8), False),  # all at 4 bytes behind a multiple
        (torch.zeros(1, 5, 8, 2).transpose(2, 3), False),
        (torch.zeros(1, 5, 2, 5), False),
        (torch.zeros(1, 1, 1, 9)[..., :8], True),  # its steps are never taken
    ],
)
def test_rows_are_copied_where_libraries_cannot_read_them(x: torch.Tensor, same: bool) -> None:
    found = varlen.readable(x, 8)
    assert (found is x) == same
    assert found.shape == (*x.shape[:3], 8)
    assert found.stride(3) == 1
    assert found.data_ptr() % varlen.READ == 0
