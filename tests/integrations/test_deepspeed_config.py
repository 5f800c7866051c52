"""The block in the DeepSpeed config: where it is found, what is refused, and what `initialize` does around it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ds_cases
import ds_engines
import hf_cases
import pytest
import torch
from seqpar_ring.integrations import deepspeed_auto

from seqpar_ring.errors import ConfigError
from seqpar_ring.planner import hardware
from seqpar_ring.testing import RankPool, relative_error


@pytest.mark.parametrize("stage", [1, 3])
def test_a_model_that_calls_the_ring_itself_trains_as_one_process(pool2: RankPool, stage: int) -> None:
    made, whole = ds_engines.OwnModel(), ds_cases.row(0, 0, 0)
    logits, labels = made(whole["input_ids"])[:, :-1], whole["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    for found, grads in pool2.run(ds_engines.train_own_model, stage):
        assert found == pytest.approx(loss.item(), rel=1e-6)
        for name, p in made.named_parameters():
            assert p.grad is not None
            assert relative_error(grads[name], p.grad) <= 1e-5, name


def test_deepspeeds_own_loader_gives_the_ranks_of_a_sequence_the_same_samples(pool4: RankPool) -> None:
    a, b, c, d = pool4.run(ds_engines.dealt_samples, 2)
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
        ({"seqpar_ring": {"size": "auto"}}, {}, "ConfigError", 'Give "tokens"'),
        ({"seqpar_ring": {"size": "auto", "tokens": 64}}, {}, "ConfigError", 'Give "hardware"'),
        ({"seqpar_ring": {"size": "auto", "tokens": 64, "hardware": "cpux"}}, {}, "ConfigError", 'Did you mean "cpu"?'),
        ({"seqpar_ring": {"size": 2}, "sequence_parallel_size": 2}, {}, "UnsupportedError", "sequence_parallel_size"),
        ({"seqpar_ring": {"size": 2}, "expert_parallel": {"enabled": True}}, {}, "UnsupportedError", "expert_parallel"),
        ({"seqpar_ring": {"size": 2}, "data_parallel_size": 2}, {}, "UnsupportedError", "data_parallel_size"),
        ({"seqpar_ring": {"size": 2}, "tensor_parallel": {"autotp_size": 2}}, {}, "UnsupportedError", "autotp_size"),
        ({"seqpar_ring": {"size": 2}, "checkpoint": {"writer": {}}}, {}, "UnsupportedError", "checkpoint.writer"),
        ({"seqpar_ring": {"size": 2}, "gradient_allreduce_op": "SUM"}, {}, "UnsupportedError", "gradient_allreduce_op"),
        *(
            ({"seqpar_ring": {"size": 2}, "zero_optimization": {"stage": 3, name: value}}, {}, "UnsupportedError", name)
            for name, value in (
                ("mics_shard_size", 2),
                ("zero_hpz_partition_size", 2),
                ("zero_quantized_gradients", True),
            )
        ),
        (
            {
                "seqpar_ring": {"size": 2},
                "data_efficiency": {
                    "enabled": True,
                    "data_sampling": {"enabled": True, "curriculum_learning": {"enabled": True}},
                },
            },
            {},
            "UnsupportedError",
            "data_efficiency.data_sampling.curriculum_learning",
        ),
        ({"seqpar-ring": {"size": 2}}, {}, "ConfigError", 'Did you mean "seqpar_ring"?'),
        ({"seqpar_ring": {"size": 2}}, {"mpu": "mine"}, "UnsupportedError", "mpu='mine'"),
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
            "Set it to 2, or leave it out",
        ),
        (
            {"seqpar_ring": {"size": 1}, "train_batch_size": 6, "train_micro_batch_size_per_gpu": 2},
            {},
            "ConfigError",
            "Set it to 4 or a multiple",
        ),
    ],
)
def test_a_wrong_config_is_refused_on_every_rank(
    pool2: RankPool, config: dict[str, Any], kwargs: dict[str, Any], kind: str, words: str
) -> None:
    for found, message in pool2.run(ds_engines.refusal, [config], kwargs):
        assert found == kind
        assert words in message


def test_what_asks_for_no_split_is_not_refused(pool2: RankPool) -> None:
    idle = {"sequence_parallel_size": 1, "expert_parallel": {"enabled": False, "autoep_size": 2}, "checkpoint": {}}
    idle |= {"gradient_allreduce_op": "mean", "data_efficiency": {"enabled": True, "data_sampling": {"enabled": True}}}
    idle["tensor_parallel"] = {"autotp_size": 1}
    idle["zero_optimization"] = {"stage": 0, "zero_hpz_partition_size": 1, "zero_quantized_gradients": False}
    config = {"seqpar_ring": {"size": 2}, "train_micro_batch_size_per_gpu": 1, **idle}
    assert pool2.run(ds_engines.refusal, [config], {}) == [("none", "")] * 2


def test_a_size_that_is_left_open_is_the_one_that_fits(pool2: RankPool, tmp_path: Path) -> None:
    """Beside buckets of 2 GB, 262,144 tokens of the small model fit in 450 MB only if two ranks share them; 64 tokens
    would only wait for each other."""
    for memory, tokens, size in ((2.45e9, 262144, 2), (4e9, 64, 1)):
        described = {**hardware.load("cpu").description.model_dump(exclude={"links"}), "memory": memory}
        file = tmp_path / f"{size}.yaml"
        file.write_text(json.dumps(described))
        found = pool2.run(ds_engines.decided_block, str(file), tokens)
        assert found[0] == found[1]
        assert found[0]["size"] == size
        assert found[0]["layout"] == "zigzag"


def test_what_is_known_of_the_gpus_is_no_setting_of_the_users(pool2: RankPool) -> None:
    """The block and the model's group say the same, and the block size is decided. It was refused as another."""
    assert pool2.run(ds_engines.said_twice, 2) == [("", ("block_tokens",))] * 2
    for message, _ in pool2.run(ds_engines.said_twice, "auto"):
        assert 'leaves "size" open, and the model is parallelized already' in message


