"""Other models of Megatron over a ring, and other ways to spread one, train as one rank: sequence parallelism, experts,
several tokens at once.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from mcore_workers import in_worker

from seqpar_ring.errors import UnsupportedError
from seqpar_ring.testing import RankPool

pytestmark = pytest.mark.timeout(400)

VERSION = tuple(int(part) for part in version("megatron-core").split(".")[:2])
LOSS, GRADIENT = 1e-6, 1e-5
PACKED = {"lengths": (24, 8, 32)}
PADDED = {"lengths": (21, 0, 5, 1, 31), "padded": (24, 8, 8, 8, 32)}


def assert_trains_alike(pool: RankPool, rings: int, **case: Any) -> None:
    for loss, gradient, name, found, _ in pool.run_groups(in_worker("mcore_cases", "trains", **case)):
        assert loss <= LOSS
        assert gradient <= GRADIENT, name
        assert found == rings, "forward passes of the ring: layers times micro-batches"


@pytest.mark.parametrize("batch", [{}, PADDED], ids=["sbhd", "padded thd"])
@pytest.mark.parametrize("recompute", ["", "full"])
def test_sequence_parallelism_inside_tensor_parallel_groups(
    pool4: RankPool, recompute: str, batch: dict[str, Any]
) -> None:
    assert_trains_alike(pool4, 2, spec="sequence parallel", cp=2, tp=2, recompute=recompute, **batch)


@pytest.mark.parametrize("engine", [{}, {"overlap": True, "distributed": True}], ids=["plain", "overlap, distributed"])
def test_an_interleaved_pipeline_learns_as_one_rank_does(pool4: RankPool, engine: dict[str, Any]) -> None:
    """Four layers in two stages of two chunks, times cp 2: Megatron's loop, four steps of four micro-batches."""
    case: dict[str, Any] = {"options": (("num_layers", 4),), "recompute": "full", **PADDED}
    interleaved = in_worker("mcore_training", "train", cp=2, **case)
    found = pool4.run_groups(interleaved, {"pp": 2, "virtual": 2, **engine})
    truth = pool4.run_groups(in_worker("mcore_training", "train", cp=1, **case), {}, True)[0][0]
    for figures, rings in found:
        assert figures == pytest.approx(truth, rel=LOSS)  # losses and norms of gradients
        assert rings == 4 * 4 * 2, "once a layer of this stage and micro-batch"


SINKS = (("softmax_type", "learnable"),)
OTHERS = {"cp 1": {"cp": 1}, "cp 4": {"cp": 4}, "cp 2, tp 2": {"cp": 2, "tp": 2}}
CHECKPOINTS: dict[str, tuple[dict[str, int], bool, list[str]]] = {
    "cp 2": ({"cp": 2}, False, ["cp 1", "cp 4", "cp 2, tp 2"]),
    "cp 2, tp 2, distributed optimizer": ({"cp": 2, "tp": 2}, True, ["cp 1", "cp 4"]),
}
"""By how many ranks a checkpoint is saved, with which optimizer, and by whom it is loaded."""


@pytest.mark.parametrize("saved_by", CHECKPOINTS)
def test_a_distributed_checkpoint_goes_on_with_other_ranks(pool4: RankPool, saved_by: str, tmp_path: Path) -> None:
    """Learnable sinks among its weights. The next losses and norms of gradients are those of the job that saved it."""
    spread, distributed, others = CHECKPOINTS[saved_by]
    where = str(tmp_path)
    save = in_worker("mcore_checkpoints", "save", options=SINKS, **spread)
    truth, weights = pool4.run_groups(save, where, distributed)[0]
    # Without Apex or Transformer Engine a distributed optimizer's own state is not saved, so that one step is compared.
    figures = 2 if distributed else len(truth)
    for other in others:
        load = in_worker("mcore_checkpoints", "load", options=SINKS, **OTHERS[other])
        for found, away in pool4.run_groups(load, where, distributed, weights if "tp" not in spread else {}):
            assert away == 0.0, other
            assert found[:figures] == pytest.approx(truth[:figures], rel=LOSS), other


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
@pytest.mark.parametrize("batch", [{}, PACKED], ids=["sbhd", "thd"])
def test_experts_behind_a_ring(pool4: RankPool, dispatcher: str, batch: dict[str, Any]) -> None:
    assert_trains_alike(pool4, 2, spec="experts", cp=2, options=(("moe_token_dispatcher_type", dispatcher),), **batch)


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss"])
def test_the_balance_loss_of_experts_counts_as_megatron_scales_it(pool4: RankPool, kind: str) -> None:
    """Up to 0.18 Megatron gives it 1 / cp of its coefficient, whatever attends: two ranks are as one with half."""
    case = {
        "spec": "experts",
        "cp": 2,
        "options": (("moe_router_load_balancing_type", kind), ("moe_aux_loss_coeff", 0.1)),
    }
    run = in_worker("mcore_cases", "trains", **case)
    away = {c: max(one[1] for one in pool4.run_groups(run, (("moe_aux_loss_coeff", c),))) for c in (0.1, 0.05)}
    assert away.pop(0.05 if VERSION < (0, 19) else 0.1) <= GRADIENT
    assert min(away.values()) > 1e-3


def test_several_tokens_at_once(pool4: RankPool) -> None:
    assert_trains_alike(pool4, 3, spec="next tokens", cp=2)


def test_several_tokens_at_once_of_packed_sequences(pool4: RankPool) -> None:
    if VERSION < (0, 16):
        with pytest.raises(AssertionError, match="sequence packing is not yet supported"):
            pool4.run_groups(in_worker("mcore_cases", "trains", spec="next tokens", cp=2, **PACKED))
        return
    assert_trains_alike(pool4, 3, spec="next tokens", cp=2, **PACKED)


def test_several_tokens_at_once_of_padded_sequences_are_refused(pool4: RankPool) -> None:
    with pytest.raises(UnsupportedError, match="padding") as raised:
        pool4.run_groups(in_worker("mcore_cases", "compare", spec="next tokens", cp=2, **PADDED), (0.0, {}))
    assert "mtp_num_layers=1" in str(raised.value)
