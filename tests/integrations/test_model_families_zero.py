"""Families whose attention needs more than keywords, under ZeRO-3: its hooks on every module leave that alone."""

from __future__ import annotations

import pytest
import torch
from ds_cases import SMALL, quietly_import_deepspeed
from families import TABLE
from hf_cases import Step, assert_same_step, build, packed, turn_on
from test_model_families import expected

from seqpar_ring import SequenceParallel
from seqpar_ring.testing import RankPool

LENGTHS = [13, 1, 20, 7]


def zero3_step(sp: SequenceParallel, name: str, checkpointing: str) -> Step:
    """Loss and gradients of one step by DeepSpeed."""
    quietly_import_deepspeed(sp)
    from deepspeed.utils import safe_get_full_grad
    from seqpar_ring.integrations.deepspeed import initialize

    model = build(TABLE[name].name, **TABLE[name].changes)
    turn_on(model, checkpointing)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, **SMALL},
        "zero_allow_untested_optimizer": True,
        "seqpar_ring": {"size": 2},
    }
    engine = initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), config=config)[0]
    loss = engine(**packed(LENGTHS)).loss
    engine.backward(loss)
    gradients = {name: safe_get_full_grad(p).float().clone() for name, p in engine.module.named_parameters()}
    engine.destroy()
    return loss.item(), gradients


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("StableLM", "reentrant"), ("Nemotron", ""), ("Llama, dynamic RoPE", "plain"), ("Llama 4", "plain")],
)
def test_zero3_takes_the_step_of_one_process(pool2: RankPool, name: str, checkpointing: str) -> None:
    alone = expected(TABLE[name], build(TABLE[name].name, **TABLE[name].changes), packed(LENGTHS))
    for found in pool2.run(zero3_step, name, checkpointing):
        assert_same_step(found, alone, 1e-5, 1e-6)
