"""PEFT: methods that are called exact take the step of one process; the others are refused by name, whenever added."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from hf_cases import Step, assert_refused, assert_same_step, averaged, build, errors, packed
from seqpar_ring.integrations import transformers_peft as rules
from seqpar_ring.integrations.transformers import parallelize

from seqpar_ring import SequenceParallel
from seqpar_ring.errors import UnsupportedError
from seqpar_ring.testing import run_lockstep

LINEAR: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
EXACT: dict[str, Callable[[], Any]] = {
    "LORA": lambda: peft.LoraConfig(r=4, use_dora=True, **LINEAR),
    "DELORA": lambda: peft.DeloraConfig(r=4, **LINEAR),
    "RANDLORA": lambda: peft.RandLoraConfig(r=4, **LINEAR),
    "VERA": lambda: peft.VeraConfig(r=4, **LINEAR),
    "VBLORA": lambda: peft.VBLoRAConfig(r=4, vector_length=4, num_vectors=8, **LINEAR),
    "LOHA": lambda: peft.LoHaConfig(r=4, **LINEAR),
    "LOKR": lambda: peft.LoKrConfig(r=4, **LINEAR),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, **LINEAR),
    "HRA": lambda: peft.HRAConfig(r=4, **LINEAR),
    "ROAD": lambda: peft.RoadConfig(group_size=4, **LINEAR),
    "FOURIERFT": lambda: peft.FourierFTConfig(n_frequency=10, **LINEAR),
    "WAVEFT": lambda: peft.WaveFTConfig(n_frequency=10, **LINEAR),
    "C3A": lambda: peft.C3AConfig(block_size=12, **LINEAR),
    "MISS": lambda: peft.MissConfig(r=4, **LINEAR),
    "SHIRA": lambda: peft.ShiraConfig(r=4, **LINEAR),
    "LN_TUNING": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(
        token_indices=BATCH["input_ids"][0, :3].tolist(), target_modules=["embed_tokens"]
    ),
}
BATCH = packed([13, 1, 20, 7])

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),
]


def wrapped(config: Any) -> Any:
    """A tiny model with what the config adds, moved away from where it starts, which is often nothing.

    In fp64, as RandLoRA's gradients are differences of large numbers.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(build("Llama"), config)
        for p in model.parameters():
            if p.requires_grad and p.is_floating_point():
                p.data.add_(torch.randn_like(p), alpha=0.1)
    return model.double().train()


def one_process(base: Any) -> Step:
    """Loss and gradients by plain transformers and PEFT: each document alone, the mean over all targets."""
    from trainer_cases import summed

    model = copy.deepcopy(base)
    total, count = summed(model, BATCH)
    loss = total / count
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", EXACT)
def test_a_method_takes_the_step_of_one_process(kind: str) -> None:
    base = wrapped(EXACT[kind]())

    def run(sp: SequenceParallel) -> Step:
        model = parallelize(copy.deepcopy(base), sp)
        loss = model(**BATCH).loss
        loss.backward()
        return loss.item(), averaged(sp, model)

    for found in run_lockstep(run, 2, logits=5):
        assert_same_step(found, one_process(base), 1e-5, 1e-6)


def test_every_method_that_is_called_exact_is_compared() -> None:
    assert sorted(EXACT) == sorted(rules.EXACT)


REFUSED: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "activated LoRA": (
        lambda: peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6], **LINEAR),
        ("alora_invocation_tokens=[5, 6]", "plain LoRA is exact"),
    ),
    "noise": (
        lambda: peft.LoraConfig(monteclora_config=peft.MontecloraConfig(), **LINEAR),
        ("monteclora_config draws at random",),
    ),
    "means of tokens": (lambda: peft.LoraConfig(velora_config=peft.VeloraConfig(), **LINEAR), ("velora_config",)),
    "dropout": (lambda: peft.LoraConfig(lora_dropout=0.5, **LINEAR), ("dropout above 0", "lora_dropout=0.5")),
    "dropout of ranks": (lambda: peft.LoKrConfig(r=4, rank_dropout=0.3, **LINEAR), ("rank_dropout=0.3",)),
    "dropout of modules": (
        lambda: peft.LoHaConfig(r=4, module_dropout=0.5, **LINEAR),
        ("module_dropout=0.5", "Give module_dropout=0.0"),
    ),
    "samples": (lambda: peft.PolyConfig(r=4, n_tasks=2, **LINEAR), ("not known to be exact", "peft_type='POLY'")),
    "prompts": (
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        ("prompt learning", "peft_type='PROMPT_TUNING'"),
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_exact_is_refused(what: str) -> None:
    config, texts = REFUSED[what]
    base = peft.get_peft_model(build("Llama"), config())
    assert_refused(errors(lambda sp: parallelize(copy.deepcopy(base), sp)), UnsupportedError, *texts)


@pytest.mark.parametrize("what", [what for what in REFUSED if what not in ("prompts", "samples")])
def test_what_is_not_exact_is_refused_where_peft_comes_after(what: str) -> None:
    config, texts = REFUSED[what]
    base = build("Llama")

    def act(sp: SequenceParallel) -> object:
        model = parallelize(copy.deepcopy(base), sp)
        return peft.get_peft_model(model, config())(**BATCH)

    assert_refused(errors(act), UnsupportedError, *texts)


def test_an_adapter_that_comes_after_the_first_forward_is_refused() -> None:
    base = peft.get_peft_model(build("Llama"), peft.LoraConfig(r=4, **LINEAR))

    def act(sp: SequenceParallel) -> object:
        model = parallelize(copy.deepcopy(base), sp)
        model(**BATCH)
        model.add_adapter("second", peft.LoraConfig(r=4, lora_dropout=0.5, **LINEAR))
        return model(**BATCH)

    assert_refused(errors(act), UnsupportedError, "lora_dropout=0.5")


def test_dropout_that_comes_after_is_refused() -> None:
    base = build("Llama")

    def act(sp: SequenceParallel) -> object:
        model = parallelize(copy.deepcopy(base), sp)
        model.model.layers[0].mlp.add_module("extra", torch.nn.Dropout(0.1))
        return model(**BATCH)

    assert_refused(errors(act), UnsupportedError, "dropout above 0", "model.layers.0.mlp.extra=0.1")
