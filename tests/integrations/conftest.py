"""Pools of their own for each file here: engines make process groups by the dozen and keep them, each with its threads.

Left in the pools of the whole session, they would slow down every test that follows. So would hundreds of threads in
one file: workers that have too many end, and others take their place.
"""

from collections.abc import Iterator

import psutil
import pytest

from seqpar_ring.testing import RankPool

THREADS = 100
"""Of a worker: four or five engines of DeepSpeed."""


def pool_of(world: int) -> Iterator[RankPool]:
    with RankPool(world, timeout=280) as pool:
        yield pool


def rested(pool: RankPool) -> Iterator[RankPool]:
    """The pool for one test; its workers end afterwards if they have too many threads."""
    yield pool
    if any(psutil.Process(pid).num_threads() > THREADS for pid in pool.pids()):
        pool.close()


@pytest.fixture(scope="module")
def kept2() -> Iterator[RankPool]:
    """Two ranks as processes over gloo."""
    yield from pool_of(2)


@pytest.fixture(scope="module")
def kept4() -> Iterator[RankPool]:
    """Four ranks as processes over gloo."""
    yield from pool_of(4)


@pytest.fixture
def pool2(kept2: RankPool) -> Iterator[RankPool]:
    """Two ranks as processes over gloo."""
    yield from rested(kept2)


@pytest.fixture
def pool4(kept4: RankPool) -> Iterator[RankPool]:
    """Four ranks as processes over gloo."""
    yield from rested(kept4)
