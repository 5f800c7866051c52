"""Exact ring attention for sequences too long for one device.

The names below are the public ones. They are imported when first used, so that the parts without torch (geometry,
layouts, schedules, the checker) load without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqpar_ring import errors, remat, testing
    from seqpar_ring.attention import ring_attention
    from seqpar_ring.config import Settings
    from seqpar_ring.parallel import SequenceParallel
    from seqpar_ring.plan import Plan
    from seqpar_ring.transport.stats import Report

__version__ = "0.1.0"

_HOMES = {
    "Plan": "seqpar_ring.plan",
    "Report": "seqpar_ring.transport.stats",
    "SequenceParallel": "seqpar_ring.parallel",
    "Settings": "seqpar_ring.config",
    "ring_attention": "seqpar_ring.attention",
}
_MODULES = ("errors", "remat", "testing")

__all__ = [
    "Plan",
    "Report",
    "SequenceParallel",
    "Settings",
    "errors",
    "remat",
    "ring_attention",
    "testing",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"seqpar_ring.{name}")
    raise AttributeError(f"module 'seqpar_ring' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
