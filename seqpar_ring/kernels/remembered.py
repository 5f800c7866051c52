"""What is made of a call, kept for the next time: calls are those of plans, and every layer and step makes them again.

A call is told by its identity and not by its numbers: to hash those of a thousand documents takes the host up to 30 us,
in every call of every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import Lock
from typing import Concatenate, ParamSpec, TypeVar

import torch

from seqpar_ring.schedule import Call

Made = TypeVar("Made")
Rest = ParamSpec("Rest")


def remembered(
    make: Callable[Concatenate[Call, Rest], Made], size: int = 1024
) -> Callable[Concatenate[Call, Rest], Made]:
    """The function, which makes nothing twice: what it made of the last `size` calls is kept, and with it the calls.

    What is asked for while a CUDA graph is captured is kept for good: the graph holds nothing but addresses.

    Args:
        make: a pure function of a call and of hashable things.
        size: how much is kept: some plans' calls.
    """
    known: dict[tuple[Hashable, ...], tuple[Call, Made]] = {}
    captured: dict[tuple[Hashable, ...], tuple[Call, Made]] = {}
    changing = Lock()

    def found(call: Call, /, *rest: Rest.args, **named: Rest.kwargs) -> Made:
        key = id(call), *rest, *named.items()  # nothing else has this id, as long as the call is held here
        entry = known.get(key)
        if entry is None:
            entry = call, make(call, *rest, **named)
            with changing:
                known[key] = entry
                if len(known) > size:
                    del known[next(iter(known))]
        if capturing():
            captured[key] = entry
        return entry[1]

    return found


def capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
