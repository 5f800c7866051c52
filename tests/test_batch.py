"""The batch edge: documents found, labels shifted before sharding, and every bad batch refused with its values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqpar_ring import batch as edge
from seqpar_ring.errors import BatchError, SeqparError, UnsupportedError
from seqpar_ring.fingerprint import fingerprint


def ids(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) + 5


def restarting(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


def test_one_document_a_row_without_anything_said() -> None:
    reading = edge.read({"input_ids": ids(2, 7)})
    assert (reading.shape, reading.lengths, reading.labels) == ((2, 7), (7,), None)
    assert reading.position_ids.tolist() == [list(range(7))]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_documents_are_found_where_positions_restart_and_labels_never_cross_them(lengths: list[int]) -> None:
    S = sum(lengths)
    labels = ids(1, S)
    reading = edge.read({"input_ids": ids(1, S), "labels": labels, "position_ids": restarting(*lengths)})
    assert reading.lengths == tuple(lengths)
    assert reading.labels is not None
    at = 0
    for n in lengths:
        assert reading.labels[0, at : at + n].tolist() == [*labels[0, at + 1 : at + n].tolist(), -100]
        at += n


def test_lengths_may_be_given_or_read_from_cumulative_ones() -> None:
    assert edge.read({"input_ids": ids(2, 7)}, [3, 4]).lengths == (3, 4)
    cumulative = {"input_ids": ids(1, 7), "cu_seq_lens_q": torch.tensor([0, 2, 7], dtype=torch.int32)}
    assert edge.read(cumulative).lengths == (2, 5)
    assert edge.read({"input_ids": ids(1, 7), "cu_seq_lens_k": cumulative["cu_seq_lens_q"]}).lengths == (2, 5)
    for said in (torch.tensor([3, 4]), (torch.tensor(3), 4), iter([3, 4])):
        assert edge.read({"input_ids": ids(2, 7)}, said).lengths == (3, 4)  # type: ignore[arg-type]
    assert edge.read({"input_ids": ids(2, 7)}, 7).lengths == (7,)  # type: ignore[arg-type]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 3))
def test_documents_are_found_by_their_numbers(lengths: list[int], rows: int) -> None:
    """As transformers' collator gives them with return_seq_idx, where position_ids may be left out."""
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    for seq_idx in (numbers, numbers.expand(rows, -1)):
        assert edge.read({"input_ids": ids(rows, sum(lengths)), "seq_idx": seq_idx}).lengths == tuple(lengths)


@pytest.mark.parametrize("rows", [1, 2])
def test_positions_of_padding_are_not_looked_at(rows: int) -> None:
    """Tokenizers of transformers give 1 there."""
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]]).expand(rows, -1)
    batch = {"input_ids": ids(rows, 6), "attention_mask": mask, "position_ids": torch.tensor([[0, 1, 2, 3, 1, 1]])}
    assert edge.read(batch).lengths == (6,)


def test_padding_at_the_right_is_the_last_documents_and_has_no_targets() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    labels = ids(2, 6).masked_fill(mask == 0, -100)
    reading = edge.read({"input_ids": ids(2, 6), "attention_mask": mask, "labels": labels})
    assert reading.lengths == (6,)
    assert reading.labels is not None
    assert reading.labels[0].tolist() == [6, 7, 8, -100, -100, -100]
    positions = torch.tensor([[0, 1, 2, 3, 1, 1], [0, 1, 2, 3, 4, 5]])
    padded = {"input_ids": ids(2, 6), "attention_mask": mask, "position_ids": positions}
    assert edge.read(padded).lengths == (6,)


