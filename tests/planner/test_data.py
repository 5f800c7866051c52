"""Descriptions by name, and files of a user's own: what is not there or cannot be read is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from seqpar_ring.errors import ConfigError
from seqpar_ring.planner.data import named, names, read

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kind", ["hardware", "models"])
def test_the_names_of_a_kind_are_its_files(kind: str) -> None:
    assert names(kind) == sorted(p.stem for p in (ROOT / "configs" / kind).iterdir())
    assert all(isinstance(named(kind, name), dict) for name in names(kind))


@pytest.mark.parametrize(
    ("kind", "name", "near"),
    [("hardware", "h10", "h100"), ("hardware", "ndr2", "ndr"), ("models", "llama-3.1-9b", "llama-3.1-8b")],
)
def test_an_unknown_name_is_refused_with_the_nearest(kind: str, name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"there is no '{name}' among the .* that come with the package") as caught:
        named(kind, name)
    assert caught.value.fix == f'Did you mean "{near}"?'


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("kind: link\nbandwidth: 45.0e+9\n")
    assert read(tmp_path / "mine.yaml", "hardware") == {"kind": "link", "bandwidth": 45e9}
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    assert read(tmp_path / "config.json", "model") == {"hidden_size": 64}


def test_a_missing_file_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such hardware file") as caught:
        read(tmp_path / "gone.yaml", "hardware")
    assert "gone.yaml" in str(caught.value)


@pytest.mark.parametrize("content", [b"kind: [link\n", b"kind: link\n\tname: x\n", b"\xff\xfe\x00", b"a: b: c\n"])
def test_what_is_no_yaml_is_refused_and_the_place_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml is no YAML") as caught:
        read(tmp_path / "bad.yaml", "hardware")
    assert caught.value.fix == "See configs/hardware for examples."
    assert "\n" not in str(caught.value)
