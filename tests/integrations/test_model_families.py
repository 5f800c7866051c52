"""Every family of the table over 2 and 3 ranks: loss and each parameter's gradient are those of one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import REFUSED, TABLE, Family
from hf_cases import Batch, Step, build, one_process, packed, step, worst
from seqpar_ring.integrations import transformers_positions as positions
from seqpar_ring.integrations.transformers import parallelize

from seqpar_ring import SequenceParallel
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


def masked_without(what: str) -> Any:
    """The plan of a layer without its window or its chunk."""
    masked = Plan.masked

    def changed(plan: Plan, causal: bool = True, window: int | None = None, chunk: int | None = None) -> Plan:
        return masked(plan, causal, None if what == "window" else window, None if what == "chunk" else chunk)

    return changed


FAULTS: dict[str, tuple[str, str, Any]] = {
    "window": ("Mistral", "seqpar_ring.plan.Plan.masked", masked_without("window")),
    "windows in some layers": ("Gemma 3", "seqpar_ring.plan.Plan.masked", masked_without("window")),
    "chunk": ("Llama 4", "seqpar_ring.plan.Plan.masked", masked_without("chunk")),
    "query scale": (
        "Llama 4",
        "seqpar_ring.integrations.transformers_positions.query_factor",
        lambda *_: None,
    ),
    "dynamic": (
        "Llama, dynamic RoPE",
        "seqpar_ring.integrations.transformers_positions._follows_length",
        lambda _: False,
    ),
    "longrope": (
        "Phi-3, longrope",
        "seqpar_ring.integrations.transformers_positions._follows_length",
        lambda _: False,
    ),
    "sinks": ("gpt-oss", "seqpar_ring.operator._drain", lambda out, lse, _: (out, lse)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_special_about_a_family_would_be_missed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, where, wrong = FAULTS[fault]
    monkeypatch.setattr(where, wrong)
    _, grad_error, _ = compare(name, BATCHES["packed"], 3, layout="contiguous")
    assert grad_error > 100 * GRAD[dtype_of(TABLE[name])]


def test_positions_that_a_model_makes_anew_are_missed_and_refused() -> None:
    with pytest.raises(Exception, match="positions were made anew"):
        positions._carried(torch.nn.Linear(1, 1), torch.arange(3))


def test_the_page_of_families_has_every_family_and_every_refusal() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    assert rows == ["Family", *TABLE, "Model", *REFUSED]
