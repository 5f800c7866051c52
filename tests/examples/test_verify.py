"""What the example compares with: the loss of documents each on its own, and a difference that hides nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import smollm2
import torch
from longtext import Row
from reference import Step, document_losses, one_process, plain
from torch import Tensor
from transformers import AutoModelForCausalLM
from verify import difference


def step(loss: float = 2.0, **gradients: list[float]) -> Step:
    return Step(loss, {name: torch.tensor(values) for name, values in gradients.items()})


def test_differences_are_relative_and_the_worst_parameter_is_named() -> None:
    found = difference(step(2.002, a=[3.0, 4.0], b=[1.0, 1.1]), step(2.0, a=[3.0, 4.005], b=[1.0, 1.0]))
    assert found.loss == pytest.approx(0.001)
    assert (found.parameter, found.parameters) == ("b", 2)
    assert found.gradient == pytest.approx(0.1 / math.sqrt(2), rel=1e-5)


@pytest.mark.parametrize(
    ("ours", "reference"),
    [
        (step(a=[1.0]), step(a=[1.0], b=[1.0])),
        (step(a=[1.0], b=[1.0]), step(a=[1.0])),
        (step(a=[math.nan]), step(a=[1.0])),
        (step(a=[0.0]), step(a=[math.nan])),
        (step(a=[math.inf]), step(a=[math.inf])),
    ],
)
def test_a_gradient_that_is_missing_or_not_finite_is_infinitely_far(ours: Step, reference: Step) -> None:
    assert difference(ours, reference).gradient == math.inf


def test_a_gradient_where_there_should_be_none_is_far() -> None:
    assert difference(step(a=[1e-3]), step(a=[0.0])).gradient > 1e6


def test_two_zero_gradients_agree() -> None:
    assert difference(step(a=[0.0]), step(a=[0.0])).gradient == 0.0


def test_the_reference_is_the_token_mean_over_documents_each_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = smollm2.prepare("tiny", 0, main=True)
    assert folder is not None
    row = Row(tuple(range(3, 16)), (7, 1, 5))
    model = plain(folder, torch.float64)
    ours = one_process(model, row)

    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    expected: Tensor = torch.zeros((), dtype=torch.float64)
    for ids in (torch.arange(3, 10)[None], torch.arange(11, 16)[None]):
        expected = expected + other(input_ids=ids, labels=ids).loss.double() * (ids.shape[1] - 1) / 10
    expected.backward()
    assert ours.loss == pytest.approx(expected.item(), rel=1e-6)
    assert difference(ours, Step(expected.item(), {n: p.grad for n, p in other.named_parameters()})).gradient < 1e-5
    with torch.no_grad():
        assert document_losses(model, row) == pytest.approx(ours.loss, rel=1e-12)
