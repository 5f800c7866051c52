"""Errors say what, which values and the fix; they pickle, and each is also the built-in error that fits."""

from __future__ import annotations

import pickle

import pytest

from seqpar_ring import errors
from seqpar_ring.errors import ConfigError, SeqparError, did_you_mean


def kinds() -> list[type[SeqparError]]:
    return [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, SeqparError)]


def test_a_message_holds_what_the_values_and_the_fix() -> None:
    error = ConfigError("size does not divide", fix="Use 2 or 4.", size=3, world=8)
    assert str(error) == "size does not divide [size=3, world=8]. Fix: Use 2 or 4."
    assert isinstance(error, ValueError)


def test_a_long_value_is_shortened() -> None:
    text = str(SeqparError("too many", fix="Less.", lengths=tuple(range(5000))))
    assert len(text) < 600
    assert "characters)" in text


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_an_error_survives_the_way_between_processes(kind: type[SeqparError]) -> None:
    error = kind("it failed", fix="Do better.", name="x", numbers=(1, 2))
    back = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(error))))
    assert type(back) is kind
    assert str(back) == str(error)


def test_did_you_mean_finds_the_nearest_or_lists_all() -> None:
    assert did_you_mean("Layuot", ["layout", "size"]) == 'Did you mean "layout"?'
    assert did_you_mean("qqq", ["layout", "size"]) == "Known: layout, size."
