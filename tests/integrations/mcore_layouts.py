"""Our layouts under Megatron, beside whole steps: how a batch is cut, what a prepared model keeps, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from mcore_attention import D, G, built
from mcore_models import HEADS, Case, Dense, batch_of, config_of, model_of, mpu, parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding, RotaryEmbedding
from megatron.core.ssm.mamba_mixer import MambaMixer
from seqpar_ring.integrations.megatron import shard_batch, with_layouts
from torch import nn

from seqpar_ring.errors import SeqparError
from seqpar_ring.groups import Groups

ODD = (21, 3, 1, 40)
"""Lengths that "packed" lays out as 34 and 31 tokens on two ranks."""


def group_of(cp: int) -> Any:
    parallel(1, cp)
    return mpu.get_context_parallel_group()


def cut(_: Groups, layout: str, multiple: int) -> tuple[list[list[int]], int]:
    """Of each row that counts its index in the whole batch and its position; and how many rows there are."""
    whole = {"tokens": torch.arange(65)[None] + 7, "labels": torch.arange(65)[None], "loss_mask": torch.ones(1, 65)}
    here, params = shard_batch({**whole, "source": "a file"}, group_of(2), ODD, layout, multiple)
    assert here["source"] == "a file"
    real = here["loss_mask"][0] == 1
    assert bool((here["tokens"][0] == torch.where(real, here["labels"][0] + 7, 0)).all())
    assert bool((here["position_ids"][0][~real] == 0).all())
    assert shard_batch({}, group_of(2), ODD, layout, multiple)[1].positions.equal(params.positions)
    return torch.stack([here["labels"][0], here["position_ids"][0]], 1)[real].tolist(), params.rows


def kept(_: Groups) -> tuple[int, int]:
    """A prepared model has the names it had and answers Megatron's calls as it did: rotary embeddings and names."""
    met = names = 0
    for case in (Case(), Case(mla=True), Case(mla=True, yarn=True)):
        parallel(1, 2)
        model = model_of(case, config_of(case, 2))
        rotary = [one for one in model.modules() if isinstance(one, RotaryEmbedding)]
        before = list(model.state_dict()), list(model.sharded_state_dict()), [one(48) for one in rotary]
        assert with_layouts([with_layouts(model)])[0] is model
        assert (list(model.state_dict()), list(model.sharded_state_dict())) == before[:2]
        assert rotary == [one for one in model.modules() if isinstance(one, RotaryEmbedding)]
        for one, angles in zip(rotary, before[2], strict=True):
            torch.testing.assert_close(one(48), angles, rtol=0, atol=0)
            assert one.get_rotary_seq_len(None, None, torch.zeros(24, 1, 8), model.config, None) == 48
        met, names = met + len(rotary), names + len(before[0])
    return met, names


def told_by_any_tensor(_: Groups) -> tuple[int, list[bool]]:
    """Of a stage that reads no batch: B that another tensor tells, and what a padding_mask says of each row."""
    marks = torch.zeros(3, sum(ODD), dtype=torch.bool)
    here, params = shard_batch({"padding_mask": marks}, group_of(2), ODD)
    layer = with_layouts(built(Case()))
    q, k = torch.randn(params.rows, 3, HEADS, D), torch.randn(params.rows, 3, G, D)
    layer(q, k, k, packed_seq_params=params)
    return params.tokens, here["padding_mask"][1].tolist()


# ---------------------------------------------------------------------------------------------------- refusals


def unprepared(case: Case) -> None:
    group = group_of(2)
    here, params = shard_batch(batch_of(case)[0], group, case.lengths)
    model_of(case, config_of(case, 2))(here["tokens"], here["position_ids"], None, packed_seq_params=params)


def prepared(change: Callable[[Any], None], attention: Any = None, **case: Any) -> None:
    """A model of which something has been changed."""
    parallel(1, 2)
    model = model_of(Case(**case), config_of(Case(**case), 2), attention)
    change(model)
    with_layouts(model)


