"""A training loop of one's own over a ring: torch, DistributedDataParallel, and no engine.

torchrun --standalone --nproc-per-node 2 examples/plain_loop.py --config configs/plain_loop.yaml

Replace `tiny.model()` and `tiny.rows()` by your model and text; the rest stays.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tiny
import torch
import torch.distributed as dist
import typer
import yaml
from seqpar_ring.integrations.transformers import parallelize
from torch.nn.parallel import DistributedDataParallel

import seqpar_ring as sr


def main(
    config: Annotated[Path, typer.Option(help="YAML: the ring's settings and the loop's numbers.")],
) -> None:
    """Train, and print the loss of every step."""
    job = yaml.safe_load(config.read_text())
    on_gpu = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    sp = sr.SequenceParallel(**job["ring"])
    model = DistributedDataParallel(parallelize(tiny.model().to(device), sp))
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["learning_rate"])
    rows = tiny.rows(job["tokens"], job["steps"] * job["accumulation"] * sp.data_size)
    for step in range(job["steps"]):
        # The ranks of a sequence group take the same rows, each group others.
        first = (step * sp.data_size + sp.data_rank) * job["accumulation"]
        batches = [tiny.batch(row) for row in rows[first : first + job["accumulation"]]]
        targets = sp.count_targets(batches)  # of the whole step over all ranks: then the mean is a token mean
        total = 0.0
        for i, batch in enumerate(batches):
            model.require_backward_grad_sync = i == len(batches) - 1
            here = {key: value.to(device) for key, value in batch.items()}
            loss = model(**here, num_items_in_batch=targets).loss
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {total:.4f}, gradient norm {norm:.3f}, {targets} targets", flush=True)
    if dist.get_rank() == 0:
        print(sp.report())
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
