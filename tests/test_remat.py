"""Checkpointing with attention's result kept: the same gradients, one ring a layer, and not one byte more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from seqpar_ring import executor, remat, ring_attention
from seqpar_ring.errors import UnsupportedError
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.testing import run_lockstep

MODES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "recompute": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "attention kept": {"use_reentrant": False, "context_fn": remat.context_fn},
}


def train(sp: SequenceParallel, mode: dict[str, Any] | None) -> tuple[list[Tensor], dict[str, int]]:
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
        h = layer(h, weight) if mode is None else checkpoint(layer, h, weight, **mode)
    h.square().sum().backward()
    grads = [sp.groups.ring.all_reduce(w.grad) for w in weights if w.grad is not None]
    return grads, dict(sp.report().bytes_sent)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_the_same_in_every_mode(mode: str) -> None:
    plain = run_lockstep(lambda sp: train(sp, None)[0], 3)[0]
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
    assert counts == {"none": 2 * 3, "recompute": 2 * 6, "reentrant": 2 * 6, "attention kept": 2 * 3}


def test_keeping_attention_sends_as_much_as_no_checkpointing() -> None:
    sent = {mode: run_lockstep(lambda sp, how=how: train(sp, how)[1], 3)[1] for mode, how in MODES.items()}  # type: ignore[misc]
    assert sent["attention kept"] == sent["none"]
    assert sent["recompute"]["kv"] > sent["none"]["kv"]


def test_a_second_backward_pass_is_refused_by_name() -> None:
    def twice(sp: SequenceParallel) -> None:
        plan = sp.plan(6)
        x = torch.randn(1, 6, 2, 4, dtype=torch.float64, requires_grad=True)
        loss = checkpoint(ring_attention, x, x, x, plan, **MODES["attention kept"]).square().sum()  # type: ignore[arg-type]
        loss.backward(retain_graph=True)
        with pytest.raises(UnsupportedError, match="Run backward once"):
            loss.backward()

    run_lockstep(twice, 1)


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

        checkpoint(layer, x, **(MODES["attention kept"] or {})).square().sum().backward()
        assert len(runs) == 2
        assert x.grad is not None
        return plan.gather(x.grad)

    found = run_lockstep(gradient, 2)[0]
    torch.testing.assert_close(found, run_lockstep(gradient, 1)[0], rtol=1e-12, atol=1e-12)
