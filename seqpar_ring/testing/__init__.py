"""Public helpers for tests: ranks as threads or as processes, dense attention as the truth, and their comparison.

`run_lockstep` is the quick way (one process, no set-up, any dtype), `run_processes` and `RankPool` the real one
(spawned processes over gloo). They are for tests of this project and of code built on it; nothing else here uses them.
"""

from seqpar_ring.testing.compare import Case, assert_matches_dense, dense_results, relative_error, ring_results
from seqpar_ring.testing.dense import dense_attention
from seqpar_ring.testing.processes import RankPool, run_processes
from seqpar_ring.testing.threads import run_lockstep, run_lockstep_groups

__all__ = [
    "Case",
    "RankPool",
    "assert_matches_dense",
    "dense_attention",
    "dense_results",
    "relative_error",
    "ring_results",
    "run_lockstep",
    "run_lockstep_groups",
    "run_processes",
]