def test_a_config_that_is_wrong_on_one_rank_is_refused_on_both(pool2: RankPool) -> None:
    good = {"seqpar_ring": {"size": 2}, "train_micro_batch_size_per_gpu": 2}
    for kind, message in pool2.run(ds_engines.refusal, [good, {**good, "train_batch_size": 3}], {}):
        assert kind == "ConfigError"
        assert "Set it to 2 or a multiple" in message


def test_ranks_with_different_blocks_are_told_the_field_and_both_values(pool2: RankPool) -> None:
    blocks = [{"seqpar_ring": {"size": 2, "layout": layout}} for layout in ("zigzag", "striped")]
    for kind, message in pool2.run(ds_engines.refusal, blocks, {}):
        assert kind == "DisagreementError"
        assert all(word in message for word in ("layout", "zigzag", "striped"))


def test_the_block_is_found_wherever_deepspeed_takes_a_config_from(pool2: RankPool, tmp_path: Path) -> None:
    block = {"seqpar_ring": {"size": 2, "kernle": "cpu"}}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(block))
    commented = tmp_path / "commented.json"  # DeepSpeed reads such files, so they must not switch the ring off
    commented.write_text('{\n  // long contexts\n  "seqpar_ring": {"size": 2, "kernle": "cpu",},\n}')
    coded = base64.urlsafe_b64encode(json.dumps(block).encode()).decode()
    places: list[tuple[Any, dict[str, Any]]] = [
        (str(file), {}),
        (str(commented), {}),
        (coded, {}),
        (None, {"config_params": block}),
        (None, {"args": SimpleNamespace(deepspeed_config=str(file))}),
    ]
    for config, kwargs in places:
        for kind, message in pool2.run(ds_engines.refusal, [config], kwargs):
            assert kind == "ConfigError"
            assert 'Did you mean "kernel"?' in message


def test_install_makes_deepspeed_initialize_honour_the_block_and_uninstall_undoes_it(pool2: RankPool) -> None:
    for found in pool2.run(ds_engines.installed):
        assert found == ["SequenceParallel", "seqpar_ring", "False", "True", "True"]


def test_a_deepspeed_with_other_arguments_is_refused_with_its_version(pool2: RankPool) -> None:
    for kind, message in pool2.run(ds_engines.unknown_version):
        assert kind == "VersionError"
        assert "deepspeed='0." in message
        assert "mpu" in message


def test_a_model_that_deepspeed_was_told_to_split_is_refused(pool2: RankPool) -> None:
    """By `tp_model_init`, of which the config knows nothing: ranks would add up activations of different tokens."""
    for kind, message in pool2.run(ds_engines.split_by_deepspeed):
        assert kind == "UnsupportedError"
        assert "deepspeed.tp_model_init cannot be combined" in message