def sharded(lengths: Any = ODD, layout: str = "packed", rows: int | None = None, **changes: Any) -> None:
    batch = batch_of(Case(lengths=ODD))[0]
    shard_batch({**batch, **changes}, group_of(2), lengths, layout, 4, rows)


def other_rows(size: int = 1) -> None:
    layer, params = with_layouts(built(Case())), shard_batch({}, group_of(2), ODD)[1]
    rows = 20 if size == 1 else params.rows
    q, k = torch.randn(rows, size, HEADS, D), torch.randn(rows, size, G, D)
    layer(q, k, k, packed_seq_params=params)


def another_call() -> None:
    def get_rotary_seq_len(self: Any, tokens: int) -> int:
        return tokens

    with mock.patch.object(RotaryEmbedding, "get_rotary_seq_len", get_rotary_seq_len):
        prepared(lambda model: None)


def a_state_space_layer(model: Any) -> None:
    mixer = MambaMixer.__new__(MambaMixer)  # what it would be built with is not installed
    nn.Module.__init__(mixer)
    model.mixer = mixer


def rotary_over_images(model: Any) -> None:
    model.rotary_pos_emb = MultimodalRotaryEmbedding(D, 1.0)


def setting(name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model.config, name, value)


REFUSALS: tuple[tuple[Callable[[], object], tuple[str, ...]], ...] = (
    (lambda: unprepared(Case(lengths=ODD)), ("UnsupportedError", "only knows Megatron's", "with_layouts(model)")),
    (lambda: unprepared(Case(lengths=ODD, rope=False)), ("UnsupportedError", "with_layouts(model)", "'packed'")),
    (lambda: unprepared(Case(lengths=ODD, learned=True)), ("UnsupportedError", "with_layouts(model)", "'packed'")),
    (lambda: unprepared(Case(lengths=ODD, mla=True)), ("UnsupportedError", "with_layouts(model)", "(21, 3, 1, 40)")),
    (lambda: prepared(lambda model: None, Dense), ("UnsupportedError", "with_ring(spec)", "module='Dense'")),
    (lambda: prepared(setting("mtp_num_layers", 1)), ("UnsupportedError", "multi-token prediction", "mtp_num_layers")),
    (lambda: prepared(setting("apply_rope_fusion", True), mla=True), ("UnsupportedError", "apply_rope_fusion=False")),
    (lambda: prepared(a_state_space_layer), ("UnsupportedError", "mix tokens", "module='MambaMixer'")),
    (lambda: prepared(rotary_over_images), ("UnsupportedError", "module='MultimodalRotaryEmbedding'")),
    (another_call, ("VersionError", "megatron-core ", "get_rotary_seq_len", "lacks='packed_seq_params'")),
    (lambda: sharded((21, 3, 1, 41)), ("BatchError", "tokens_of_documents=66", "tokens=(1, 65)")),
    (lambda: sharded((21, 3, 0, 41)), ("PlanError", "at least 1", "lengths=(21, 3, 0, 41)")),
    (lambda: sharded(layout="pakced"), ("ConfigError", 'Did you mean "packed"?')),
    (lambda: sharded(rows=32), ("PlanError", "rows=32", "multiple of 4")),
    (lambda: sharded(loss_mask=None), ("BatchError", "labels without a loss_mask", "labels=(1, 65)")),
    (lambda: sharded(attention_mask=torch.ones(1, 1, 65, 65)), ("UnsupportedError", "attention_mask=(1, 1, 65, 65)")),
    (lambda: other_rows(2), ("BatchError", "batch_and_rows=(2, 34)", "expected=(1, 34)", "any tensor (B, T)")),
    (other_rows, ("BatchError", "batch_and_rows=(1, 20)", "expected=(1, 34)")),
)
"""What has no exact answer in a layout of ours, and what is said of it."""


def refusals(_: Groups) -> list[tuple[str, tuple[str, ...]]]:
    """The messages, each with what it should hold."""
    said = []
    for ask, expected in REFUSALS:
        try:
            ask()
            said.append(("nothing was raised", expected))
        except SeqparError as error:
            said.append((f"{type(error).__name__}: {error}", expected))
    return said
