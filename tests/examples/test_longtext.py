"""Packing loses nothing but the last open row, cuts only what it must, and marks where documents begin."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from longtext import Document, Row, pack, read, tokenize

from seqpar_ring.batch import read as read_batch
from seqpar_ring.errors import ConfigError


def numbered(sizes: list[int]) -> list[list[int]]:
    """Documents whose tokens are all different: token = 1000 * document + place."""
    return [[1000 * d + i for i in range(n)] for d, n in enumerate(sizes)]


@given(st.lists(st.integers(0, 37), max_size=12), st.integers(1, 11), st.integers(0, 3))
def test_rows_are_full_and_hold_every_token_once_but_those_of_the_open_row(
    sizes: list[int], seq_len: int, seed: int
) -> None:
    rows = pack(numbered(sizes), seq_len, seed)
    assert len(rows) == sum(sizes) // seq_len
    assert all(len(row.input_ids) == sum(row.lengths) == seq_len for row in rows)
    seen = Counter(token for row in rows for token in row.input_ids)
    assert set(seen.values()) <= {1}
    assert set(seen) <= {token for document in numbered(sizes) for token in document}


@given(st.lists(st.integers(0, 37), max_size=12), st.integers(1, 11))
def test_a_piece_is_a_run_of_one_document(sizes: list[int], seq_len: int) -> None:
    for row in pack(numbered(sizes), seq_len, 0):
        start = 0
        for n in row.lengths:
            piece = row.input_ids[start : start + n]
            assert n >= 1
            assert piece == tuple(range(piece[0], piece[0] + n))
            start += n


def test_a_long_document_fills_rows_of_its_own_and_its_rest_joins_the_short_ones() -> None:
    rows = pack(numbered([25, 3]), 10, 0)
    whole = sorted(row for row in rows if row.lengths == (10,))
    assert whole == [Row(tuple(range(10)), (10,)), Row(tuple(range(10, 20)), (10,))]
    assert len(rows) == 2, "5 + 3 tokens do not fill a third row"
    mixed = [row for row in pack(numbered([25, 7]), 10, 0) if len(row.lengths) > 1]
    assert [sorted(row.lengths) for row in mixed] in ([[5, 5]], [[3, 7]])


def test_positions_restart_with_each_document_and_labels_are_not_shifted() -> None:
    batch = Row((5, 6, 7, 8, 9), (3, 1, 1)).batch()
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0]]
    assert {x.dtype for x in batch.values()} == {torch.int64}


def test_the_library_reads_the_same_documents_out_of_a_packed_row() -> None:
    for row in pack(numbered([9, 1, 14, 2, 30]), 8, 3):
        assert read_batch(row.batch()).lengths == row.lengths


def test_the_order_is_that_of_the_seed() -> None:
    documents = numbered([7, 3, 12, 5, 9, 4])
    assert pack(documents, 6, 1) == pack(documents, 6, 1)
    assert pack(documents, 6, 1) != pack(documents, 6, 2)


def test_each_topic_of_pythons_help_is_a_document() -> None:
    topics = {one.name: one.text for one in read([])}
    assert len(topics) > 50
    assert "raise" in topics["exceptions"]


def test_files_and_folders_are_read_each_file_one_document(tmp_path: Path) -> None:
    (tmp_path / "book" / "part").mkdir(parents=True)
    for name, text in [("b.md", "B"), ("part/a.txt", "Ä"), ("picture.png", "no"), ("blank.txt", " \n")]:
        (tmp_path / "book" / name).write_text(text, encoding="utf-8")
    (tmp_path / "letter.log").write_text("L")
    documents = read([tmp_path / "letter.log", tmp_path / "book"])
    assert [one.text for one in documents] == ["L", "B", "Ä"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "there is no such text.*missing.txt"),
        ("latin.txt", b"caf\xe9", "cannot be read.*latin.txt"),
        ("empty.txt", b"\n\n", "the texts are empty"),
        ("folder/picture.png", b"", "holds no text.*folder.*.txt, .md"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    path = tmp_path / name
    with pytest.raises(ConfigError, match=message):
        read([path.parent if name.startswith("folder") else path])


def test_every_document_ends_with_the_end_token() -> None:
    class Letters:
        eos_token_id = 0

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text]}

    assert tokenize([Document("x", "ab"), Document("y", "c")], Letters()) == [[97, 98, 0], [99, 0]]
