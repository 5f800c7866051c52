"""Lengths as people give them: "128K" tokens, documents of "8K,300" or "16x8K,300", a list or an array. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from operator import index
from typing import Any

from seqpar_ring.errors import ConfigError, SeqparError

UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
"""Lengths are counted in powers of two, as context lengths are: 128K is 131,072 tokens, 1M is 1,048,576."""

MOST_DOCUMENTS = 100_000

MOST_TOKENS = 2**31
"""Of a sequence: pairs of a query and a key are counted in 64 bits."""


def tokens(text: str, option: str = "--seq-len", least: int = 1) -> int:
    """A number of tokens from "1M", "128K", "1.5M", "1_000_000" or "131072".

    Args:
        text: as written.
        option: what it was written for, for the message.
        least: the smallest number that may be.

    Raises:
        ConfigError: it is none, no whole number, or too small.
    """
    found = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([kmg]?)", text.strip().lower())
    number = float(found[1].replace("_", "").replace(",", "")) * UNITS[found[2]] if found else -1.0
    if number < least or number != int(number):
        fix = "Write e.g. 1M (1,048,576), 128K (131,072) or 1_000_000."
        raise ConfigError(f"{option} is no number of tokens", fix=fix, value=text)
    return int(number)


def tokens_of_each(text: str, option: str = "--documents", least: int = 1) -> list[int]:
    """Lengths of documents from "8K,300", or "16x8K,300" for sixteen of 8,192 tokens and one of 300.

    Args:
        text: as written.
        option: what it was written for, for the message.
        least: tokens of the shortest.

    Raises:
        ConfigError: it is no list of lengths, or an unreasonably long one.
    """
    each: list[int] = []
    for part in text.split(","):
        times, cross, length = part.partition("x")
        count = int(times) if cross and times.strip().isdecimal() else 0 if cross else 1
        if not 1 <= count <= MOST_DOCUMENTS:
            fix = "Write lengths with commas between them, and times before an x: 5000,300 or 16x8K,300."
            raise ConfigError(f"{option} is no list of lengths", fix=fix, value=text)
        each += [tokens(length if cross else times, option, least)] * count
    return each


def of_each(lengths: Any, name: str, error: type[SeqparError]) -> tuple[int, ...]:
    """Lengths of documents given as one number, as numbers one after the other, or as an array of numpy or torch.

    Args:
        lengths: as given.
        name: of the argument, for the message.
        error: what to raise.

    Raises:
        SeqparError: of that class, where they are no whole numbers (3.0 and True are none), or more than `MOST_TOKENS`.
    """
    plain = lengths.tolist() if hasattr(lengths, "tolist") else lengths
    each = tuple(plain) if isinstance(plain, Iterable) else (plain,)
    fix = "Give the tokens of each document as plain integers."
    try:
        whole = None if any(isinstance(n, bool) for n in each) else tuple(map(index, each))
    except TypeError:
        whole = None
    if whole is None:
        raise error(f"{name} are no whole numbers", fix=fix, given=lengths)
    if sum(whole) > MOST_TOKENS:
        raise error(f"{name} are more tokens than can be counted", fix=fix, tokens=sum(whole), most=MOST_TOKENS)
    return whole
