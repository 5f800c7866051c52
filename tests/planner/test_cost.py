"""One layer's attention and a whole step, priced: what is counted, what costs nothing, what grows with what."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from seqpar_ring.config import Settings
from seqpar_ring.geometry import Mask
from seqpar_ring.planner.cost import BACK, FORWARD, Ring, exchanged, kernel_seconds
from seqpar_ring.planner.hardware import BACKWARD, Machine, Pace, machine
from seqpar_ring.planner.job import Choice, Workload
from seqpar_ring.planner.loads import Loads
from seqpar_ring.planner.model import Model, Span, load_model
from seqpar_ring.planner.step import Prices, Step, _collectives, _dense, mask_of, model_flop, step
from seqpar_ring.schedule import Row

ROW = Row(32, 8, 128, 128, 2)


def on(**update: object) -> Machine:
    found = machine("h100", "nvlink4+ndr")
    return found.model_copy(update={"device": found.device.model_copy(update=update)}) if update else found


def ring(tokens: int = 65536, mask: Mask | None = None, where: Machine | None = None, **settings: object) -> Ring:
    return Ring((tokens,), mask or Mask(), Settings.parse(settings), ROW, (where or on(), "bf16"))


def test_a_kernel_takes_its_call_its_pairs_and_its_rows() -> None:
    one = np.ones((1, 1))
    work = Loads(pairs=1000 * one, home=10 * one, cargo=100 * one, calls=2 * one)
    pace = Pace(rate=1e9, call=0.5, row=50)
    flop = 2 * 32 * (128 + 128)
    assert kernel_seconds(work, pace, ROW, 1.0)[0, 0] == pytest.approx(2 * 0.5 + flop * (1000 + 50 * 10) / 1e9)
    backward = kernel_seconds(work, pace, ROW, BACKWARD)[0, 0]
    assert backward == pytest.approx(2 * 0.5 + BACKWARD * flop * (1000 + 50 * 10) / 1e9)


def test_one_rank_takes_the_kernel_alone() -> None:
    found, pace = ring(size=1), on().device.paces("bf16").forward
    flop, tokens = 4 * 128 * 32, 65536
    kernel = pace.call + flop * (tokens * (tokens + 1) / 2 + pace.row * tokens) / pace.rate
    assert found.forward.seconds == pytest.approx(kernel, rel=1e-6)
    assert found.forward.exposed == 0
    assert not len(found.forward.flows.kv.post)


def test_all_ranks_together_compute_every_pair_once_whatever_the_schedule() -> None:
    pairs = 65536 * 65537 / 2
    for schedule, node in (("ring", None), ("direct", None), ("all_gather", None), ("double_ring", 4)):
        found = ring(size=8, schedule=schedule, node=node)
        assert found.forward.loads.pairs.sum() == pairs
        assert found.backward.loads.pairs.sum() == pairs


def test_merging_costs_what_the_memory_takes() -> None:
    fast, slow = ring(size=8, where=on(bandwidth=1e15)), ring(size=8, where=on(bandwidth=1e12))
    assert slow.forward.seconds > 1.05 * fast.forward.seconds


def test_an_unbalanced_layout_takes_as_long_as_its_busiest_rank() -> None:
    even, uneven = ring(size=8), ring(size=8, layout="contiguous")
    # Max over mean of a contiguous causal layout: (2 W - 1) / W.
    assert uneven.forward.seconds / even.forward.seconds == pytest.approx(15 / 8, rel=0.1)


def test_heads_that_are_shared_out_shorten_the_ring_and_exchange_tokens() -> None:
    plain, shared = ring(size=8), ring(size=8, heads=4)
    assert len(shared.sides.q) == 2
    assert shared.forward.around > 0
    assert plain.forward.around == 0
    assert shared.forward.flows.kv.post.max() < plain.forward.flows.kv.post.max()


def test_what_is_exchanged_around_a_ring_is_counted_tensor_by_tensor() -> None:
    where = on()
    tokens, degree, settings = 65536, 4, Settings.parse({"size": 8, "heads": 4})
    numbers = 32 * 128 * 2 + 2 * 8 * 128 * 2 + 32 * 128 * 2 + 32 * 4  # q, k and v, out, lse; bytes of a token
    sent = tokens / 8 * numbers * (degree - 1) / degree
    expected = 2 * where.inner.latency + sent / where.inner.bandwidth
    assert exchanged(FORWARD, ROW, settings, (tokens, where)) == pytest.approx(expected)
    # dout beside out, and dq, dk and dv, which are of one rank each; of 4 key heads on 8 ranks they are summed in fp32
    back = numbers + 2 * (32 * 128 * 2) + 2 * 8 * 128 * 2
    for row, degree, bytes_ in ((ROW, 4, back), (ROW._replace(kv_heads=4), 8, back + 2 * 8 * 128 * 2)):
        settings = Settings.parse({"size": 8, "heads": degree})
        sent = tokens / 8 * bytes_ * (degree - 1) / degree
        expected = 2 * where.inner.latency + sent / where.inner.bandwidth
        assert exchanged(BACK, row, settings, (tokens, where)) == pytest.approx(expected)
    assert exchanged(FORWARD, ROW, Settings.parse({"size": 8}), (tokens, where)) == 0


def test_heads_are_exchanged_over_a_link_that_a_node_shares_by_all_of_it_at_once() -> None:
    """As if each device had the whole adapter, it was, and sharing out heads the fastest where it is the slowest."""
    settings, shared = Settings.parse({"size": 8, "heads": 8}), machine("h100", "100gbe")
    alone = shared.model_copy(update={"inner": shared.inner.model_copy(update={"shared_by": 1})})
    assert shared.inner.shared_by == shared.node == 8
    latency = 2 * shared.inner.latency
    seconds = [exchanged(FORWARD, ROW, settings, (65536, where)) - latency for where in (shared, alone)]
    assert seconds[0] == pytest.approx(8 * seconds[1])


def test_queries_travel_in_backward_where_that_is_fewer_bytes() -> None:
    assert ring(size=4).travels == "kv"
    many_keys = Ring((4096,), Mask(), Settings.parse({"size": 4}), Row(8, 8, 128, 128, 2), (on(), "bf16"))
    assert many_keys.travels == "q"
    assert many_keys.backward.flows.travels == "q"


def test_a_slow_link_shows_as_exposed_time() -> None:
    slow = on().model_copy(update={"inner": on().inner.model_copy(update={"bandwidth": 1e9})})
    found = ring(size=8, where=slow)
    assert found.forward.exposed / found.forward.seconds > 0.5
    assert ring(size=8).forward.exposed / ring(size=8).forward.seconds < 0.05


@pytest.mark.parametrize(("kv_dtype", "dkv_dtype"), [("int8", "fp32"), ("same", "bf16"), ("int8", "bf16")])
def test_where_a_link_decides_fewer_bytes_are_less_time_by_as_much(kv_dtype: str, dkv_dtype: str) -> None:
    slow = on().model_copy(update={"inner": on().inner.model_copy(update={"bandwidth": 1e6, "latency": 0.0})})
    sent = ROW.sent(kv_dtype, dkv_dtype)
    plain, found = ring(size=2, where=slow), ring(size=2, where=slow, kv_dtype=kv_dtype, dkv_dtype=dkv_dtype)
    forward, backward = sent.out("kv") / ROW.out("kv"), sent.both("kv") / ROW.both("kv")
    assert found.forward.seconds / plain.forward.seconds == pytest.approx(forward, rel=0.01)
    assert found.backward.seconds / plain.backward.seconds == pytest.approx(backward, rel=0.01)


def test_a_window_is_priced_by_its_pairs() -> None:
    whole, window = ring(size=8), ring(size=8, mask=Mask(window=1024))
    assert window.forward.loads.pairs.sum() == 1024 * 1023 / 2 + (65536 - 1023) * 1024
    assert window.forward.seconds < 0.2 * whole.forward.seconds


LLAMA = load_model("llama-3.1-8b")


def priced(tokens: int, gpus: int, model: Model = LLAMA, **choice: Any) -> Step:
    settings = Settings.parse({"size": choice.pop("size", gpus)})
    return step(Prices(Workload(model, (tokens,)), on()), Choice(gpus, settings, **choice))


def test_the_flop_of_a_step_are_six_a_parameter_and_attention() -> None:
    asked = Workload(LLAMA, (8192,))
    active = LLAMA.parameters - LLAMA.vocabulary * LLAMA.hidden
    attention = 3.5 * 4 * 32 * 128 * 32 * 8192 * 8193 / 2
    assert model_flop(asked) == pytest.approx(6 * active * 8192 + attention)


def test_a_frozen_parameter_has_no_product_for_its_gradient() -> None:
    """Of six FLOP a parameter four are left, forward and for the gradient of what came in; attention stays."""
    tokens, gpus = 131072, 8
    choice = Choice(gpus, Settings.parse({"size": gpus}), checkpointing=False)
    whole, few = (Workload(LLAMA, (tokens,), trained=trained) for trained in (None, LLAMA.parameters // 100))
    active = LLAMA.parameters - LLAMA.vocabulary * LLAMA.hidden
    assert model_flop(whole) - model_flop(few) == pytest.approx(2 * 0.99 * active * tokens)
    every, frozen = (step(Prices(workload, on()), choice) for workload in (whole, few))
    assert (frozen.forward, frozen.backward, frozen.recomputed) == (every.forward, every.backward, every.recomputed)
    rate, head = on().device.products("bf16"), LLAMA.vocabulary * LLAMA.hidden
    saved = 2 * 0.99 * tokens / gpus / rate
    assert every.dense - frozen.dense == pytest.approx(saved * (active - head))
    assert frozen.head < every.head
    assert frozen.optimizer == pytest.approx(every.optimizer / 100, rel=1e-6)


def test_utilisation_is_flop_over_peak_and_time() -> None:
    found = priced(131072, 8)
    assert found.mfu == pytest.approx(found.flop / (8 * 989e12 * found.seconds))
    assert 0.3 < found.mfu < 0.62


def test_recomputing_costs_the_layers_again_and_attention_only_where_it_is_not_kept() -> None:
    prices = Prices(Workload(LLAMA, (131072,)), on())
    kept, again, none = (
        step(prices, Choice(8, Settings.parse({"size": 8, "remat": remat}), checkpointing))
        for remat, checkpointing in (("attention", True), ("none", True), ("attention", False))
    )
    assert kept.again == none.again == none.recomputed == 0
    assert again.again == pytest.approx(again.forward)
    assert kept.recomputed == pytest.approx(kept.dense / 3, rel=0.01)
    assert none.seconds < kept.seconds < again.seconds


def test_tiles_of_mlps_and_logits_cost_what_runs_again() -> None:
    prices = Prices(Workload(LLAMA, (131072,)), on())
    whole = step(prices, Choice(8, Settings.parse({"size": 8, "logits": "whole"})))
    tiled = step(prices, Choice(8, Settings.parse({"size": 8, "mlp": 8192})))
    assert tiled.head == pytest.approx(whole.head * 4 / 3)
    assert whole.recomputed < tiled.recomputed < 2 * whole.recomputed


def test_layers_with_windows_are_cheaper_and_each_kind_is_priced_once() -> None:
    half = LLAMA._replace(spans=(Span(16), Span(16, window=4096)))
    prices = Prices(Workload(half, (131072,)), on())
    choice = Choice(8, Settings.parse({"size": 8}))
    assert step(prices, choice).forward < 0.7 * step(Prices(Workload(LLAMA, (131072,)), on()), choice).forward
    assert mask_of(Span(1, window=4096), Workload(LLAMA, (4096,))) == Mask()  # as long as the window: it cuts nothing
    assert prices.ring(choice, half.spans[0]) is prices.ring(choice, half.spans[0])


def test_more_sequence_groups_train_on_more_tokens() -> None:
    one, eight = priced(131072, 8, size=8), priced(131072, 64, size=8)
    assert eight.tokens == 8 * one.tokens
    assert eight.seconds == pytest.approx(one.seconds, rel=0.05)


def test_gradients_of_many_nodes_go_over_all_links_of_a_node_at_once() -> None:
    """Rings through all ranks, one for each network card: as NCCL's bus bandwidth of many nodes, which is that of a
    node's cards together, and no more than one device's links within the node."""
    model = load_model("llama-3.1-8b")
    of_a_card, of_all = (machine("h100", f"nvlink4+{name}").outer.bandwidth for name in ("ndr", "100gbe"))
    for gpus, fabric, attained in ((8, "ndr", 360e9), (64, "ndr", 8 * of_a_card), (64, "100gbe", of_all)):
        choice = Choice(gpus, Settings(size=1), checkpointing=True, zero=3)
        sent = 3 * 2 * model.parameters * (gpus - 1) / gpus
        found = _collectives(Workload(model, (8192,)), choice, machine("h100", f"nvlink4+{fabric}"))
        assert found == pytest.approx(sent / attained)


def test_an_optimizer_on_the_host_takes_longer() -> None:
    near, far = priced(131072, 8), priced(131072, 8, offload_optimizer=True)
    assert far.optimizer > 10 * near.optimizer


@pytest.mark.parametrize(("measured", "factor"), [({}, 1.0), ({"bf16": 690e12, "fp32": 69e12}, 10.0)])
def test_products_of_matrices_are_priced_in_the_dtype_of_the_job(measured: dict[str, float], factor: float) -> None:
    """fp32 was priced with the rate of 16 bits, though a probe had measured both."""
    where = on(matmul_of=measured)
    where = on(matmul_of=measured, attention={"bf16": where.device.paces("bf16"), "fp32": where.device.paces("bf16")})
    model = load_model("llama-3.1-8b")._replace(vocabulary=1)  # what is touched there is as long in both
    half, single = (_dense(Workload(model, (65536,), dtype), where, 65536.0)[0] for dtype in ("bf16", "fp32"))
    touched = [_dense(Workload(model, (65536,), dtype), on(matmul=1e30), 65536.0)[0] for dtype in ("bf16", "fp32")]
    assert (single - touched[1]) / (half - touched[0]) == pytest.approx(factor, rel=1e-6)
    assert where.device.products("fp16") == where.device.products("bf16") == 690e12
