"""What all tests share: deterministic torch, one thread a rank, worker pools started once a session, when needed."""

import multiprocessing
import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from seqpar_ring.testing import RankPool

IMPORTED_ONCE = (
    "seqpar_ring.testing.worker",
    "seqpar_ring.integrations.deepspeed",
    "seqpar_ring.integrations.trainer",
    "seqpar_ring.integrations.transformers",
    "transformers.models.llama.modeling_llama",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # every engine imports it, and with it torch's compiler
    "trl.trainer.sft_trainer",
    "peft",
)
"""Half a minute on a slow machine, once in place of once a rank: what runs is forked from a process that has these."""

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # older torch raises in deterministic mode without it


def pytest_configure(config: pytest.Config) -> None:
    # Fills torch.empty with NaN, so that memory nobody wrote shows in the results.
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    os.environ.pop("COLUMNS", None)  # workers have it, and reports would be so wide
    if not torch.cuda.is_available():  # DeepSpeed looks for devices as it is imported, and CUDA survives no fork
        multiprocessing.set_forkserver_preload(list(IMPORTED_ONCE))
    # How long an example takes is no property of the code where several workers share the cores.
    hypothesis.settings.register_profile("shared", deadline=None)
    hypothesis.settings.load_profile("shared")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU, tests marked `gpu` are deselected (and counted as such), not skipped."""
    if torch.cuda.is_available():
        return
    away = [item for item in items if item.get_closest_marker("gpu")]
    if away:
        config.hook.pytest_deselected(items=away)
        items[:] = [item for item in items if item not in away]


@pytest.fixture(scope="session")
def pool2() -> Iterator[RankPool]:
    """Two ranks as processes over gloo."""
    with RankPool(2, timeout=200) as pool:
        yield pool


@pytest.fixture(scope="session")
def pool4() -> Iterator[RankPool]:
    """Four ranks as processes over gloo."""
    with RankPool(4, timeout=200) as pool:
        yield pool
