"""The sweep over all classes of transformers: what it says of a few, and that it sees what is wrong."""

from __future__ import annotations

from typing import Any

import every_model
import pytest
from test_model_families import FAULTS

from seqpar_ring.errors import DisagreementError


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("MistralForCausalLM", "exact", "gradients"),
        ("DeepseekV3ForCausalLM", "exact", "gradients"),
        ("DogeForCausalLM", "refused", "mask of its own"),
        ("NoSuchForCausalLM", "not made", "AttributeError"),
    ],
)
def test_a_class_is_exact_refused_or_not_made(name: str, kind: str, words: str) -> None:
    outcome = every_model.tried(name)
    assert outcome.kind == kind
    assert words in outcome.words


def test_a_window_that_is_missed_is_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, where, wrong = FAULTS["no window"]
    monkeypatch.setattr(where, wrong)
    assert every_model.main(["MistralForCausalLM", "LlamaForCausalLM"]) == 1
    assert "1 WRONG, 1 exact" in capsys.readouterr().out


def test_an_error_that_is_no_refusal_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise DisagreementError("ranks differ", fix="Look.")

    monkeypatch.setattr(every_model, "parallelize", fails)
    assert every_model.main(["LlamaForCausalLM"]) == 1
