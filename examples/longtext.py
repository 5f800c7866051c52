"""Real long text as training rows: documents from Python's own help or from the user's files, packed without padding.

A row has exactly `seq_len` tokens and holds one or more whole or cut documents. Its positions restart at 0 with each of
them, which is how transformers and seqpar_ring learn that tokens of different documents must not see each other. What
does not fill a last row is left out. Nothing is downloaded, and nothing here knows about ranks.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from seqpar_ring.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".txt", ".md", ".rst", ".py")
"""What is read from a folder; a file that is named is read whatever it is called."""


class Document(NamedTuple):
    """A text and where it comes from."""

    name: str
    text: str


class Row(NamedTuple):
    """One packed row: the tokens of its documents, one after the other, and how many each has."""

    input_ids: tuple[int, ...]
    lengths: tuple[int, ...]

    def batch(self) -> dict[str, Tensor]:
        """The whole row as a batch of one, int64 (1, S): input_ids, labels (not shifted), position_ids."""
        import torch  # here, so that a job can be refused without it

        input_ids = torch.tensor([self.input_ids])
        position_ids = torch.cat([torch.arange(n) for n in self.lengths])[None]
        return {"input_ids": input_ids, "labels": input_ids.clone(), "position_ids": position_ids}


def read(paths: Sequence[Path]) -> list[Document]:
    """Documents from files and folders, one a file; without paths the topics of Python's own help.

    Raises:
        ConfigError: a path that does not exist, a folder without text, a file that is no UTF-8 text, or no text at all.
    """
    if not paths:
        from pydoc_data.topics import topics

        return [Document(name, topics[name]) for name in sorted(topics)]
    found = [Document(str(file), _text(file)) for path in paths for file in _files(path)]
    documents = [one for one in found if one.text.strip()]
    if not documents:
        raise ConfigError("the texts are empty", fix="Name files with text in them.", text=[str(p) for p in paths])
    return documents


def tokenize(documents: Iterable[Document], tokenizer: Any) -> list[list[int]]:
    """Token ids of each document, closed by the tokenizer's end-of-sequence token."""
    return [
        [*tokenizer(one.text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
        for one in documents
    ]


def pack(documents: Iterable[Sequence[int]], seq_len: int, seed: int) -> list[Row]:
    """Rows of exactly `seq_len` tokens, in random order.

    A document longer than a row gives rows of its own as long as it fills them, so long-range context stays; its rest
    and the short documents follow one another, and one that meets the end of a row goes on as a document in the next.

    Args:
        documents: token ids of each document; empty ones are left out.
        seq_len: tokens of a row.
        seed: of the order of the documents and of the rows.
    """
    shuffled = [tuple(one) for one in documents]
    order = random.Random(seed)
    order.shuffle(shuffled)
    rows, open_row, room = [], list[tuple[int, ...]](), seq_len
    for document in shuffled:
        whole = len(document) // seq_len * seq_len
        rows += [Row(document[start : start + seq_len], (seq_len,)) for start in range(0, whole, seq_len)]
        rest = document[whole:]
        while rest:
            part, rest = rest[:room], rest[room:]
            open_row.append(part)
            room -= len(part)
            if not room:
                rows.append(Row(sum(open_row, ()), tuple(map(len, open_row))))
                open_row, room = [], seq_len
    order.shuffle(rows)
    return rows


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError("there is no such text", fix="Name files or folders that exist.", path=str(path))
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise ConfigError("a folder holds no text", fix=f"Put {', '.join(SUFFIXES)} in it.", path=str(path))
    return files


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError("a text cannot be read", fix="Give UTF-8 text files.", path=str(file), reason=error) from None
