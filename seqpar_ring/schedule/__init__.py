"""Schedules as plain data: traffic, its builders, its backward, its kernel calls, its checker. Imports no torch."""

from seqpar_ring.schedule.build import BUILDERS, Visit, build, choose, needs, rows_sent
from seqpar_ring.schedule.calls import Call, calls, coalesce, tiles
from seqpar_ring.schedule.check import check
from seqpar_ring.schedule.program import Stage, lives, peak, program
from seqpar_ring.schedule.traffic import Block, Move, Traffic, Use
from seqpar_ring.schedule.transpose import transpose

__all__ = [
    "BUILDERS",
    "Block",
    "Call",
    "Move",
    "Stage",
    "Traffic",
    "Use",
    "Visit",
    "build",
    "calls",
    "check",
    "choose",
    "coalesce",
    "lives",
    "needs",
    "peak",
    "program",
    "rows_sent",
    "tiles",
    "transpose",
]
