"""Schedules as plain data: traffic, its builders, its backward, its kernel calls, its checker. Imports no torch."""

from seqpar_ring.schedule.buffers import Buffers, Place, Places, buffers
from seqpar_ring.schedule.build import Granularity, build, choose, rows_sent
from seqpar_ring.schedule.calls import Call, coalesce, tiles
from seqpar_ring.schedule.check import check
from seqpar_ring.schedule.flows import Flows, MoveColumns, UseColumns, flows, return_flows
from seqpar_ring.schedule.freight import Row
from seqpar_ring.schedule.needs import Needs
from seqpar_ring.schedule.pieces import CUTS, Pieces
from seqpar_ring.schedule.program import Posting, Stage, lives, peak, program
from seqpar_ring.schedule.route import Route
from seqpar_ring.schedule.traffic import Block, Move, Traffic, Use
from seqpar_ring.schedule.transpose import transpose
from seqpar_ring.schedule.visits import BUILDERS, Builder, Fabric, Visit
from seqpar_ring.schedule.work import Sides, Work, view_runs, work

__all__ = [
    "BUILDERS",
    "CUTS",
    "Block",
    "Buffers",
    "Builder",
    "Call",
    "Fabric",
    "Flows",
    "Granularity",
    "Move",
    "MoveColumns",
    "Needs",
    "Pieces",
    "Place",
    "Places",
    "Posting",
    "Route",
    "Row",
    "Sides",
    "Stage",
    "Traffic",
    "Use",
    "UseColumns",
    "Visit",
    "Work",
    "buffers",
    "build",
    "check",
    "choose",
    "coalesce",
    "flows",
    "lives",
    "peak",
    "program",
    "return_flows",
    "rows_sent",
    "tiles",
    "transpose",
    "view_runs",
    "work",
]
