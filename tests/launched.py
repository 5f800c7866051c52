"""Scripts as torchrun runs them, forked from a process that has imported what they need: seconds in place of a minute.

Each rank is a process of its own in which the script is `__main__`, with the environment that torchrun sets. Some tests
of examples start the real torchrun, so that what the examples' first lines say is tried as well.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path

import torch.distributed as dist

from seqpar_ring.testing.processes import CONTEXT

GRACE = 5.0
"""Seconds the other ranks get once one has failed."""


def torchrun(
    folder: Path, world: int, script: Path, *arguments: object, timeout: float = 250, **variables: str
) -> subprocess.CompletedProcess[str]:
    """What `torchrun --nproc-per-node WORLD SCRIPT ARGUMENTS` comes to in that folder, with these variables set too."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        **os.environ,
        **variables,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # ranks meet at this store, and rank 0 makes none
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    command = [str(part) for part in (script, *arguments)]
    written = [folder / f".{name}-{os.urandom(4).hex()}" for name in ("stdout", "stderr")]
    ranks = [
        CONTEXT.Process(
            target=_rank,
            args=(folder, command, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, written),
            daemon=True,
        )
        for rank in range(world)
    ]
    for one in ranks:
        one.start()
    left, limit = list(ranks), timeout
    while left and wait([one.sentinel for one in left], limit):
        if any(one.exitcode for one in ranks):
            limit = GRACE
        left = [one for one in left if one.exitcode is None]
    for one in left:
        one.kill()
        one.join()
    code = next((one.exitcode for one in ranks if one.exitcode and one not in left), int(bool(left)))
    stdout, stderr = (path.read_text() if path.exists() else "" for path in written)
    for path in written:
        path.unlink(missing_ok=True)
    return subprocess.CompletedProcess(command, code, stdout, stderr)


def _rank(folder: Path, command: Sequence[str], environment: Mapping[str, str], written: Sequence[Path]) -> None:
    """The life of a rank: the script as `__main__`, what it prints in the files that all ranks write to."""
    for descriptor, path in zip((1, 2), written, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = [str(Path(command[0]).parent), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = list(command)
    runpy.run_path(command[0], run_name="__main__")
