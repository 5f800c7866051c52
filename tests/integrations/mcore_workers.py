"""How tests reach functions that import megatron-core: by name, in worker processes; pytest's own never imports it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any


def in_worker(module: str, name: str, **case: Any) -> Callable[..., Any]:
    """A function of a module that imports megatron-core: found by the workers, and never imported here."""
    return functools.partial(called, module, name, tuple(case.items()))


def called(module: str, name: str, case: tuple[tuple[str, Any], ...], groups: Any, *args: Any) -> Any:
    """Called in the worker. The module comes first: it may bring what has to be there before megatron-core."""
    function = getattr(importlib.import_module(module), name)
    if case:
        args = (importlib.import_module("mcore_models").Case(**dict(case)), *args)
    return function(groups, *args)
