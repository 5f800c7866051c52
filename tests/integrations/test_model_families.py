"""Every family of the table over 2 and 3 ranks: loss and each parameter's gradient are those of one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import REFUSED, TABLE, Family
from hf_cases import (
    Batch,
    Step,
    assert_refused,
    assert_same_step,
    build,
    errors,
    one_process,
    packed,
    padded,
    step,
    turn_on,
    worst,
)
from seqpar_ring.integrations import transformers_positions as positions
from seqpar_ring.integrations.transformers import parallelize

from seqpar_ring import SequenceParallel, ring_attention
from seqpar_ring.errors import UnsupportedError
from seqpar_ring.plan import Plan
from seqpar_ring.testing import run_lockstep

GRAD = {torch.float32: 1e-5, torch.float64: 1e-12}
LOSS = {torch.float32: 1e-6, torch.float64: 1e-12}
BATCHES = {"one document": [43], "packed": [13, 1, 20, 7]}


def dtype_of(family: Family) -> torch.dtype:
    return torch.float64 if family.fp64 else torch.float32


def expected(family: Family, base: Any, batch: Batch) -> Step:
    """In one process: each document alone, or the packed row where its length sets the angles."""
    if not family.row_sets_length:
        return one_process(base, batch)
    model = copy.deepcopy(base)
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
    targets = torch.full_like(batch["labels"], -100)
    targets[:, :-1] = batch["labels"][:, 1:]
    if "position_ids" in batch:
        ends = (batch["position_ids"][0, 1:] == 0).nonzero().flatten()
        targets[:, ends] = -100
    loss = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), targets.flatten())
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def compare(name: str, lengths: list[int], world: int, layout: str = "zigzag") -> tuple[float, float, str]:
    """Errors of loss and of the worst gradient, and that one's parameter."""
    family = TABLE[name]
    base, batch = build(family.name, dtype_of(family), family.suffix, **family.changes), packed(lengths)

    def run(sp: SequenceParallel) -> Step:
        return step(sp, parallelize(copy.deepcopy(base), sp), batch)

    alone = expected(family, base, batch)
    return max((worst(found, alone) for found in run_lockstep(run, world, layout=layout)), key=lambda errors: errors[1])


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", TABLE)
def test_a_family_takes_the_step_of_one_process(name: str, batch: str, world: int) -> None:
    loss_error, grad_error, parameter = compare(name, BATCHES[batch], world)
    dtype = dtype_of(TABLE[name])
    assert loss_error <= LOSS[dtype], f"loss: {loss_error:.1e}"
    assert grad_error <= GRAD[dtype], f"gradient of {parameter}: {grad_error:.1e}"


UNUSUAL = ("StableLM", "Nemotron", "Llama, dynamic RoPE", "Phi-3, longrope", "Llama 4", "gpt-oss", "DeepSeek-V3")
"""Families for which a hook, another mask than the causal one or another width has to reach attention."""


@pytest.mark.parametrize("checkpointing", ["plain", "reentrant"])
@pytest.mark.parametrize("name", UNUSUAL)
def test_recomputed_layers_see_what_is_special_about_their_family(name: str, checkpointing: str) -> None:
    family, batch = TABLE[name], packed([43])
    base = build(family.name, **family.changes)

    def run(sp: SequenceParallel) -> Step:
        model = parallelize(copy.deepcopy(base), sp)
        turn_on(model, checkpointing)
        return step(sp, model, batch)

    for found in run_lockstep(run, 2, remat="none"):
        assert_same_step(found, one_process(base, batch), 1e-5, 1e-6)


@pytest.mark.parametrize("name", UNUSUAL)
def test_rows_padded_at_the_right_are_those_of_one_process(name: str) -> None:
    family, batch = TABLE[name], padded([31, 18], 31)
    base = build(family.name, **family.changes)
    for found in run_lockstep(lambda sp: step(sp, parallelize(copy.deepcopy(base), sp), batch), 3):
        assert_same_step(found, one_process(base, batch), 1e-5, 1e-6)


