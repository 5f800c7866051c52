"""What others are measured on: flash-attn's names on a CPU, layouts, and that a wrong answer never counts."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from seqpar_ring.errors import ConfigError, UnsupportedError
from seqpar_ring.parallel import SequenceParallel
from seqpar_ring.testing import RankPool, relative_error

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

OURS = ("seqpar_ring", "seqpar_ring, 4 pieces", "seqpar_ring, direct", "seqpar_ring, heads")
SHAPES = [(37, 37, True), (37, 37, False), (16, 41, True), (5, 41, False)]


def module(name: str) -> Any:
    return importlib.import_module(name)


def inputs(queries: int, keys: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    sizes = ((queries, 4), (keys, 2), (keys, 2), (queries, 4))
    q, k, v, dout = (torch.randn(1, *size, 16, generator=generator) for size in sizes)
    return *(x.requires_grad_() for x in (q, k, v)), dout


def dense(qkv: tuple[Tensor, ...], causal: bool) -> tuple[Tensor, Tensor]:
    """(out_BSHD, lse_BHS) in fp64, causal from the last row and column on."""
    q, k, v = (x.double().transpose(1, 2) for x in qkv)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * 16**-0.5
    if causal:
        rows, columns = scores.shape[2:]
        scores = scores.masked_fill(~torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


@pytest.mark.parametrize(("queries", "keys", "causal"), SHAPES)
def test_the_stand_in_answers_as_dense_attention_does(queries: int, keys: int, causal: bool) -> None:
    kernel = module("peer_kernel")
    *qkv, dout = inputs(queries, keys)
    out, lse = dense(tuple(qkv), causal)
    expected = torch.autograd.grad(out, qkv, dout.double())
    mine, mine_lse, *_ = kernel._flash_attn_forward(*(x.detach() for x in qkv), 0.0, 16**-0.5, causal)
    buffers = [torch.full_like(x, torch.nan) for x in qkv]
    kernel._flash_attn_backward(
        dout, *(x.detach() for x in qkv), mine, mine_lse, *buffers, 0.0, 16**-0.5, causal
    )
    assert relative_error(mine, out) < 2e-6
    assert relative_error(mine_lse, lse) < 2e-6
    assert max(relative_error(a, b) for a, b in zip(buffers, expected, strict=True)) < 2e-6
    with_autograd, _ = kernel.block(*qkv, causal=causal, scaling=None)
    found = torch.autograd.grad(with_autograd, qkv, dout)
    assert max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) < 2e-6


def test_the_varlen_names_answer_one_document_alike() -> None:
    kernel = module("peer_kernel")
    *qkv, dout = (x.detach() for x in inputs(37, 37))
    out, lse, *_ = kernel._flash_attn_forward(*qkv, 0.0, 0.25, True)
    boundaries = torch.tensor([0, 37], dtype=torch.int32)
    flat = [x[0] for x in qkv]
    args = (boundaries, boundaries, 37, 37, 0.0, 0.25, True)
    mine, mine_lse, *_ = kernel._flash_attn_varlen_forward(*flat, *args)
    assert torch.equal(mine, out[0])
    assert torch.equal(mine_lse, lse[0])
    expected, found = ([torch.empty_like(x) for x in qkv] for _ in range(2))
    kernel._flash_attn_backward(dout, *qkv, out, lse, *expected, 0.0, 0.25, True)
    kernel._flash_attn_varlen_backward(dout[0], *flat, mine, mine_lse, *(x[0] for x in found), *args)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_stand_in_refuses_what_it_cannot_do() -> None:
    kernel = module("peer_kernel")
    q, k, v, _ = (x.detach() for x in inputs(8, 8))
    with pytest.raises(UnsupportedError, match="plain causal and full"):
        kernel._flash_attn_forward(q, k, v, 0.0, 0.25, True, 3, 0)
    with pytest.raises(UnsupportedError, match="more queries than keys"):
        kernel._flash_attn_forward(q, k[:, :4], v[:, :4], 0.0, 0.25, True)
    two = torch.tensor([0, 3, 8], dtype=torch.int32)
    with pytest.raises(UnsupportedError, match="one document"):
        kernel._flash_attn_varlen_forward(q[0], k[0], v[0], two, two, 5, 5, 0.0, 0.25, True)


def test_flash_attn_is_there_only_while_the_stand_in_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = module("peer_kernel")
    real = ModuleType("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", real)
    with kernel.standing_in():
        interface = importlib.import_module("flash_attn.flash_attn_interface")
        assert interface._flash_attn_forward is kernel._flash_attn_forward
    assert sys.modules["flash_attn"] is real
    assert "flash_attn.flash_attn_interface" not in sys.modules


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped"])
def test_ranks_hold_every_position_once(layout: str) -> None:
    rows = module("peer_ways").rows
    held = torch.cat([rows(layout, rank, 4, 64) for rank in range(4)])
    assert held.sort().values.tolist() == list(range(64))


def test_key_heads_are_repeated_only_where_ulysses_has_too_few() -> None:
    repeats = module("peer_ways").repeats
    assert [repeats(2, world) for world in (1, 2, 4, 8)] == [1, 1, 2, 4]


def answered(sp: SequenceParallel, name: str, layout: str = "") -> dict[str, float]:
    ways, peers = module("peer_ways"), module("peers")
    way = ways.WAYS[name]
    work = peers.Work(64)
    return dict(peers.errors(way._replace(layout=layout or way.layout), peers._at(sp, work), work))


@pytest.mark.parametrize("name", [*OURS, "torch context parallel, all-to-all"])
def test_a_way_that_is_exact_is_found_so(pool2: RankPool, name: str) -> None:
    for errors in pool2.run(answered, name):
        assert set(errors) == {"out", "dq", "dk", "dv"}
        assert module("peers").inexact(errors, torch.float32) == ""


def test_a_way_with_the_wrong_tokens_is_not_timed(pool2: RankPool) -> None:
    errors = pool2.run(answered, "seqpar_ring", "contiguous")[0]
    assert "its answer is not exact: out is off by" in module("peers").inexact(errors, torch.float32)


def test_nan_is_not_exact() -> None:
    assert "dq is off by nan" in module("peers").inexact({"out": 0.0, "dq": float("nan")}, torch.float32)


def test_a_peer_that_is_not_installed_is_named(pool2: RankPool) -> None:
    peers, ways = module("peers"), module("peer_ways")
    way = ways.WAYS["seqpar_ring"]._replace(package="no-such-package-of-anyone")
    reason = peers._hindered(pool2, way, peers.Work(64))
    assert reason == "no-such-package-of-anyone is not installed (make bench does it)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": {torch.float32: ["ringmastr, zigzag"]}}, "no such way to attend.*ringmaster, zigzag"),
        ({"tokens": 1002, "worlds": (4,)}, "two even chunks a rank"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_rank_starts(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        module("peers").peers(**arguments)
