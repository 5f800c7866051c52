"""The search: what fits, the fastest first; what does not, with the reason; what the user fixed, untouched."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from seqpar_ring.config import Settings
from seqpar_ring.errors import ConfigError
from seqpar_ring.planner.advice import advice
from seqpar_ring.planner.candidates import Degree, base, details, divisors, head_degrees, sizes
from seqpar_ring.planner.hardware import Link, Machine, machine
from seqpar_ring.planner.job import Choice, Workload
from seqpar_ring.planner.memory import memory
from seqpar_ring.planner.model import Model, load_model
from seqpar_ring.planner.search import AS_FAST, Fixed, Found, search
from seqpar_ring.planner.step import Prices, step

LLAMA = load_model("llama-3.1-8b")


def on(fabric: str = "nvlink4+ndr", **device: object) -> Machine:
    found = machine("h100", fabric)
    return found.model_copy(update={"device": found.device.model_copy(update=device)})


def found(tokens: int = 131072, gpus: int = 8, where: Machine | None = None, **fixed: Any) -> Found:
    return search(Workload(LLAMA, (tokens,)), where or on(), gpus, Fixed(**fixed))


def test_every_option_fits_and_the_fastest_stands_first() -> None:
    options = found().options
    device = on().device
    assert all(o.memory.peak <= device.memory and o.memory.host <= device.host_memory for o in options)
    least = min(o.seconds_a_token for o in options)
    assert options[0].seconds_a_token <= AS_FAST * least
    times = [max(o.seconds_a_token, AS_FAST * least) for o in options]
    assert times == sorted(times)


def test_prices_are_those_of_the_choice_itself() -> None:
    workload, where = Workload(LLAMA, (131072,)), on()
    for option in search(workload, where, 8).options[:5]:
        assert step(Prices(workload, where), option.choice) == option.step
        assert memory(workload, option.choice, where.device) == option.memory


def test_no_way_of_saving_memory_is_overlooked() -> None:
    """With the degrees and the ring fixed, all ways are tried here one by one: none that fits is faster."""
    workload, where = Workload(LLAMA, (262144,)), on()
    block = {"size": 8, "heads": 1, "layout": "zigzag", "schedule": "ring", "block_tokens": "auto"}
    best = search(workload, where, 8, Fixed(settings={**block, "block_tokens": 32768})).options[0]
    prices = Prices(workload, where)
    for checkpointing, remat, zero, away in product((False, True), ("attention", "none"), (0, 1, 2, 3), (False, True)):
        settings = Settings.parse({**block, "block_tokens": 32768, "remat": remat})
        choice = Choice(8, settings, checkpointing, zero, offload_optimizer=away)
        needed = memory(workload, choice, where.device)
        if needed.peak <= where.device.memory and needed.host <= where.device.host_memory:
            assert step(prices, choice).seconds >= 0.999 * best.step.seconds


def test_what_the_user_fixed_stays_and_the_rest_is_searched() -> None:
    options = found(settings={"size": 4, "schedule": "direct", "layout": "auto"}, zero=2, checkpointing=True).options
    assert options
    for option in options:
        s = option.choice.settings
        assert (s.size, s.schedule, option.choice.zero, option.choice.checkpointing) == (4, "direct", 2, True)
    assert len({o.choice.settings.block_tokens for o in options}) > 1


def test_what_is_refused_is_said_with_the_reason() -> None:
    refused = {one.what: one.why for one in found(1_048_576, 64).refused}
    assert "GiB at least" in refused["size 1, heads 1, zigzag, ring"]
    assert refused["size 64, heads 64"] == "32 query heads cannot be shared out among 64 ranks"
    assert "a node has 8 devices" in refused["size 16, heads 16"]


def test_what_fits_nowhere_has_no_options_and_all_the_reasons() -> None:
    nothing = found(4_000_000, 2)
    assert nothing.options == ()
    assert len(nothing.refused) >= 3


def test_less_memory_makes_it_recompute_and_then_shard_more() -> None:
    roomy, tight = found(16384, 8, on(memory=400e9)).options[0], found(16384, 8, on(memory=30e9)).options[0]
    assert not roomy.choice.checkpointing
    assert tight.choice.checkpointing or tight.choice.zero == 3 or tight.choice.settings.size > 1
    assert tight.seconds_a_token > roomy.seconds_a_token


def test_a_slow_link_between_nodes_keeps_sequences_within_nodes() -> None:
    slow = search(Workload(LLAMA, (262144,)), on("nvlink4+100gbe"), 32, Fixed(zero=1))
    assert slow.options[0].choice.settings.size <= 8


@pytest.mark.parametrize(
    ("gpus", "fixed", "words"),
    [
        (0, {}, "at least one device"),
        (8, {"settings": {"size": 3}}, "Give one of 1, 2, 4, 8"),
        (8, {"settings": {"layout": "zigzg"}}, 'Did you mean "zigzag"'),
        (8, {"settings": {"schedule": "rng"}}, 'Did you mean "ring"'),
    ],
)
def test_what_cannot_be_is_an_error_at_once(gpus: int, fixed: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        found(gpus=gpus, **fixed)


def test_without_zero_the_optimizer_stays_on_the_device() -> None:
    """Eight billion parameters with their states do not fit there, so nothing does."""
    for zero, there in ((0, False), (1, True)):
        options = found(gpus=8, zero=zero).options
        assert not any(o.choice.offload_optimizer and o.choice.zero == 0 for o in options)
        assert bool(options) is there


def test_all_ranks_would_find_the_same() -> None:
    assert found().options == found().options


class TestCandidates:
    """What could be, before it is priced."""

    def test_every_divisor_is_a_size_but_not_above_the_tokens(self) -> None:
        one_node = on().model_copy(update={"node": 12})
        found = [d.size for d in sizes(12, Workload(LLAMA, (4096,)), one_node, None)]
        assert found == divisors(12) == [1, 2, 3, 4, 6, 12]
        assert [d.why_not for d in sizes(8, Workload(LLAMA, (3,)), on(), None)] == [
            "",
            "",
            *["the sequence has 3 tokens"] * 2,
        ]

    def test_groups_that_would_be_of_two_nodes_are_left_out(self) -> None:
        """They are of ranks one after the other, and were priced as if all were like the first."""
        why = {d.size: d.why_not for d in sizes(24, Workload(LLAMA, (4096,)), on(), None)}
        assert [size for size in why if not why[size]] == [1, 2, 4, 8, 12, 24]
        assert why[3] == "a node has 8 devices, and groups of 3 one after the other would be of two nodes"
        assert [d.why_not for d in sizes(6, Workload(LLAMA, (4096,)), on(), None)] == [""] * 4  # there is one node

    def test_heads_are_shared_out_only_where_that_is_even_and_near(self) -> None:
        degrees = list(head_degrees(64, Workload(LLAMA, (4096,)), on(), None))
        assert [d.heads for d in degrees if not d.why_not] == [1, 2, 4, 8]
        odd = Model.of_attention(9, 3, 64)
        assert [d.heads for d in head_degrees(8, Workload(odd, (4096,)), on(), None) if not d.why_not] == [1]

    def test_each_candidate_is_a_setting_that_can_run(self) -> None:
        workload = Workload(LLAMA, (65536, 300, 300))
        for degree in (Degree(8, 1), Degree(16, 4), Degree(8, 8)):
            plain = base(degree, workload, on())
            assert Settings.parse(plain).undecided == ()
            for one in details(degree, workload, on()):
                if one["schedule"] != "double_ring" or plain["node"] is not None:
                    Settings.parse({**plain, **one})

    def test_a_ring_of_one_has_nothing_to_choose(self) -> None:
        assert list(details(Degree(8, 8), Workload(LLAMA, (4096,)), on())) == []


class TestAdvice:
    """What is said of it, with the numbers."""

    def said(self, tokens: int, gpus: int, where: Machine, **settings: Any) -> str:
        workload = Workload(LLAMA, (tokens,))
        return "\n".join(advice(search(workload, where, gpus, Fixed(settings=settings)), workload, where))

    def test_what_does_not_hide_is_said_with_what_it_would_take(self) -> None:
        ethernet = on("nvlink4+100gbe", node=1)
        said = self.said(16384, 8, ethernet, size=8, heads=1, schedule="ring", layout="zigzag", block_tokens=2048)
        assert "Transfers do not hide: a hop over" in said
        assert "you have 2,048" in said
        assert "exposed" in said

    def test_what_hides_is_said_too(self) -> None:
        assert "Transfers hide" in self.said(262144, 8, on(), size=8, heads=1)

    def test_where_head_sharding_wins_it_is_said_that_no_ring_runs(self) -> None:
        assert "no ring runs" in self.said(65536, 8, on(), size=8, heads=8)

    def test_where_a_plain_ring_loses_it_is_said_by_how_much(self) -> None:
        slow = Link(name="slow", source="made up", bandwidth=2e9)
        where = on().model_copy(update={"inner": on().inner, "outer": slow})
        assert "The best with a plain ring (size 16) takes" in self.said(32768, 16, where, size=16)

    def test_nothing_is_said_to_replace_checkpointing(self) -> None:
        said = self.said(131072, 8, on())
        assert "instead of checkpointing" not in said
        assert "replace" not in said
