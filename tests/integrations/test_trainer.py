"""Trainer, a loop with accelerate and FSDP2 over sequence groups: the losses of one process, step by step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import sft_cases
import trainer_cases as cases
import trainer_refusals
from seqpar_ring.integrations import trainer as integration
from seqpar_ring.integrations import trainer_rules
from trainer_cases import Run

from seqpar_ring.errors import ConfigError, UnsupportedError, VersionError
from seqpar_ring.testing import RankPool

NEAR = 1e-5
"""Relative error of a loss, in fp32, after up to 20 steps of Adam."""

LAYERS = 2


def assert_alike(found: list[float], expected: list[float], run: Run, rel: float = NEAR) -> None:
    """Losses, and behind them norms of gradients, which move ten times as far with the weights."""
    assert len(found) == len(expected)
    assert found[: run.steps] == pytest.approx(expected[: run.steps], rel=rel)
    assert found[run.steps :] == pytest.approx(expected[run.steps :], rel=10 * rel)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["packed", "padded", "masked"])
def test_twenty_steps_are_those_of_one_process(pool2: RankPool, tmp_path: Path, kind: str) -> None:
    run = Run(size=2, kind=kind, rows=2 if kind == "padded" else 1)
    expected = cases.figures(run, 1)
    for losses, _, ran in pool2.run(cases.train, run, str(tmp_path)):
        assert_alike(losses, expected, run)
        assert ran == LAYERS * run.steps * run.accumulation


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["packed", "padded", "masked"])
def test_two_groups_train_on_two_batches(pool4: RankPool, tmp_path: Path, kind: str) -> None:
    run = Run(size=2, kind=kind, checkpointing=True, settings=(("remat", "attention"),))
    expected = cases.figures(run, 2)
    for losses, _, ran in pool4.run(cases.train, run, str(tmp_path)):
        assert_alike(losses, expected, run)
        assert ran == LAYERS * run.steps * run.accumulation


def test_a_rank_without_a_target_makes_no_nan(pool2: RankPool, tmp_path: Path) -> None:
    run = Run(size=2, kind="first half masked", steps=4, settings=(("layout", "contiguous"),))
    for losses, _, _ in pool2.run(cases.train, run, str(tmp_path)):
        assert_alike(losses, cases.figures(run, 1), run)


def test_with_checkpointing_the_ring_runs_once_a_layer(pool2: RankPool, tmp_path: Path) -> None:
    run = Run(size=2, steps=4, checkpointing=True, settings=(("remat", "attention"), ("logits", 7), ("mlp", 9)))
    for losses, _, ran in pool2.run(cases.train, run, str(tmp_path)):
        assert_alike(losses, cases.figures(run, 1), run)
        assert ran == LAYERS * run.steps * run.accumulation


def test_lora_trains_its_matrices_alone(pool2: RankPool, tmp_path: Path) -> None:
    run = Run(size=2, steps=8, lora=True, checkpointing=True, settings=(("remat", "attention"),))
    for losses, _, ran in pool2.run(cases.train, run, str(tmp_path)):
        assert_alike(losses, cases.figures(run, 1), run)
        assert ran == LAYERS * run.steps * run.accumulation


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["packed", "padded", "masked"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_comes_with_its_block_in_the_trainers_config(
    pool2: RankPool, tmp_path: Path, stage: int, kind: str
) -> None:
    """One of its keys is "auto", which accelerate must not fill in."""
    settings = ("remat", "attention"), ("logits", 7), ("block_tokens", "auto")
    run = Run(size=2, kind=kind, deepspeed=stage, checkpointing=True, settings=settings)
    for losses, _, ran in pool2.run(cases.train, run, str(tmp_path)):
        assert_alike(losses, cases.figures(run, 1), run)
        assert ran == LAYERS * run.steps * run.accumulation


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_optimizer_and_parameters_may_wait_on_the_cpu(pool2: RankPool, tmp_path: Path, stage: int) -> None:
    run = Run(size=2, deepspeed=stage, steps=8, offload=True, checkpointing=True, settings=(("remat", "attention"),))
    for losses, _, ran in pool2.run(cases.train, run, str(tmp_path)):
        assert_alike(losses, cases.figures(run, 1), run)
        assert ran == LAYERS * run.steps * run.accumulation


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["DDP", "FSDP", 0, 1, 2, 3])
def test_gradients_have_the_size_that_they_have_in_one_process(
    pool4: RankPool, tmp_path: Path, engine: str | int
) -> None:
    """Neither Adam nor clipping would show a factor before all of them."""
    from transformers import Trainer

    stage = engine if isinstance(engine, int) else None
    run = Run(size=2, steps=4, optimizer="sgd", deepspeed=stage, fsdp=() if engine == "FSDP" else None)
    expected = cases.losses_and_norms(run, 2, clip=1e9)
    for found in pool4.run(trainer_refusals.losses, run, str(tmp_path), Trainer):
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=NEAR)
        if engine != 0:  # DeepSpeed tells none there
            assert [norm for _, norm in found] == pytest.approx([norm for _, norm in expected], rel=NEAR)


FSDP = {
    "packed": Run(2, checkpointing=True, fsdp=(), settings=(("remat", "attention"), ("logits", 7), ("mlp", 9))),
    "padded": Run(2, "padded", rows=2, fsdp=(("cpu_ram_efficient_loading", True),)),
    "masked": Run(2, "masked", steps=8, fsdp=(("reshard_after_forward", False),), settings=(("logits", 7),)),
    "FSDP's checkpoints": Run(
        2, steps=8, fsdp=(("activation_checkpointing", True),), settings=(("remat", "attention"), ("logits", 7))
    ),
    "LoRA": Run(2, steps=8, fsdp=(), lora=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("which", FSDP)
def test_fsdp2_by_trainers_own_arguments(pool4: RankPool, tmp_path: Path, which: str) -> None:
    """accelerate shards the head, and the norm before it, as a unit of their own; a head in tiles is called often."""
    run = FSDP[which]
    expected = cases.figures(run, 2)
    for losses, after, ran in pool4.run(cases.train, run, str(tmp_path)):
        assert_alike(losses, expected, run)
        assert ran == LAYERS * run.steps * run.accumulation
        evaluated = after
    if which == "masked":
        by_ddp = pool4.run(cases.train, replace(run, fsdp=None), str(tmp_path / "DDP"))
        assert evaluated == pytest.approx(by_ddp[0][1], rel=NEAR)


@pytest.mark.parametrize("fsdp", [None, ()])
def test_mixed_precision_follows_fp32_as_far_as_bf16_can(
    pool2: RankPool, tmp_path: Path, fsdp: tuple[()] | None
) -> None:
    settings = (("remat", "attention"), ("logits", 7))
    run = Run(size=2, steps=4, bf16=True, checkpointing=True, settings=settings, fsdp=fsdp)
    for losses, _, ran in pool2.run(cases.train, run, str(tmp_path)):
        assert_alike(losses, cases.figures(run, 1), run, 5e-3)
        assert losses != pytest.approx(cases.figures(run, 1), rel=1e-4)  # it was in bf16
        assert ran == LAYERS * run.steps * run.accumulation


@pytest.mark.slow
def test_deepspeed_has_data_ranks_too(pool4: RankPool, tmp_path: Path) -> None:
    run = Run(size=2, deepspeed=3, steps=6, checkpointing=True, settings=(("remat", "attention"),))
    for losses, _, ran in pool4.run(cases.train, run, str(tmp_path)):
        assert_alike(losses, cases.figures(run, 2), run)
        assert ran == LAYERS * run.steps * run.accumulation


@pytest.mark.parametrize("rows", [1, 3])
def test_the_evaluation_loss_is_that_of_one_process(pool2: RankPool, tmp_path: Path, rows: int) -> None:
    run = Run(size=2, kind="padded", rows=rows)  # 8 rows: with 3 in a batch the last has 2
    expected = cases.eval_loss(run, rows)
    for losses in pool2.run(cases.evaluate, run, str(tmp_path)):
        assert losses == pytest.approx([expected] * 2, rel=NEAR)


def test_data_ranks_evaluate_each_row_once(pool4: RankPool, tmp_path: Path) -> None:
    run = Run(size=2, kind="padded", rows=2)
    expected = cases.eval_loss(run, 4)
    for losses in pool4.run(cases.evaluate, run, str(tmp_path)):
        assert losses == pytest.approx([expected] * 2, rel=NEAR)


@pytest.mark.parametrize(("rows", "count"), [(1, 5), (2, 5), (2, 7), (3, 4)])
def test_rows_that_fill_up_the_last_evaluation_batch_do_not_count(
    pool4: RankPool, tmp_path: Path, rows: int, count: int
) -> None:
    run = Run(size=2, kind="padded", rows=rows)
    expected = cases.eval_loss(run, 2 * rows, count)
    for losses in pool4.run(cases.evaluate, run, str(tmp_path), count):
        assert losses == pytest.approx([expected] * 2, rel=NEAR)
    for losses in pool4.run(cases.evaluate, replace(run, rows=2 * rows), str(tmp_path), count, True):
        assert losses == pytest.approx([expected] * 2, rel=NEAR)  # accelerate's split_batches: of all data ranks


@pytest.mark.parametrize(("rows", "count"), [(2, 3), (4, 6), (2, 1), (2, 4)])
def test_documents_that_fill_up_the_last_evaluation_batch_do_not_count(
    pool4: RankPool, tmp_path: Path, rows: int, count: int
) -> None:
    """A collator that flattens makes one row of them, of which nothing was left out."""
    run = Run(size=2, kind="padded", rows=rows)
    expected = cases.eval_loss(run, 2 * rows, count)
    for losses in pool4.run(cases.evaluate_flattened, run, str(tmp_path), count):
        assert losses == pytest.approx([expected] * 2, rel=NEAR)


def test_fillers_that_cannot_be_told_from_the_samples_are_refused(pool4: RankPool, tmp_path: Path) -> None:
    run = Run(size=2, kind="packed", rows=2)  # three documents in each sample
    for message in pool4.run(cases.evaluate_flattened, run, str(tmp_path), 3):
        assert "filled up with samples of before" in message
        assert "per_device_eval_batch_size=1" in message
        assert "documents=6" in message
    for losses in pool4.run(cases.evaluate_flattened, run, str(tmp_path), 4):  # nothing to fill up
        assert losses == pytest.approx([cases.eval_loss(run, 4, 4)] * 2, rel=NEAR)


@pytest.mark.parametrize("which", ["all", "non_padding"])
def test_tokens_of_a_group_are_counted_once(pool4: RankPool, tmp_path: Path, which: str) -> None:
    run = Run(size=2, kind="padded", steps=2)  # of 8 rows each data rank has 4
    real = [int(row["attention_mask"].sum()) for row in cases.rows("padded")]
    expected = sum(real) if which == "non_padding" else cases.ROWS * cases.TOKENS
    assert pool4.run(cases.tokens_seen, run, str(tmp_path), which) == [expected] * 4


def test_work_of_a_group_is_counted_once(pool4: RankPool, tmp_path: Path) -> None:
    """Trainer sums operations over all ranks, and takes each for one with evaluation batches of its own."""
    run = Run(size=2, kind="padded", steps=2)
    for operations, per_second, steps in pool4.run(cases.work_counted, run, str(tmp_path)):
        assert operations == pytest.approx(cases.ROWS * cases.TOKENS, rel=1e-6)
        assert per_second == pytest.approx(steps, rel=0.02)  # figures of three digits


@pytest.mark.parametrize("how", cases.SAMPLERS)
def test_a_shuffled_loader_deals_each_sample_once(pool4: RankPool, how: str) -> None:
    first, same, other, too = pool4.run(cases.shuffled, 8, how, size=2)
    assert first == same
    assert other == too
    assert sorted(first + other) == list(range(8))
    one, *others = pool4.run(cases.shuffled, 8, how, size=4)
    assert others == [one] * 3


def test_gradients_are_averaged_after_an_evaluation_too(pool2: RankPool, tmp_path: Path) -> None:
    """accelerate would not wrap the model then; the second run is the seeded fault, which is refused."""
    run = Run(size=2, steps=4)
    for losses in pool2.run(cases.train_after_evaluation, run, str(tmp_path)):
        assert_alike(losses, cases.figures(run, 1), run)
    for message in pool2.run(cases.train_after_evaluation, Run(size=2, steps=4, fault="mark stays"), str(tmp_path)):
        assert "nothing averages the gradients" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "fsdp"),
    [(4, 2, None), (2, 4, None), (4, 1, None), (4, 2, ()), (2, 4, (("state_dict_type", "SHARDED_STATE_DICT"),))],
)
def test_a_checkpoint_goes_on_at_another_size(
    pool4: RankPool, tmp_path: Path, before: int, after: int, fsdp: tuple[tuple[str, str], ...] | None
) -> None:
    """The rows of a step stay the same: fewer ranks a sequence, more data ranks, less accumulation."""
    runs = [Run(size=size, steps=8, accumulation=size, fsdp=fsdp) for size in (before, after)]
    expected = cases.one_process(Run(size=1, steps=8, accumulation=4), 1)
    for losses in pool4.run(cases.resume, *runs, str(tmp_path), 4):
        assert losses == pytest.approx(expected, rel=1e-6)


def test_a_checkpoint_does_not_go_on_with_another_vocabulary(pool2: RankPool, tmp_path: Path) -> None:
    for message in pool2.run(trainer_refusals.another_vocabulary, Run(size=2, steps=1), str(tmp_path)):
        assert "size mismatch for model.embed_tokens.weight" in message
        assert all(shape in message for shape in ("[97, 48]", "[100, 48]"))


def test_a_stream_is_read_by_every_rank(pool4: RankPool, tmp_path: Path) -> None:
    run = Run(size=2, steps=4)
    for losses in pool4.run(cases.stream, run, str(tmp_path)):
        assert_alike(losses, cases.figures(run, 2), run)


def test_samples_may_be_grouped_by_length(pool4: RankPool, tmp_path: Path) -> None:
    assert pool4.run(cases.by_length, Run(size=2, steps=4), str(tmp_path)) == [4] * 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["packed", "padded", "masked"])
def test_a_plain_loop_with_accelerate_is_exact(pool4: RankPool, kind: str) -> None:
    run = Run(size=2, kind=kind, accumulation=1, checkpointing=True)
    for losses, ran in pool4.run(cases.plain_loop, run, size=2, remat="attention"):
        assert_alike(losses, cases.figures(run, 2), run)
        assert ran == LAYERS * run.steps


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_plain_loop_with_accelerate_and_deepspeed_is_exact(pool4: RankPool, stage: int) -> None:
    run = Run(size=2, accumulation=1, checkpointing=True, deepspeed=stage, settings=(("remat", "attention"),))
    for losses, ran in pool4.run(cases.plain_loop_of_deepspeed, run):
        assert_alike(losses, cases.figures(run, 2), run)
        assert ran == LAYERS * run.steps


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["packed", "padded", "masked"])
def test_fsdp2_is_exact_and_runs_the_ring_once_a_layer(pool4: RankPool, kind: str) -> None:
    run = Run(size=2, kind=kind, accumulation=1, checkpointing=True)
    expected = cases.figures(run, 2)
    for losses, ran in pool4.run(cases.fully_sharded, run, size=2, remat="attention", logits=7):
        assert_alike(losses, expected, run)
        assert ran == LAYERS * run.steps


def test_fsdp2_may_compute_in_bf16(pool2: RankPool) -> None:
    """It makes copies of what layers are given."""
    run = Run(size=2, steps=4, accumulation=1, checkpointing=True, bf16=True)
    for losses, ran in pool2.run(cases.fully_sharded, run, remat="attention", logits=7, mlp=9):
        assert_alike(losses, cases.figures(run, 1), run, 5e-3)
        assert losses != pytest.approx(cases.figures(run, 1), rel=1e-4)  # it was in bf16
        assert ran == LAYERS * run.steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packing", "lora", "fsdp"),
    [(True, True, None), (True, False, None), (False, True, None), (False, False, None), (True, True, ())],
)
def test_trls_sfttrainer_is_exact_packed_and_with_lora(
    pool2: RankPool, tmp_path: Path, packing: bool, lora: bool, fsdp: tuple[()] | None
) -> None:
    settings = (("remat", "attention"), ("logits", 11))
    rows = 1 if packing else 2
    run = Run(size=2, rows=rows, lora=lora, checkpointing=True, settings=settings, fsdp=fsdp)
    (losses, _, seen, ran), (others, _, same, _) = pool2.run(sft_cases.sft, run, str(tmp_path), packing)
    assert losses == others
    assert_alike(losses, sft_cases.one_process_on(run, seen), run)
    assert ran == LAYERS * run.steps * run.accumulation
    assert len(seen) == run.steps * run.accumulation
    assert ("position_ids" in seen[0]) == packing
    if packing:
        assert any((batch["position_ids"] == 0).sum() > 1 for batch in seen)
    for one, two in zip(seen, same, strict=True):
        assert all((one[key] == two[key]).all() for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
def test_sfttrainer_learns_completions_alone_where_there_are_prompts(
    pool2: RankPool, tmp_path: Path, packing: bool
) -> None:
    run = Run(size=2, rows=1 if packing else 2, settings=(("logits", 11),))
    (losses, _, seen, _), _ = pool2.run(sft_cases.sft, run, str(tmp_path), packing, True)
    assert_alike(losses, sft_cases.one_process_on(run, seen), run)
    assert all((batch["labels"] == -100).any() for batch in seen)


REFUSALS = {
    "metrics": ("UnsupportedError", "compute_metrics needs the logits"),
    "loss function": ("UnsupportedError", "compute_loss_func would see"),
    "smoothing": ("UnsupportedError", "label_smoothing_factor=0.1"),
    "noise": ("UnsupportedError", "neftune_noise_alpha=5.0"),
    "dispatch": ("UnsupportedError", "dispatch_batches=True"),
    "subclass": ("UnsupportedError", "compute_loss_func would see"),
    "rebalance": ("UnsupportedError", "batch_rebalance"),
    "cp_size": ("UnsupportedError", "split twice"),
    "sp_size": ("UnsupportedError", "split twice"),
    "other rows": ("DisagreementError", "input_ids (checksum)"),
    "empty rows": ("BatchError", "leave out empty batches"),
    "all masked": ("BatchError", "no token of the batch has a target"),
    "size not dividing": ("GroupError", "3"),
    "no size": ("ConfigError", "how many ranks share a sequence"),
    "accelerate launch --cpu": ("UnsupportedError", "accelerate does not use DeepSpeed here"),
    "open size": ("ConfigError", 'leaves "size" open'),
    "wrapped": ("UnsupportedError", "wrapped already"),
    "predict": ("UnsupportedError", "predictions need the logits"),
    "prompt tuning": ("UnsupportedError", "prompt learning"),
    "dropout in LoRA": ("UnsupportedError", "dropout above 0"),
    "unfrozen": ("UnsupportedError", "DDP wrapped the model without"),
    "loss function, later": ("UnsupportedError", "compute_loss_func would see"),
    "smoothing, later": ("UnsupportedError", "label_smoothing_factor=0.5"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_be_exact_is_refused_on_every_rank(pool2: RankPool, tmp_path: Path, what: str) -> None:
    kind, text = REFUSALS[what]
    for message in pool2.run(trainer_refusals.refused, Run(size=2, steps=2), str(tmp_path), what):
        assert message.startswith(f"{kind}: "), message
        assert text in message
        assert "Fix: " in message


@pytest.mark.parametrize(
    ("what", "texts"),
    [
        ("unequal evaluations", ("DisagreementError", "the end of an evaluation")),
        ("unequal streams", ("DisagreementError", "micro-batches of this step")),
        ("unequal batches", ("UnsupportedError", "without even_batches", "data_ranks=2")),
        ("one rank's rows are empty", ("BatchError", "at least one of each")),
    ],
)
def test_what_is_wrong_on_one_data_rank_is_said_on_all(
    pool4: RankPool, tmp_path: Path, what: str, texts: tuple[str, ...]
) -> None:
    for message in pool4.run(trainer_refusals.refused, Run(size=2, steps=20), str(tmp_path), what):
        assert all(text in message for text in texts), message


def test_a_class_that_says_its_loss_is_not_scaled_trains_as_trainer_does(pool2: RankPool, tmp_path: Path) -> None:
    """Loss and gradients were halved with two micro-batches to a step."""
    from transformers import Trainer

    run = Run(size=2, steps=2)
    assert run.accumulation > 1
    kinds = Trainer, trainer_refusals.SaysItIsNotScaled
    want, got = (pool2.run(trainer_refusals.losses, run, str(tmp_path / k.__name__), k)[0] for k in kinds)
    assert len(want) == 2
    assert got == want


def test_a_class_that_is_no_trainer_is_refused() -> None:
    with pytest.raises(VersionError, match="lacks methods of transformers' Trainer"):
        integration.ring(dict, size=2)


def test_a_class_with_a_loss_of_its_own_is_refused() -> None:
    """It would not be called; nor would that of DPO's trainer and its like."""
    from transformers import Seq2SeqTrainer, Trainer
    from trl import DPOTrainer, SFTTrainer

    class Weighted(Trainer):  # type: ignore[misc]
        def compute_loss(self, *args: object, **kwargs: object) -> object:
            return 10 * super().compute_loss(*args, **kwargs)

    class Logged(SFTTrainer):  # type: ignore[misc]
        def log(self, *args: object, **kwargs: object) -> None:
            super().log(*args, **kwargs)

    for kind in (Weighted, DPOTrainer, type("Other", (Weighted,), {})):
        with pytest.raises(UnsupportedError, match="compute_loss of its own"):
            integration.ring(kind, size=2)
    with pytest.raises(UnsupportedError, match=r"_get_num_items_in_batch of its own.*number of targets"):
        integration.ring(type("Counts", (Trainer,), {"_get_num_items_in_batch": lambda *_: 1}), size=2)
    with pytest.raises(UnsupportedError, match="prediction_step of its own"):
        integration.ring(Seq2SeqTrainer, size=2)
    for kind in (Trainer, SFTTrainer, Logged):
        assert issubclass(integration.ring(kind, size=2), kind)


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")
def test_losses_of_sfttrainer_that_are_no_mean_are_refused(tmp_path: Path) -> None:
    from trl import SFTConfig

    with pytest.raises(UnsupportedError, match="loss_type='dft'"):
        trainer_rules.check_arguments(SFTConfig(output_dir=str(tmp_path), loss_type="dft", use_cpu=True))
    trainer_rules.check_arguments(SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True))


