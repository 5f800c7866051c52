"""Handles: objects under numbers, for operators, which take tensors and plain values only.

An object is found under its number for as long as somebody holds it, and not kept alive by it. This is the one registry
of objects in the package. What is found so belongs to one process, and so do copies of it.
"""

from __future__ import annotations

import itertools
import weakref
from typing import NoReturn, TypeVar

from seqpar_ring.errors import PlanError

_OBJECTS: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count(1)

Self = TypeVar("Self", bound="OfThisProcess")  # typing has it from Python 3.11 on


class OfThisProcess:
    """What belongs to this process and its groups: every copy of it is itself, and it goes to no other process."""

    def __copy__(self: Self) -> Self:
        """Itself."""
        return self

    def __deepcopy__(self: Self, memo: object) -> Self:
        """Itself: a copy of a model (for an average of its weights, say) runs on the same ranks."""
        return self

    def __reduce__(self) -> NoReturn:
        """For pickle.

        Raises:
            PlanError: always.
        """
        raise PlanError(
            f"a {type(self).__name__} cannot be pickled: it belongs to this process and its groups",
            fix="Keep it out of what is saved or sent, and make it anew there, of the same settings and lengths.",
        )


def intern(thing: object) -> int:
    """A number under which the object can be found."""
    handle = next(_NUMBERS)
    _OBJECTS[handle] = thing
    return handle


def find(handle: int) -> object:
    """The object interned under this number.

    Raises:
        PlanError: nobody holds the object any more.
    """
    found = _OBJECTS.get(handle)
    if found is None:
        raise PlanError(
            "a plan is gone before the pass that needs it",
            fix="Keep the plan (or the batch that carries it) until backward is done.",
            handle=handle,
        )
    return found
