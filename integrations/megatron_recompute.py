"""Recompute under Megatron that does not run the ring twice.

Megatron recomputes layers through its own `tensor_parallel.checkpoint`, which runs a function in forward without
gradients and again in backward. `keep_attention` wraps that function, once in a process: what attention returns while
the function runs for the first time is kept and handed back when it runs again, so that the recompute sends no keys and
no gradients. What is kept belongs to that one call of `checkpoint`, however many micro-batches are in flight, and goes
with it. Functions without a ring in them run as before. Transformer Engine's checkpointing, which Megatron takes under
FP8 and FP4, is not reached: there the ring runs again, which is right and slower.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any

from seqpar_ring.errors import VersionError
from seqpar_ring.remat import Kept

MARK = "_seqpar_ring_keeps"
"""On Megatron's checkpoint function, once it is wrapped."""


class _Run:
    """One run of a checkpointed function: what its calls of attention share with the other run, and their count."""

    def __init__(self, kept: Kept) -> None:
        self._kept, self._count = kept, itertools.count()

    def around(self) -> AbstractContextManager[object]:
        """A context for the next call of attention: calls come in the same order in both runs."""
        return self._kept.around(next(self._count))


_RUNNING: ContextVar[_Run | None] = ContextVar("seqpar_ring_recompute", default=None)
"""The run that this thread is in the middle of. Set and reset around the function, in whichever thread it runs."""


def keep_attention(tensor_parallel: Any, version: str) -> None:
    """Wrap the checkpoint function of `megatron.core.tensor_parallel`. Does nothing the second time.

    Raises:
        VersionError: there is none, or it takes other arguments.
    """
    theirs: Any = getattr(tensor_parallel, "checkpoint", None)
    if hasattr(theirs, MARK):
        return
    parameters = list(inspect.signature(theirs).parameters) if callable(theirs) else []
    if parameters[:2] != ["function", "distribute_saved_activations"]:
        raise VersionError(
            f"megatron-core {version} recomputes layers in another way",
            fix='Give the setting remat="none": then the ring runs again in a recompute. And please report it.',
            megatron_core=version,
            checkpoint=parameters,
        )
    tensor_parallel.checkpoint = _keeping(theirs)


def around_attention() -> AbstractContextManager[object]:
    """A context for one call of attention: kept or given back where a checkpointed function runs, else nothing."""
    run = _RUNNING.get()
    return nullcontext() if run is None else run.around()


def _keeping(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's function, with what it is given to run wrapped anew for each call."""

    @functools.wraps(checkpoint)
    def keeping(function: Callable[..., Any], distribute_saved_activations: bool, *args: Any) -> Any:
        kept = Kept()

        @functools.wraps(function)
        def run(*inputs: Any) -> Any:
            token = _RUNNING.set(_Run(kept))
            try:
                out = function(*inputs)
            finally:
                _RUNNING.reset(token)
            kept.close()
            return out

        return checkpoint(run, distribute_saved_activations, *args)

    setattr(keeping, MARK, True)
    return keeping
