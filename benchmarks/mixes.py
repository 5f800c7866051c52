"""Document lengths as long-context pretraining has them: many short ones, a tail to the full length."""

from __future__ import annotations

import random


def heavy_tailed(tokens: int, shortest: int, seed: int) -> list[int]:
    """Lengths that sum to `tokens`: as many tokens in each octave from `shortest` to `tokens`.

    So half of the tokens are in documents below the geometric mean of the two, which is 4,096 for 128 and 131,072. The
    last document is cut to fit.
    """
    draw = random.Random(seed)
    lengths: list[int] = []
    left = tokens
    while left:
        lengths.append(min(left, _length(shortest, tokens, draw)))
        left -= lengths[-1]
    draw.shuffle(lengths)
    return lengths


def documents(count: int, shortest: int, longest: int, seed: int) -> list[int]:
    """So many lengths from the same histogram, whatever they sum to."""
    draw = random.Random(seed)
    return [_length(shortest, longest, draw) for _ in range(count)]


def half_below(length: int, tokens: int, shortest: int, batches: int) -> list[list[int]]:
    """So many heavy-tailed batches of which each has half of its tokens, give or take a tenth, in shorter documents."""
    found: list[list[int]] = []
    seed = 0
    while len(found) < batches:
        lengths = heavy_tailed(tokens, shortest, seed)
        found += [lengths] if abs(share_below(lengths, length) - 0.5) <= 0.1 else []
        seed += 1
    return found


def _length(shortest: int, longest: int, draw: random.Random) -> int:
    """The number of documents of length n falls as n^-2 (so their tokens as n^-1): the inverse of that distribution."""
    return max(1, int(1 / (1 / shortest - draw.random() * (1 / shortest - 1 / longest))))


def share_below(lengths: list[int], length: int) -> float:
    """The share of all tokens that is in documents shorter than `length`."""
    return sum(n for n in lengths if n < length) / sum(lengths)
