"""Tiles: the number of them, the same sums, and gradients in every dtype as good as of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar_ring import SequenceParallel
from seqpar_ring.batch import IGNORED
from seqpar_ring.errors import BatchError, PlanError
from seqpar_ring.testing import run_lockstep
from seqpar_ring.testing.compare import relative_error
from seqpar_ring.tiling import in_tiles, set_tiles, summed_cross_entropy, tile_module, tiles


def test_tiles_are_as_many_as_keep_a_tile_small() -> None:
    assert tiles(2048, 32_768).number == 1
    assert tiles(2049, 32_768).number == 2
    assert tiles(32_768, 128_256).number == 63
    assert tiles(32_768, 128_256, "whole").number == 1
    assert tiles(32_768, 128_256, 1024).number == 32
    assert tiles(0, 128_256).number == 1
    assert "at most 256 a tile" in tiles(32_768, 128_256).reason


def test_more_tiles_than_rows_leave_some_empty() -> None:
    parts = in_tiles(lambda x: x * 2, 5, torch.ones(3, 2))
    assert [len(part) for part in parts] == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3, 16, 200])
def test_loss_and_gradients_are_those_of_whole_logits(dtype: torch.dtype, count: int) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 70, 24, dtype=torch.float64), nn.Linear(24, 301, bias=True).double()
    labels = torch.randint(0, 301, (2, 70)).masked_fill(torch.rand(2, 70) < 0.3, IGNORED)

    hidden, head = hidden.to(dtype).double(), head.to(dtype).double()

    def gradients(kind: torch.dtype, tiled: int | None) -> list[Tensor]:
        h, own = hidden.to(kind, copy=True).requires_grad_(), nn.Linear(24, 301).to(kind)
        own.load_state_dict({name: value.to(kind) for name, value in head.state_dict().items()})
        if tiled is None:
            wide = own(h).to(torch.float64 if kind is torch.float64 else torch.float32)
            loss = functional.cross_entropy(wide.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        else:
            loss = summed_cross_entropy(h, labels, own, tiled, IGNORED)
        loss.backward()
        return [loss.detach(), h.grad, own.weight.grad, own.bias.grad]  # type: ignore[list-item]

    truth, whole, tiled = (gradients(*how) for how in ((torch.float64, None), (dtype, None), (dtype, count)))
    for true, one, cut in zip(truth, whole, tiled, strict=True):
        error, allowed = relative_error(cut, true), relative_error(one, true)
        if dtype is torch.bfloat16:  # a weight's gradient is summed over tiles in bf16
            assert error <= allowed * 1.05 + 2**-9 * max(0, count - 1) ** 0.5
        else:
            assert error <= (1e-12 if dtype is torch.float64 else 1e-6)


def test_a_dropped_tile_would_be_noticed() -> None:
    """The seeded fault of this file."""
    torch.manual_seed(0)
    hidden, head, labels = torch.randn(1, 20, 8), nn.Linear(8, 30), torch.randint(0, 30, (1, 20))
    whole = summed_cross_entropy(hidden, labels, head, 1, IGNORED)
    dropped = summed_cross_entropy(hidden[:, :15], labels[:, :15], head, 3, IGNORED)
    assert relative_error(dropped, whole) > 0.1


def test_a_head_that_draws_at_random_draws_the_same_again_in_backward() -> None:
    """Its loss was right and its gradient that of other draws."""
    sp, labels = SequenceParallel(size=1), torch.arange(16)[None] % 11
    hidden = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 11))

    def gradient(tiled: bool) -> Tensor:
        torch.manual_seed(1)
        loss = sp.tiled_loss(hidden, head, labels, tiles=1) if tiled else sp.loss(head(hidden), labels)
        torch.rand(3)  # something else draws before backward
        return torch.autograd.grad(loss, hidden)[0]

    assert relative_error(gradient(True), gradient(False)) < 1e-6


def test_a_module_in_tiles_is_the_module() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 12), nn.SiLU(), nn.Linear(12, 6)).double()
    x = torch.randn(2, 11, 6, dtype=torch.float64, requires_grad=True)
    expected = module(x)
    grads = torch.autograd.grad(expected.square().sum(), [x, *module.parameters()])
    tile_module(module)
    tile_module(module)  # a second time changes nothing
    assert type(module).__name__ == "TiledSequential"
    for count in (1, 4, 40):
        set_tiles(module, count)
        found = module(x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        mine = torch.autograd.grad(found.square().sum(), [x, *module.parameters()])
        for a, b in zip(mine, grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_tiled_loss_of_ranks_is_the_mean_over_all_targets_and_masked_ranks_give_no_nan() -> None:
    torch.manual_seed(0)
    head, hidden = nn.Linear(8, 30).double(), torch.randn(1, 21, 8, dtype=torch.float64)
    labels = torch.randint(0, 30, (1, 21))
    labels[:, :10] = IGNORED
    expected = functional.cross_entropy(head(hidden)[0], labels[0], ignore_index=IGNORED)

    def run(sp: SequenceParallel) -> tuple[Tensor, Tensor]:
        plan = sp.plan(21)
        mine = plan.shard(hidden).requires_grad_()
        loss = sp.tiled_loss(mine, head, plan.shard(labels), tiles=3)
        (grad,) = torch.autograd.grad(loss, mine)
        return loss, plan.gather(grad) / sp.world_size

    whole = hidden.clone().requires_grad_()
    (grad,) = torch.autograd.grad(functional.cross_entropy(head(whole)[0], labels[0], ignore_index=IGNORED), whole)
    for loss, found in run_lockstep(run, 3, layout="contiguous"):  # the first rank has no target at all
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(found, grad, rtol=1e-12, atol=1e-12)


def test_bad_input_is_refused() -> None:
    def run(sp: SequenceParallel) -> None:
        hidden, labels = torch.randn(1, 6, 4), torch.full((1, 6), IGNORED)
        with pytest.raises(BatchError, match="no token of the batch has a target, on any rank"):
            sp.tiled_loss(hidden, nn.Linear(4, 9), labels, tiles=2)
        with pytest.raises(PlanError, match="hidden states and labels differ"):
            sp.tiled_loss(hidden, nn.Linear(4, 9), labels[:, 1:], tiles=2)

    run_lockstep(run, 2)