@pytest.mark.parametrize("name", [name for name, family in TABLE.items() if family.row_sets_length])
@pytest.mark.filterwarnings("ignore:What the model returns for this whole batch")
def test_a_rotary_embedding_grows_and_shrinks_from_batch_to_batch_as_in_one_process(name: str) -> None:
    """`dynamic` stays as long as the longest sequence so far, until one is shorter than the model's own length."""
    base = build(TABLE[name].name, **TABLE[name].changes).eval()
    rows = [packed([n], seed=n)["input_ids"] for n in (43, 20, 9, 31, 43)]
    alone = copy.deepcopy(base)
    expected = [alone(ids).logits for ids in rows]

    def run(sp: SequenceParallel) -> list[torch.Tensor]:
        model = parallelize(copy.deepcopy(base), sp)
        with torch.no_grad():
            return [sp.plan(ids.shape[1]).gather(model(input_ids=ids).logits) for ids in rows]

    for found in run_lockstep(run, 3, layout="contiguous"):
        for logits, right in zip(found, expected, strict=True):
            torch.testing.assert_close(logits, right, rtol=1e-5, atol=1e-5)


def masked_without(what: str) -> Any:
    """The plan of a layer without its window or its chunk."""
    masked = Plan.masked

    def changed(plan: Plan, causal: bool = True, window: int | None = None, chunk: int | None = None) -> Plan:
        return masked(plan, causal, None if what == "window" else window, None if what == "chunk" else chunk)

    return changed


def attention_without(what: str) -> Any:
    """Attention that ignores one of its arguments."""
    return lambda *args, **kwargs: ring_attention(*args, **{**kwargs, what: None})


FAULTS: dict[str, tuple[str, str, Any]] = {
    "the usual scale": ("Granite", "seqpar_ring.integrations.transformers.ring_attention", attention_without("scale")),
    "no softcap": ("Gemma 2", "seqpar_ring.integrations.transformers.ring_attention", attention_without("softcap")),
    "no window": ("Mistral", "seqpar_ring.plan.Plan.masked", masked_without("window")),
    "no windows in some layers": ("Gemma 3", "seqpar_ring.plan.Plan.masked", masked_without("window")),
    "no chunks": ("Llama 4", "seqpar_ring.plan.Plan.masked", masked_without("chunk")),
    "queries scaled by place": (
        "Llama 4",
        "seqpar_ring.integrations.transformers_positions.query_factor",
        lambda *_: None,
    ),
    "angles of a shard's length": (
        "Llama, dynamic RoPE",
        "seqpar_ring.integrations.transformers_positions._follows_length",
        lambda _: False,
    ),
    "factors of a shard's length": (
        "Phi-3, longrope",
        "seqpar_ring.integrations.transformers_positions._follows_length",
        lambda _: False,
    ),
    "no sinks": ("gpt-oss", "seqpar_ring.operator._drain", lambda out, lse, _: (out, lse)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_special_about_a_family_would_be_missed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, where, wrong = FAULTS[fault]
    monkeypatch.setattr(where, wrong)
    _, grad_error, _ = compare(name, BATCHES["packed"], 3, layout="contiguous")
    assert grad_error > 100 * GRAD[dtype_of(TABLE[name])]


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(what: str) -> None:
    refused = REFUSED[what]
    base = build(refused.name, suffix=refused.suffix, **refused.changes)
    assert_refused(
        errors(lambda sp: parallelize(copy.deepcopy(base), sp)(**packed([21]))), UnsupportedError, *refused.says
    )


def test_positions_that_a_model_makes_anew_are_missed_and_refused() -> None:
    with pytest.raises(Exception, match="positions were made anew"):
        positions._carried(torch.nn.Linear(1, 1), torch.arange(3))


def test_the_page_of_families_has_every_family_and_every_refusal() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    assert rows == ["Family", *TABLE, "Model", *REFUSED]
