"""One tree of errors.

Every error says what failed, with which values, and the nearest fix, so that a user can act on the message alone. All
derive from `SeqparError`, and each also from the built-in class that fits, so that callers may catch either. Messages
are plain text and errors pickle, because they travel between ranks. Nothing is formatted for a terminal here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST_VALUE = 300
"""Characters of one value that a message shows; a thousand document lengths would hide the sentence."""


class SeqparError(Exception):
    """Base of all errors of this package.

    Args:
        what: what failed, one sentence without a full stop.
        fix: the nearest thing to do about it, a sentence with its full stop.
        **values: the values that made it fail, shown in the order given.
    """

    def __init__(self, what: str, *, fix: str = "", **values: object) -> None:
        self.what, self.fix, self.values = what, fix, values
        super().__init__(self._message())

    def _message(self) -> str:
        shown = ", ".join(f"{name}={_shorten(value)}" for name, value in self.values.items())
        return self.what + (f" [{shown}]" if shown else "") + "." + (f" Fix: {self.fix}" if self.fix else "")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.fix, {name: _shorten(v) for name, v in self.values.items()})


class ConfigError(SeqparError, ValueError):
    """A setting, a config block or a config file is wrong."""


class GroupError(SeqparError, ValueError):
    """The sizes of the groups do not fit the world, or a device mesh does not fit the sizes."""


class PlanError(SeqparError, ValueError):
    """Lengths or tensor shapes do not fit a plan."""


class BatchError(SeqparError, ValueError):
    """A batch cannot be sharded as it is: labels, padding, masks, lengths."""


class UnsupportedError(SeqparError, NotImplementedError):
    """Something that cannot be computed exactly, and is therefore refused."""


class ScheduleError(SeqparError):
    """The checker found a schedule that would compute a wrong answer, hang, or read what is not there."""


class DisagreementError(SeqparError, RuntimeError):
    """The ranks of a group do not hold the same lengths, shapes or settings."""


class TransportError(SeqparError, RuntimeError):
    """A transfer did not finish: a peer died, or did not arrive within the timeout. Over NCCL torch's watchdog ends the
    process instead."""


class VersionError(SeqparError, RuntimeError):
    """A framework lacks a name that its integration needs."""


class _Verbatim(str):
    """A value that was shown once already: it crosses a process border as its text, without new quotes."""

    def __repr__(self) -> str:
        return str(self)


def _shorten(value: object) -> _Verbatim:
    text = repr(value)
    if len(text) > LONGEST_VALUE:
        text = f"{text[: LONGEST_VALUE // 2]} ... {text[-LONGEST_VALUE // 4 :]} ({len(text)} characters)"
    return _Verbatim(text)


def _rebuild(kind: type[SeqparError], what: str, fix: str, values: dict[str, object]) -> SeqparError:
    return kind(what, fix=fix, **values)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest known word as a question, or all known words when none is near.

    >>> did_you_mean("zigzg", ["zigzag", "striped"])
    'Did you mean "zigzag"?'
    >>> did_you_mean("qqq", ["zigzag", "striped"])
    'Known: striped, zigzag.'
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(word).lower(), names, n=1, cutoff=0.6)
    return f'Did you mean "{near[0]}"?' if near else f"Known: {', '.join(names)}."
