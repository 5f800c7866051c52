"""Checkpointing with attention's result kept: the same gradients, one ring a layer, and not one byte more."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from seqpar_ring import executor, remat, ring_attention
from seqpar_ring.errors import UnsupportedError
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.testing import run_lockstep

Mode = Callable[..., Any]
"""How a layer is called: (layer, *tensors) -> its output."""


def deepspeeds(function: Any, *args: Any) -> Any:
    from deepspeed import checkpointing

    return checkpointing.checkpoint(function, *args)


MODES: dict[str, Mode] = {
    "none": lambda layer, *args: layer(*args),
    "recompute": partial(checkpoint, use_reentrant=False),
    "reentrant": partial(checkpoint, use_reentrant=True),
    "context": partial(checkpoint, use_reentrant=False, context_fn=remat.context_fn),
    "kept": lambda layer, *args: checkpoint(remat.keeping(layer), *args, use_reentrant=False),
    "kept, reentrant": lambda layer, *args: checkpoint(remat.keeping(layer), *args, use_reentrant=True),
    "kept, DeepSpeed": lambda layer, *args: deepspeeds(remat.keeping(layer), *args),
    "kept in host memory": lambda layer, *args: checkpoint(
        remat.keeping(layer, offload=True), *args, use_reentrant=False
    ),
}
KEPT = [mode for mode in MODES if "kept" in mode or mode == "context"]


def train(sp: SequenceParallel, mode: Mode) -> tuple[list[Tensor], dict[str, int]]:
    """Three layers of projection, attention and a residual; the gradients of the weights, and the bytes sent."""
    plan = sp.plan([13, 6])
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(8, 24, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]
    x = plan.shard(torch.randn(1, 19, 8, dtype=torch.float64, generator=generator)).requires_grad_()

    def layer(h: Tensor, weight: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)) for part in (h @ weight).chunk(3, -1))
        out = ring_attention(q, k, v, plan)
        assert isinstance(out, Tensor)
        return h + out.flatten(2)

    sp.reset_report()
    h = x
    for weight in weights:
        h = mode(layer, h, weight)
    h.square().sum().backward()
    grads = [sp.groups.ring.all_reduce(w.grad) for w in weights if w.grad is not None]
    return grads, dict(sp.report().bytes_sent)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_the_same_in_every_mode(mode: str) -> None:
    plain = run_lockstep(lambda sp: train(sp, MODES["none"])[0], 3)[0]
    found = run_lockstep(lambda sp: train(sp, MODES[mode])[0], 3)[0]
    assert len(found) == 3
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_ring_runs_once_a_layer_when_attention_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, runs = executor.forward, []

    def counting(*args: Any) -> Any:
        runs.append(1)
        return forward(*args)

    monkeypatch.setattr(executor, "forward", counting)
    counts = {}
    for mode, how in MODES.items():
        runs.clear()
        run_lockstep(lambda sp, how=how: train(sp, how), 2)  # type: ignore[misc]
        counts[mode] = len(runs)
    assert counts == {mode: 2 * (6 if mode in ("recompute", "reentrant") else 3) for mode in MODES}


def test_keeping_attention_sends_as_much_as_no_checkpointing() -> None:
    sent = {mode: run_lockstep(lambda sp, how=how: train(sp, how)[1], 3)[1] for mode, how in MODES.items()}  # type: ignore[misc]
    assert all(sent[mode] == sent["none"] for mode in KEPT)
    assert sent["recompute"]["kv"] > sent["none"]["kv"]


@pytest.mark.parametrize("mode", ["context", "kept"])
def test_a_second_backward_pass_is_right_and_runs_the_ring_again(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, runs = executor.forward, []
    monkeypatch.setattr(executor, "forward", lambda *args: runs.append(1) or forward(*args))

    def twice(sp: SequenceParallel) -> list[Tensor]:
        plan = sp.plan(6)
        x = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(1, 6, 2, 4)
        x = plan.shard(x).requires_grad_()
        loss = MODES[mode](lambda h: ring_attention(h, h, h, plan), x).square().sum()
        grads = []
        for again in (True, True, False):
            x.grad = None
            loss.backward(retain_graph=again)
            assert x.grad is not None
            grads.append(x.grad)
        return grads

    for first, second, third in run_lockstep(twice, 2):
        torch.testing.assert_close(second, first, rtol=0, atol=0)
        torch.testing.assert_close(third, first, rtol=0, atol=0)
    assert len(runs) == 2 * 3  # forward, and the recompute of the second and the third backward


@pytest.mark.parametrize("mode", KEPT)
def test_inference_mode_keeps_nothing_and_is_no_error(mode: str) -> None:
    """As in an evaluation of layers that always checkpoint; it ended in torch's error about version counters."""

    def rank(sp: SequenceParallel) -> bool:
        plan = sp.plan(11)
        x = plan.shard(torch.randn(1, 11, 2, 4, generator=torch.Generator().manual_seed(0))).requires_grad_()
        with torch.inference_mode():
            same = MODES[mode](lambda h: ring_attention(h, h, h, plan), x)
            return torch.equal(same, ring_attention(x, x, x, plan))

    assert run_lockstep(rank, 2) == [True, True]