def test_deepspeeds_experts_and_its_pipelines_are_refused(pool2: RankPool) -> None:
    for what, words in (("experts", "DeepSpeed's expert layers"), ("pipeline", "a pipeline model")):
        for kind, message in pool2.run(ds_engines.of_deepspeed, what):
            assert kind == "UnsupportedError"
            assert f"{words} cannot be combined" in message


def test_the_device_is_set_before_groups_are_made_of_it(pool2: RankPool) -> None:
    """DeepSpeed itself sets it later, and until then every rank's device is the first GPU."""
    for rank, found in enumerate(pool2.run(ds_engines.device_set_first)):
        assert found[:2] == [f"device {rank}", "groups"]
    for found in pool2.run(ds_engines.device_set_first, SimpleNamespace(device_rank=7)):
        assert found[:2] == ["device 7", "groups"]
        assert "device 7" in found[2:], "which is not the one that DeepSpeed sets"


def open_size(described: dict[str, Any], config: dict[str, Any], model: Any, folder: Path) -> dict[str, Any]:
    """What a block that leaves the size open comes to on one device of so much memory."""
    file = folder / "machine.yaml"
    file.write_text(json.dumps({**hardware.load("cpu").description.model_dump(exclude={"links"}), **described}))
    block = {"size": "auto", "tokens": 16384, "hardware": str(file), "fabric": "loopback"}
    return deepspeed_auto.decide(block, config, model, (1, 0))


def test_a_size_that_is_left_open_takes_stage_and_recomputing_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The search took ZeRO 3, which the job did not run, and recomputed layers that the model kept."""
    import transformers

    shape = {"hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 6, "num_key_value_heads": 3}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, vocab_size=97, num_hidden_layers=3))
    one, said = {"train_micro_batch_size_per_gpu": 1}, []
    with caplog.at_level("INFO"):
        for zero in (None, False, True, {"stage": 1}):
            config = one if zero is None else {**one, "zero_optimization": zero}
            open_size({"memory": 9e9}, config, made, tmp_path)
            said.append(caplog.messages[-1])
        assert said[0] == said[1]
        assert said[2] == said[3]
        assert all("without checkpointing" in text for text in said)
        hf_cases.turn_on(made, "plain")
        open_size({"memory": 9e9}, one, made, tmp_path)
        assert "with checkpointing" in caplog.messages[-1]


def test_a_size_that_is_left_open_wants_the_micro_batch_and_a_model_that_is_known(tmp_path: Path) -> None:
    import transformers

    shape = {"hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 6, "num_key_value_heads": 3}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, vocab_size=97, num_hidden_layers=3))
    with pytest.raises(ConfigError, match=r"how many sequences a group holds.*train_batch_size=16.*train_micro_batch"):
        open_size({"memory": 9e9}, {"train_batch_size": 16}, made, tmp_path)
    made.model.layers[0].mlp = torch.nn.Linear(999, 999)
    with pytest.raises(ConfigError, match=r"does not know this model.*parameters=.*counted="):
        open_size({"memory": 9e9}, {"train_micro_batch_size_per_gpu": 1}, made, tmp_path)


def test_a_size_that_is_left_open_counts_what_peft_has_frozen_and_what_it_recomputes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters of 1 % have next to no gradients and states: the search took all parameters for trained."""
    import peft
    import transformers

    shape = {"hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 6, "num_key_value_heads": 3}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, vocab_size=997, num_hidden_layers=3))
    seen, search = [], deepspeed_auto.search
    monkeypatch.setattr(deepspeed_auto, "search", lambda *a, **k: seen.append(a[0]) or search(*a, **k))
    one = {"train_micro_batch_size_per_gpu": 1}
    open_size({"memory": 9e9}, one, made, tmp_path)
    hf_cases.turn_on(made, "plain")
    adapted = peft.get_peft_model(made, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with caplog.at_level("INFO"):
        open_size({"memory": 9e9}, one, adapted, tmp_path)
    assert [workload.trained for workload in seen] == [None, 3 * 2 * (48 + 48 + 48 + 24)]
    assert "with checkpointing" in caplog.messages[-1]


def test_one_model_within_that_recomputes_is_enough() -> None:
    class Model(torch.nn.Module):
        def __init__(self, recomputes: bool) -> None:
            super().__init__()
            self.recomputes = recomputes

        @property
        def is_gradient_checkpointing(self) -> bool:
            return self.recomputes

    for each in ([], [False], [False, True], [True, False]):
        assert deepspeed_auto._recomputes(torch.nn.ModuleList(Model(one) for one in each)) is any(each)
