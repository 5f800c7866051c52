"""Agreement: do all ranks hold the same record, and is any of them in trouble? The part that needs no wire.

A rank states a claim; a digest of it is cheap to compare; when digests differ, the claims themselves are gathered and
`settle` raises the error that fits, on every rank alike, so that no rank goes on to wait for one that gave up. How the
digests and claims travel is the transport's business.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from seqpar_ring.errors import DisagreementError, SeqparError, TransportError


class Failure(NamedTuple):
    """An error as it crosses to other ranks: what it says, and the object if it can be pickled."""

    kind: str
    text: str
    pickled: bytes | None


class Claim(NamedTuple):
    """What one rank says at one point: the point's name, its fields as text, and its error, if any."""

    what: str
    fields: tuple[tuple[str, str], ...]
    failure: Failure | None


class Shown(str):
    """A value that is text already: shown in messages without another pair of quotes."""

    def __repr__(self) -> str:
        return str(self)


def claim(what: str, record: Mapping[str, object], error: Exception | None = None) -> Claim:
    """A rank's claim; values are kept as their repr, so they need not pickle."""
    fields = tuple((name, repr(value)) for name, value in record.items())
    return Claim(what, fields, None if error is None else _failure(error))


def digest(said: Claim) -> tuple[int, int, int]:
    """Three 64-bit numbers: 1 if the claim carries an error, and 128 bits of hash over its name and fields."""
    hashed = hashlib.blake2b(repr((said.what, said.fields)).encode(), digest_size=16).digest()
    high, low = (int.from_bytes(half, "big", signed=True) for half in (hashed[:8], hashed[8:]))
    return int(said.failure is not None), high, low


def settle(claims: Sequence[Claim], rank: int, error: Exception | None = None) -> None:
    """Return if all claims are equal and free of errors; else raise, on each rank that calls it with the same claims.

    Args:
        claims: of all ranks, in rank order.
        rank: the caller's.
        error: the caller's own, raised as it is.

    Raises:
        DisagreementError: the ranks are at different points, or hold different values of a field.
        Exception: the caller's own error, or that of the first rank that has one, with the rank's number in its text.
    """
    if error is not None:
        raise error
    for r, said in enumerate(claims):
        if said.failure is not None:
            raise _relayed(said.failure, r, claims[rank].what)
    _same("point in the program", {r: said.what for r, said in enumerate(claims)}, "agreement", [])
    records = [dict(said.fields) for said in claims]
    names = list(dict.fromkeys(name for record in records for name in record))
    differing = [name for name in names if len({record.get(name) for record in records}) > 1]
    for name in differing:
        values = {r: record.get(name, "(not given)") for r, record in enumerate(records)}
        _same(name, values, claims[rank].what, differing[1:])


def _same(name: str, values: Mapping[int, str], what: str, also: list[str]) -> None:
    holders: dict[str, list[int]] = {}
    for rank, value in values.items():
        holders.setdefault(value, []).append(rank)
    if len(holders) == 1:
        return
    by_rank = {f"rank {', '.join(map(str, ranks))}": Shown(value) for value, ranks in holders.items()}
    raise DisagreementError(
        f"{what}: the ranks hold different values of {name!r}",
        fix=f"Give every rank of the group the same {name}.",
        **by_rank,
        **({"also different": Shown(", ".join(also))} if also else {}),
    )


def _failure(error: Exception) -> Failure:
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:  # any class of error may refuse to pickle in its own way; its text still travels
        pickled = None
    return Failure(type(error).__name__, str(error), pickled)


def _relayed(failure: Failure, rank: int, what: str) -> Exception:
    """The error of another rank, as one of the same class that names the rank."""
    try:
        error = None if failure.pickled is None else pickle.loads(failure.pickled)
        if isinstance(error, SeqparError):
            return type(error)(f"rank {rank} failed: {error.what}", fix=error.fix, **error.values)
        if isinstance(error, Exception) and len(error.args) == 1 and isinstance(error.args[0], str):
            return type(error)(f"rank {rank} failed: {error.args[0]}")
    except Exception:  # a class that this process cannot import, or whose arguments mean something else
        pass
    return TransportError(
        f"{what}: rank {rank} failed with {failure.kind}: {failure.text}",
        fix=f"Look at rank {rank}'s error; this rank stopped because of it.",
    )