def test_results_in_host_memory_come_back_in_any_order_once_each() -> None:
    shelf = remat.InHostMemory()
    made = {name: (torch.randn(3), torch.randn(2, 2)) for name in range(4)}
    for name, result in made.items():
        shelf.put(name, result)
    for name in (3, 1, 2, 0):
        found = shelf.take(name)
        assert found is not None
        for a, b in zip(found, made[name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
            assert a.data_ptr() != b.data_ptr()
        assert shelf.take(name) is None


def test_a_result_is_waited_for_before_the_next_one_starts_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else computation would wait for both copies, and the second would hide under nothing."""
    done: list[object] = []

    class Shelf(remat.InHostMemory):
        def _fetch(self, key: object) -> None:
            if self._away.pop(key, None):
                done.append(key)
                self._coming[key] = (Mock(is_cuda=True, device="cuda:0"),)

    shelf = Shelf()
    monkeypatch.setattr(remat, "_copying", lambda _: "the copies")
    shelf._away = dict.fromkeys((0, 1, 2), ("cuda:0", ()))  # type: ignore[misc]
    now = Mock(wait_stream=lambda stream: done.append(f"wait for {stream}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: now)
    for key in (2, 1):
        assert shelf.take(key) is not None
    assert done == [2, "wait for the copies", 1, "wait for the copies", 0]


@pytest.mark.parametrize("mode", ["reentrant", "kept", "context", "offloaded", "reentrant, offloaded"])
def test_a_result_that_is_changed_in_place_is_refused_and_not_changed_twice(mode: str) -> None:
    def changed(sp: SequenceParallel) -> None:
        plan = sp.plan(6)

        def layer(h: Tensor) -> Tensor:
            return ring_attention(h, h, h, plan).mul_(0.5).sin()

        x = torch.randn(1, plan.local_tokens, 2, 4, requires_grad=True)
        ways = {
            "reentrant": lambda: checkpoint(remat.keeping(layer), x, use_reentrant=True),
            "kept": lambda: checkpoint(remat.keeping(layer), x, use_reentrant=False),
            "context": lambda: checkpoint(layer, x, use_reentrant=False, context_fn=remat.context_fn),
            "offloaded": lambda: checkpoint(remat.keeping(layer, offload=True), x, use_reentrant=False),
            "reentrant, offloaded": lambda: checkpoint(remat.keeping(layer, offload=True), x, use_reentrant=True),
        }
        ways[mode]().sum().backward()

    with pytest.raises((UnsupportedError, RuntimeError), match=r"in place|inplace"):  # if reentrant, torch sees it
        run_lockstep(changed, 2)


def test_to_watch_for_changes_holds_no_memory() -> None:
    """Else results that wait in the host's memory would take the device's as well."""
    out = torch.randn(1, 5, 2, 4)
    versions = remat.Versions((out,))
    assert [x.untyped_storage().nbytes() for x in versions._counting] == [0]
    versions.expect_unchanged()
    out.view(-1)[:3].mul_(2)
    with pytest.raises(UnsupportedError, match="changed in place"):
        versions.expect_unchanged()


def test_copies_of_a_device_go_over_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator uses memory of a stream again for that stream only: with a stream a layer nothing would be."""
    made: list[object] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or len(made))
    remat._copying.cache_clear()
    device = torch.device("cuda", 0)
    assert {remat._copying(device) for _ in range(3)} == {1}
    assert remat._copying(torch.device("cuda", 1)) == 2
    remat._copying.cache_clear()


def test_a_function_that_was_wrapped_once_is_refused_in_its_second_forward() -> None:
    """It would hand out attention of the first one's inputs."""
    def twice(sp: SequenceParallel) -> None:
        plan = sp.plan(6)
        layer = remat.keeping(lambda h: ring_attention(h, h, h, plan))
        with torch.no_grad():
            layer(torch.randn(1, plan.local_tokens, 2, 4))
        layer(torch.randn(1, plan.local_tokens, 2, 4, requires_grad=True))

    with pytest.raises(UnsupportedError, match=r"second time.*Wrap it anew"):
        run_lockstep(twice, 2)


def test_a_kept_result_is_free_after_its_recompute() -> None:
    def run(sp: SequenceParallel) -> None:
        plan, held = sp.plan(6), []
        x = torch.randn(1, 6, 2, 4, requires_grad=True)
        keep = remat.InPlace.put

        def watching(shelf: remat.InPlace, name: Hashable, result: remat.Result) -> None:
            keep(shelf, name, result)
            held.extend(weakref.ref(part) for part in shelf._results[name][0])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(remat.InPlace, "put", watching)
            loss = MODES["kept"](lambda h: ring_attention(h, h, h, plan), x).sum()
        assert all(part() is not None for part in held)
        loss.backward()
        assert [part() for part in held] == [None, None]

    run_lockstep(run, 1)


def test_auto_keeps_attention_from_the_length_on_where_it_pays() -> None:
    value, reason = remat.choose("auto", 3.4)
    assert (value, reason) == ("none", "3 keys a query on average, and 512 are worth keeping")
    assert remat.choose("auto", 512.0).value == "attention"
    assert remat.choose("none", 1e6) == ("none", "asked for")


def test_what_else_a_layer_does_may_differ_in_the_recompute_as_under_zero_3() -> None:
    """ZeRO-3 gathers and frees parameters inside a layer, by what is still there: other operators, the same values."""

    def gradient(sp: SequenceParallel) -> Tensor:
        plan, runs = sp.plan([5, 6]), []
        x = plan.shard(torch.linspace(-1, 1, 11 * 8, dtype=torch.float64).reshape(1, 11, 2, 4)).requires_grad_()

        def layer(h: Tensor) -> Tensor:
            runs.append(torch.empty(0) if runs else None)
            out = ring_attention(h.sin(), h.cos(), h, plan)
            assert isinstance(out, Tensor)
            return out

        MODES["context"](layer, x).square().sum().backward()
        assert len(runs) == 2
        assert x.grad is not None
        return plan.gather(x.grad)

    found = run_lockstep(gradient, 2)[0]
    torch.testing.assert_close(found, run_lockstep(gradient, 1)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("offload", [False, True], ids=["in place", "in host memory"])
def test_calls_of_one_name_run_again_and_do_not_get_each_others_results(offload: bool) -> None:
    """As where two layers share a module: which of their calls is recomputed cannot be told."""

    def grads(sp: SequenceParallel, kept: remat.Kept | None) -> list[Tensor]:
        plan = sp.plan(12)
        whole = torch.randn(3, 1, 12, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        q, k, v = (plan.shard(x).requires_grad_() for x in whole)

        def twice(q: Tensor) -> Any:
            for _ in range(2):
                with nullcontext() if kept is None else kept.around("the module"):
                    q = ring_attention(q, k, v, plan)  # type: ignore[assignment]
            with nullcontext() if kept is None else kept.around("another"):
                return ring_attention(q, k, v, plan)

        out = checkpoint(twice, q, use_reentrant=False)
        if kept is not None:
            kept.close()
            assert kept.bytes == out.nbytes + out[..., 0].nbytes  # of the one that has a name of its own
        return list(torch.autograd.grad(out.sum(), (q, k, v)))

    plain = run_lockstep(lambda sp: grads(sp, None), 2)
    for found, truth in zip(run_lockstep(lambda sp: grads(sp, remat.Kept(offload)), 2), plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))
