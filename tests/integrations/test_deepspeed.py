"""DeepSpeed with the block trains as one process does: every loss, gradient norm and gradient, in every ZeRO stage."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import ds_cases
import pytest
import torch
from ds_cases import Run
from torch import Tensor

from seqpar_ring.testing import RankPool, relative_error

STAGES = [0, 1, 2, 3]
LOSS = {"sgd": 1e-6, "adamw": 1e-4}


@lru_cache
def reference(run: Run) -> tuple[list[float], list[float], dict[str, Tensor]]:
    return ds_cases.one_process(run)


def one_process_of(run: Run) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """The reference knows neither stages nor ranks, so all set-ups share it."""
    return reference(Run(0, 1, run.optimizer, run.steps, run.bf16, run.weigh_step, run.clip))


def worst(found: list[float], truth: list[float]) -> float:
    assert len(found) == len(truth)
    return max(abs(a - b) / abs(b) for a, b in zip(found, truth, strict=True))


def assert_trains_alike(pool: RankPool, run: Run) -> None:
    losses, norms, grads = one_process_of(run)
    for found_losses, found_norms, found_grads in pool.run(ds_cases.train, run):
        assert worst(found_losses, losses) <= LOSS[run.optimizer]
        assert worst(found_norms, norms) <= 1e-4
        for name, grad in grads.items():
            assert relative_error(found_grads[name], grad) <= 1e-5, name
    assert losses[-1] != losses[0]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_of_one_sequence_train_as_one_process(pool2: RankPool, stage: int, optimizer: str) -> None:
    assert_trains_alike(pool2, Run(stage, 2, optimizer))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stage", STAGES)
def test_four_ranks_of_one_sequence_train_as_one_process(pool4: RankPool, stage: int, optimizer: str) -> None:
    assert_trains_alike(pool4, Run(stage, 4, optimizer))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stage", STAGES)
def test_two_sequences_of_two_ranks_train_as_one_process(pool4: RankPool, stage: int, optimizer: str) -> None:
    assert_trains_alike(pool4, Run(stage, 2, optimizer))


@pytest.mark.parametrize("stage", [1, 3])
def test_targets_can_be_weighed_over_the_whole_optimizer_step(pool4: RankPool, stage: int) -> None:
    run = Run(stage, 2, steps=4, weigh_step=True)
    assert_trains_alike(pool4, run)
    assert worst(one_process_of(Run(stage, 2, steps=4))[0], one_process_of(run)[0]) > 1e-2


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_is_as_near_to_fp32_as_one_process_in_bf16(pool2: RankPool, stage: int) -> None:
    exact = one_process_of(Run(0, 1, steps=1))[2]
    alone = one_process_of(Run(0, 1, steps=1, bf16=True))[2]
    found = pool2.run(ds_cases.train, Run(stage, 2, steps=1, bf16=True))[0][2]

    def error(grads: dict[str, Tensor]) -> float:
        return relative_error(*(torch.cat([g[name].flatten() for name in exact]) for g in (grads, exact)))

    assert error(found) <= 1.1 * error(alone)


def test_a_mean_of_per_rank_means_would_be_seen(pool2: RankPool) -> None:
    run = Run(1, 2, steps=2, fault="mean of means")
    norms = [norm for _, norm, _ in pool2.run(ds_cases.train, run)]
    assert worst(norms[0], one_process_of(run)[1]) > 1e-2


def test_deepspeeds_own_loader_gives_the_ranks_of_a_sequence_the_same_samples(pool4: RankPool) -> None:
    a, b, c, d = pool4.run(ds_cases.dealt_samples, 2)
    assert a == b
    assert c == d
    assert sorted(a + c) == list(range(8))


@pytest.mark.parametrize(
    ("config", "kwargs", "kind", "words"),
    [
        ({"seqpar_ring": {"size": 2, "layuot": "zigzag"}}, {}, "ConfigError", 'Did you mean "layout"?'),
        ({"seqpar_ring": {"size": "2"}}, {}, "ConfigError", "value='2', type='str'"),
        ({"seqpar_ring": {}}, {}, "ConfigError", 'lacks "size"'),
        ({"seqpar_ring": 2}, {}, "ConfigError", "must be a mapping"),
        ({"seqpar_ring": {"size": 2, "layout": "zigzg"}}, {}, "ConfigError", 'Did you mean "zigzag"?'),
        ({"seqpar_ring": {"size": 3}}, {}, "GroupError", "3"),
        ({"seqpar_ring": {"size": 2}, "sequence_parallel_size": 2}, {}, "UnsupportedError", "sequence_parallel_size"),
        ({"seqpar_ring": {"size": 2}}, {"mpu": "mine"}, "UnsupportedError", "value='mine'"),
        ({"seqpar_ring": {"size": 2}}, {"mesh_param": (1, 2)}, "UnsupportedError", "mesh_param"),
        (
            {
                "seqpar_ring": {"size": 2},
                "train_batch_size": 4,
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 2,
            },
            {},
            "ConfigError",
            "Set train_batch_size to 2",
        ),
    ],
)
def test_a_wrong_config_is_refused_on_every_rank(
    pool2: RankPool, config: dict[str, Any], kwargs: dict[str, Any], kind: str, words: str
) -> None:
    for found, message in pool2.run(ds_cases.refusal, config, kwargs):
        assert found == kind
        assert words in message


def test_the_block_is_found_in_a_file_and_in_config_params(pool2: RankPool, tmp_path: Any) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"seqpar_ring": {"size": 2, "kernle": "cpu"}}')
    for config, kwargs in ((str(file), {}), (None, {"config_params": {"seqpar_ring": {"size": 2, "kernle": "cpu"}}})):
        for kind, message in pool2.run(ds_cases.refusal, config, kwargs):
            assert kind == "ConfigError"
            assert 'Did you mean "kernel"?' in message


def test_install_makes_deepspeed_initialize_honour_the_block_and_uninstall_undoes_it(pool2: RankPool) -> None:
    for found in pool2.run(ds_cases.installed):
        assert found == ["SequenceParallel", "seqpar_ring", "False", "True", "True"]


def test_a_deepspeed_with_other_arguments_is_refused_with_its_version(pool2: RankPool) -> None:
    for kind, message in pool2.run(ds_cases.unknown_version):
        assert kind == "VersionError"
        assert "deepspeed='0." in message
        assert "mpu" in message