def test_ligers_kernels_that_would_take_the_place_of_ours_are_refused(tmp_path: Path) -> None:
    """Its loss would be refused by the first forward, without a word of Liger; its MLPs would not run in tiles."""
    from transformers import TrainingArguments

    def arguments(**config: bool) -> TrainingArguments:
        given = {"use_cpu": True, "use_liger_kernel": True, "liger_kernel_config": config}
        return TrainingArguments(output_dir=str(tmp_path), **given)

    for config in ({}, {"rope": False}, {"fused_linear_cross_entropy": True}):
        with pytest.raises(UnsupportedError, match="fused cross entropy would take the mean over this rank's tokens"):
            trainer_rules.check_arguments(arguments(**config))
    trainer_rules.check_arguments(arguments(fused_linear_cross_entropy=False))
    trainer_rules.check_arguments(TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(UnsupportedError, match="Liger's MLPs"):
        trainer_rules.check_liger(arguments(fused_linear_cross_entropy=False), tiled_mlps=True)
    for name in ("swiglu", "geglu"):  # which of them a family has is not known here
        with pytest.raises(UnsupportedError, match="Liger's MLPs"):
            trainer_rules.check_liger(arguments(fused_linear_cross_entropy=False, **{name: False}), tiled_mlps=True)
    trainer_rules.check_liger(arguments(fused_linear_cross_entropy=False, swiglu=False, geglu=False), tiled_mlps=True)


def test_settings_without_a_size_are_refused() -> None:
    from transformers import Trainer

    with pytest.raises(ConfigError, match="settings without a size"):
        integration.ring(Trainer, layout="packed")
    with pytest.raises(ConfigError, match='Did you mean "layout"'):
        integration.ring(Trainer, size=2, layuot="packed")
