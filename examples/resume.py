"""Stop at one size, go on at another: the loss goes on as if nothing had happened.

torchrun --standalone --nproc-per-node 4 examples/resume.py --config configs/resume.json --size 4 --until 4
torchrun --standalone --nproc-per-node 2 examples/resume.py --config configs/resume.json --size 2 --until 8

The rows of a step stay the same: with fewer ranks a sequence and more data ranks, each of these takes fewer of them.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Annotated

import tiny
import torch.distributed as dist
import typer
from seqpar_ring.integrations import deepspeed_checkpoints as checkpoints
from seqpar_ring.integrations.deepspeed import BLOCK, initialize

ROWS = 4
"""Rows of an optimizer step, whatever the number of ranks."""


def main(
    config: Annotated[Path, typer.Option(help='DeepSpeed config with a "seqpar_ring" block.')],
    size: Annotated[int, typer.Option(help="Ranks that share a sequence.", min=1)],
    until: Annotated[int, typer.Option(help="Train until this optimizer step, then save.", min=1)],
    folder: Annotated[Path, typer.Option(help="Where checkpoints are.")] = Path("runs/resume"),
    tokens: Annotated[int, typer.Option(help="Tokens of a row.", min=2)] = 512,
) -> None:
    """Load the newest checkpoint if there is one, train, and save."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    asked = json.loads(config.read_text())
    asked[BLOCK]["size"] = size
    world = int(os.environ["WORLD_SIZE"])
    if ROWS * size % world:
        raise typer.BadParameter(f"{world} ranks, {size} a sequence, cannot share out the {ROWS} rows of a step evenly")
    asked["gradient_accumulation_steps"] = ROWS * size // world
    model = tiny.model()
    engine, *_ = initialize(model=model, model_parameters=list(model.parameters()), config=asked)
    sp = engine.seqpar_ring
    first = 0
    if (folder / "latest").exists():
        first = checkpoints.load(engine, folder)["steps"]
    rows, accumulation = tiny.rows(tokens, ROWS * until), engine.gradient_accumulation_steps()
    for step in range(first, until):
        mine = rows[step * ROWS + sp.data_rank * accumulation :][:accumulation]
        batches = [tiny.batch(row) for row in mine]
        targets, total = sp.count_targets(batches), 0.0
        for batch in batches:
            here = {key: value.to(engine.device) for key, value in batch.items()}
            loss = engine(**here, num_items_in_batch=targets).loss * accumulation  # DeepSpeed divides by it
            engine.backward(loss)
            engine.step()
            total += loss.item() / accumulation
        if dist.get_rank() == 0:
            print(f"step {step + 1} of {sp.world_size} ranks, {size} a sequence: loss {total:.6f}", flush=True)
    checkpoints.save(engine, folder, client_state={"steps": until})
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
