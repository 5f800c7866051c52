"""The probe: measures the machine it runs on and writes it down as the planner reads it.

What it measures is what a ring of these ranks will see: all ranks compute at once, transfers go through the library's
own transport. Every part is collective over the ring. The result is a `Machine` with the raw timings beside the few
numbers that were made from them. It prices nothing and chooses nothing.
"""

from __future__ import annotations

from seqpar_ring.probe.machine import Options, probe, run, save

__all__ = ["Options", "probe", "run", "save"]
