"""The doctor says that a model is the same over a ring, and names a parameter when it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hf_cases import build
from seqpar_ring.integrations import doctor
from seqpar_ring.integrations.doctor import Case

from seqpar_ring import cli
from seqpar_ring.commands import doctor as command
from seqpar_ring.environment import Finding
from seqpar_ring.errors import ConfigError, UnsupportedError

LENGTHS = (30, 1, 52)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny models."""
    folders = {}
    for family in ("Llama", "Mistral", "Falcon"):
        folder = tmp_path_factory.mktemp(family)
        others = {"num_kv_heads": 3, "new_decoder_architecture": True} if family == "Falcon" else {}
        build(family, **others).save_pretrained(folder)
        folders[family] = str(folder)
    return folders


def test_a_model_is_the_same_over_a_ring(saved: dict[str, str]) -> None:
    said: list[str] = []
    found = doctor.parity(Case(saved["Mistral"], LENGTHS, ranks=3), said.append)
    assert found.good
    assert found.loss_error < 1e-6
    assert 0 < found.worst[0].error < 1e-5
    assert said == ["one process, float32", "3 ranks"]


def test_in_bf16_it_is_as_good_as_one_process(saved: dict[str, str]) -> None:
    found = doctor.parity(Case(saved["Llama"], LENGTHS, dtype="bfloat16"))
    assert found.good
    assert found.together is not None
    assert found.allowed is not None
    assert 0 < found.together <= found.allowed < 0.1


def test_a_model_may_be_cut_and_have_random_weights(saved: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((Path(saved["Llama"]) / "config.json").read_text())
    case = Case(str(tmp_path), (40,), layers=1)
    assert not case.weights
    found = doctor.parity(case)
    assert found.good
    assert {row.parameter.split(".")[2] for row in found.worst if "layers" in row.parameter} == {"0"}


def test_a_window_that_is_dropped_is_found_and_a_parameter_named(
    saved: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The seeded fault: one process looks at all keys, the ring at a window of them."""
    alone = doctor._load

    def windowless(case: Case, dtype: Any) -> Any:
        model = alone(case, dtype)
        model.config.sliding_window = None
        for layer in model.model.layers:
            layer.self_attn.sliding_window = None
        return model

    monkeypatch.setattr(doctor, "_load", windowless)
    monkeypatch.setattr(command, "_link", lambda: Finding("ok", "gloo", "not asked"))
    assert cli.main(["doctor", "--model", saved["Mistral"], "--documents", "30,1,52"]) == 1
    assert "NOT THE SAME, worst in model.layers." in capsys.readouterr().out


def test_a_gradient_that_only_one_process_has_is_seen(saved: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring's model has the parameter frozen: of gradients that are there, all are the same."""
    load = doctor._alone

    def more(case: Case, dtype: Any) -> Any:
        loss, grads = load(case, dtype)
        grads.pop("model.norm.weight")
        return loss, grads

    monkeypatch.setattr(doctor, "_alone", more)
    found = doctor.parity(Case(saved["Llama"], (30, 12)))
    assert not found.good
    assert found.worst[0].parameter == "model.norm.weight"


def test_options_of_a_comparison_without_a_model_are_refused(capsys: Any) -> None:
    written = "--tokens 50", "--documents 3,4", "--setting layout=packed", "--layers 1", "--ranks 4", "--dtype bf16"
    for options in (text.split() for text in written):
        assert cli.main(["doctor", *options]) == 2
        assert "nothing is compared without a model" in capsys.readouterr().err


def test_lengths_and_dtypes_are_written_as_in_other_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(command, "_case", lambda model, given: asked.append(given))
    monkeypatch.setattr(command, "_findings", list)
    monkeypatch.setattr(command, "_link", lambda: Finding("ok", "gloo", "not asked"))
    for options in ([], ["--tokens", "1K", "--dtype", "bf16"], ["--documents", "2x1K,300", "--dtype", "float32"]):
        assert cli.main(["doctor", "--model", "here", *options]) == 0
    assert [given[0] for given in asked] == [(1024,), (1024,), (1024, 1024, 300)]
    assert [given[3] for given in asked] == ["float32", "bfloat16", "float32"]


def test_a_family_that_cannot_be_exact_is_refused(saved: dict[str, str]) -> None:
    with pytest.raises(UnsupportedError, match="attention interface"):
        doctor.parity(Case(saved["Falcon"], (40,)))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        doctor.parity(Case(str(tmp_path), (40,)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--setting", "layout=pakced"], 'Did you mean "packed"?'),
        (["--setting", "size=4"], "the size is the number of ranks here"),
        (["--model", "nowhere"], "no model there"),
        (["--documents", "1,x"], "no list of lengths"),
        (["--documents", "1x"], "no number of tokens"),
        (["--documents", "0x5"], "no list of lengths"),
        (["--documents", "30,20", "--tokens", "50"], "both say how long"),
        (["--dtype", "fp16"], "Give fp32 or bf16"),
    ],
)
def test_wrong_input_is_said_before_anything_is_started(
    saved: dict[str, str], options: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(command, "_findings", lambda: pytest.fail("the machine was looked at first"))
    assert cli.main(["doctor", "--model", saved["Mistral"], *options]) == 2
    assert words in capsys.readouterr().err