@pytest.mark.parametrize(
    ("change", "lengths", "error", "words"),
    [
        ({"labels": ids(1, 5)}, None, BatchError, "labels=(1, 5), input_ids=(2, 6)"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])}, None, BatchError, "left padding [rows=[0]]"),
        ({"attention_mask": torch.tensor([[1] * 6, [1, 1, 0, 1, 1, 1]])}, None, BatchError, "a hole [rows=[1]]"),
        ({"attention_mask": torch.ones(2, 5)}, None, BatchError, "differ in shape"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, None, UnsupportedError, "not a padding mask"),
        ({"attention_mask": torch.tensor([[1] * 6, [1] * 5 + [0]]), "labels": ids(2, 6)}, None, BatchError, "-100"),
        ({}, [3, 4], BatchError, "sum=7, tokens=6"),
        ({}, [6, 0], BatchError, "at least 1"),
        ({"position_ids": restarting(2, 4)}, [3, 3], BatchError, "says its document lengths twice"),
        ({"cu_seq_lens_q": torch.tensor([0, 6, 12])}, None, BatchError, "from cu_seq_lens_q do not fit the row"),
        ({"cu_seq_lens_q": torch.tensor([2, 5, 8])}, None, BatchError, "not a row of cumulative lengths from 0"),
        ({"cu_seq_lens_k": torch.tensor([[0, 2, 6]])}, None, BatchError, "cu_seq_lens_k is not a row"),
        ({"cu_seq_lens_q": torch.tensor([0.0, 2.0, 6.0])}, None, BatchError, "not a row"),
        ({"cu_seq_lens_q": [0, 2, 6]}, None, BatchError, "cu_seq_lens_q=[0, 2, 6]"),
        ({"cu_seq_lens_q": torch.zeros(0, dtype=torch.int32)}, None, BatchError, "not a row"),
        ({}, [2.5, 3.5], BatchError, "lengths are no whole numbers [given=[2.5, 3.5]]"),
        ({}, "33", BatchError, "lengths are no whole numbers"),
        ({}, [], BatchError, "sum=0, tokens=6"),
        ({"seq_idx": torch.tensor([[0] * 6, [0] * 3 + [1] * 3])}, None, BatchError, "one packing for all rows"),
        ({"seq_idx": torch.zeros(1, 5)}, None, BatchError, "seq_idx=(1, 5), input_ids=(2, 6)"),
        ({"seq_idx": torch.tensor([[0] * 3 + [1] * 3])}, [2, 4], BatchError, "says its document lengths twice"),
        ({"position_ids": torch.arange(6)[None] + 1}, None, BatchError, "row=0, token=0, positions=[1, 2, 3]"),
        ({"position_ids": torch.tensor([[0, 1, 2, 2, 3, 4]])}, None, BatchError, "token=3, positions=[1, 2, 2, 3, 4]"),
        ({"position_ids": torch.zeros(2, 3)}, None, BatchError, "one position for each token"),
        (
            {"position_ids": torch.cat([restarting(2, 4), restarting(3, 3)])},
            None,
            BatchError,
            "rows=[(2, 4), (3, 3)]",
        ),
        ({"input_ids": ids(6)}, None, BatchError, "at least one of each"),
        ({"input_ids": torch.zeros(0, 6)}, None, BatchError, "at least one of each"),
        ({"input_ids": None}, None, BatchError, "no input_ids"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2]] * 2)}, None, UnsupportedError, "values=[1, 2]"),
        ({"attention_mask": torch.full((2, 6), float("nan"))}, None, UnsupportedError, "other numbers than 0 and 1"),
        ({"labels": [[1] * 6] * 2}, None, BatchError, "not a tensor of whole numbers [labels='list']"),
        ({"labels": torch.zeros(2, 6)}, None, BatchError, "not a tensor of whole numbers [labels=torch.float32]"),
        ({"labels": torch.full((2, 6), -1)}, None, BatchError, "negative labels [least=-1]"),
        ({"seqpar_plan": "a plan"}, None, BatchError, "one rank's part already"),
        ({"shift_labels": ids(2, 6)}, None, BatchError, "shift_labels of a whole batch would be replaced"),
    ],
)
def test_a_bad_batch_is_refused_with_its_values(
    change: dict[str, Any], lengths: list[int] | None, error: type[SeqparError], words: str
) -> None:
    with pytest.raises(error) as caught:
        edge.read({"input_ids": ids(2, 6), **change}, lengths)
    assert words in str(caught.value)


def test_a_tensor_that_is_not_per_token_cannot_be_sharded() -> None:
    batch = {"input_ids": ids(2, 6), "pixel_values": torch.zeros(2, 3, 4, 4)}
    with pytest.raises(BatchError, match="pixel_values"):
        edge.token_keys(batch, (2, 6))
    assert edge.token_keys({"input_ids": ids(2, 6), "extra": ids(2, 6, 3), "scalar": torch.tensor(1)}, (2, 6)) == (
        "input_ids",
        "extra",
    )


@given(st.integers(0, 29), st.integers(1, 50))
def test_a_fingerprint_tells_batches_apart(at: int, change: int) -> None:
    one = ids(2, 15)
    other = one.clone()
    other.view(-1)[at] += change
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(one.clone())
    assert fingerprint(None) is None


def test_labels_of_any_whole_numbers_become_int64() -> None:
    reading = edge.read({"input_ids": ids(2, 6), "labels": ids(2, 6).to(torch.int32)})
    assert reading.labels is not None
    assert reading.labels.dtype is torch.int64


def test_numbers_between_0_and_1_are_compared_too_and_embeddings_are_not() -> None:
    """Weights of tokens, say; embeddings may differ by rounding where each rank computed them."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        weights = torch.rand(2, 6, 3, dtype=dtype)
        assert fingerprint(weights) == fingerprint(weights.clone()) != fingerprint(weights / 2)
    embedded = {"inputs_embeds": torch.rand(1, 6, 4), "loss_weights": torch.rand(1, 6)}
    compared = edge.record(embedded, edge.read(embedded))
    assert "loss_weights (checksum)" in compared
    assert "inputs_embeds (checksum)" not in compared
