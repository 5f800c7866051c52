"""Pools of their own for each file here: engines make process groups by the dozen and keep them, each with its threads.

Left in the pools of the whole session, they would slow down every test that follows.
"""

from collections.abc import Iterator

import pytest

from seqpar_ring.testing import RankPool


@pytest.fixture(scope="module")
def pool2() -> Iterator[RankPool]:
    """Two ranks as processes over gloo."""
    with RankPool(2, timeout=280) as pool:
        yield pool


@pytest.fixture(scope="module")
def pool4() -> Iterator[RankPool]:
    """Four ranks as processes over gloo."""
    with RankPool(4, timeout=280) as pool:
        yield pool
