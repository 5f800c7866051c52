"""Handles: objects under numbers, for operators, which take tensors and plain values only.

An object is found under its number for as long as somebody holds it, and not kept alive by it. This is the one registry
of objects in the package.
"""

from __future__ import annotations

import itertools
import weakref

from seqpar_ring.errors import PlanError

_OBJECTS: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count(1)


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
