"""Settings: one way in, and messages that name the key, the value and what was expected."""

from __future__ import annotations

from typing import Any

import pytest

from seqpar_ring import Settings
from seqpar_ring.errors import ConfigError


def test_only_the_size_is_needed() -> None:
    parsed = Settings.parse({"size": 4})
    assert (parsed.size, parsed.layout, parsed.schedule, parsed.block_tokens) == (4, "zigzag", "ring", "auto")


def test_every_setting_can_be_given() -> None:
    block = {
        "size": 2,
        "layout": "striped",
        "schedule": "ring",
        "heads": 1,
        "node": 2,
        "block_tokens": 512,
        "cut": "halves",
        "kv_dtype": "same",
        "dkv_dtype": "bf16",
        "hardware": "h100",
        "fabric": "nvlink4+ndr",
        "tokens": 65536,
        "backward": "kv",
        "balance_tokens": 1.02,
        "balance_area": 1.1,
        "kernel": "cpu",
        "remat": "attention",
        "offload": True,
        "logits": 1024,
        "mlp": "whole",
        "timeout": 5.0,
    }
    assert Settings.parse(block).model_dump() == block
    assert set(block) == set(Settings.model_fields)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"size": 2, "layuot": "zigzag"}, 'Did you mean "layout"?'),
        ({"layout": "zigzag"}, 'lacks "size"'),
        ({"size": "2"}, "value='2', type='str'"),
        ({"size": True}, "type='bool'"),
        ({"size": 2.0}, "type='float'"),
        ({"size": 0}, "at least 1"),
        ({"size": 2, "heads": "many"}, 'a whole number, at least 1, or "auto"'),
        ({"size": 2, "hardware": 8}, "the name of a preset or a file"),
        ({"size": 2, "tokens": 0}, "a whole number of tokens, at least 1"),
        ({"size": 2, "fabric": 1}, 'e.g. "nvlink+ndr"'),
        ({"size": 2, "block_tokens": "many"}, 'or "auto"'),
        ({"size": 2, "block_tokens": 0}, "below 1"),
        ({"size": 2, "remat": "all"}, 'Give "auto", "attention" or "none"'),
        ({"size": 2, "offload": "yes"}, "Give true or false"),
        ({"size": 2, "logits": "few"}, 'Give a whole number of tokens, "auto" or "whole"'),
        ({"size": 2, "mlp": 0}, "mlp below 1"),
        ({"size": 2, "timeout": -1.0}, "positive number of seconds"),
        ({"size": 2, "layout": 3}, "a name as a string"),
        ({"size": 6, "heads": 4}, "Give 1 or 2 or 3 or 6"),
        ({"size": 6, "node": 4}, "Give 1 or 2 or 3 or 6"),
        ({"size": 8, "heads": 4, "node": 2}, "share heads across nodes"),
        ({"size": 8, "schedule": "double_ring"}, 'Give "node"'),
        ({"size": 2, "backward": "both"}, '"auto", "kv" or "q"'),
        ({"size": 2, "balance_area": 1}, "a factor above 1"),
        ([2], "must be a mapping"),
    ],
)
def test_a_wrong_block_is_refused_with_the_key_and_the_fix(block: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.parse(block, 'the "seqpar_ring" block')
    assert words in str(caught.value)
    assert 'the "seqpar_ring" block' in str(caught.value)


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings(size=2).size = 3  # type: ignore[misc]


def test_what_is_left_to_the_planner_is_told() -> None:
    assert Settings.parse({"size": 4}).undecided == ()
    assert Settings.parse({"size": 4, "hardware": "h100"}).undecided == ("block_tokens",)
    everything = {"heads": "auto", "layout": "auto", "schedule": "auto"}
    assert Settings.parse({"size": 4, **everything}).undecided == ("heads", "layout", "schedule")
    with pytest.raises(ConfigError, match='"heads" is not decided yet'):
        _ = Settings.parse({"size": 4, **everything}).head_degree
