"""Probe the ranks of a job: `torchrun --nproc-per-node 8 -m seqpar_ring.probe --out machine.yaml`, on every node.

Ranks are real devices and nodes then. Without torchrun it starts processes of this machine, as `seqpar-ring probe`
does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from seqpar_ring import groups
from seqpar_ring.errors import SeqparError
from seqpar_ring.probe import Options, probe, run, save
from seqpar_ring.probe.machine import writable


def main() -> int:
    """Read the arguments, probe, and write the file on rank 0; 2 if something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m seqpar_ring.probe", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("machine.yaml"), help="the file to write")
    parser.add_argument("--ranks", type=int, default=2, help="processes to start, where torchrun started none")
    parser.add_argument("--dtype", action="append", help="fp32 or bf16; may be repeated; both if not given")
    parser.add_argument("--node", type=int, help="ranks of a node; those of a host if not given")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter timings")
    given = parser.parse_args()
    options = Options(node=given.node, quick=given.quick)
    if given.dtype:
        options = options._replace(dtypes=tuple(dict.fromkeys(given.dtype)))
    console = Console(stderr=True)
    try:
        if dist.is_torchelastic_launched():
            _under_torchrun(given.out, options, console)
        else:
            run(given.ranks, given.out, options, console.print)
    except SeqparError as error:
        console.print(str(error), style="red", markup=False)
        return 2
    return 0


def _under_torchrun(out: Path, options: Options, console: Console) -> None:
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(dist.get_node_local_rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    try:
        mine = groups.make(dist.get_world_size())
        first = mine.global_rank == 0
        problem: SeqparError | None = None
        try:
            if first:
                writable(out)
        except SeqparError as error:
            problem = error
        mine.everyone.agree("the file to write", {}, problem)
        machine = probe(mine, options, console.print if first else None)
        if first:
            save(machine, out)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
