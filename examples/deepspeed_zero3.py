"""DeepSpeed over a ring: the block "seqpar_ring" in its config is all there is to turn on.

torchrun --standalone --nproc-per-node 2 examples/deepspeed_zero3.py --config configs/deepspeed_zero3.json
or: deepspeed --num_accelerators 2 examples/deepspeed_zero3.py --config configs/deepspeed_zero3.json

Replace `tiny.model()` and `tiny.rows()` by your model and text; the rest stays.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated

import tiny
import torch.distributed as dist
import typer
from seqpar_ring.integrations.deepspeed import initialize


def main(
    config: Annotated[Path, typer.Option(help='DeepSpeed config with a "seqpar_ring" block.')],
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 6,
    tokens: Annotated[int, typer.Option(help="Tokens of a row.", min=2)] = 1024,
    local_rank: Annotated[int, typer.Option("--local_rank", help="Given by the deepspeed launcher.")] = 0,
) -> None:
    """Train, and print the loss of every step."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    model = tiny.model()
    engine, *_ = initialize(
        model=model, model_parameters=list(model.parameters()), config=json.loads(config.read_text())
    )
    sp = engine.seqpar_ring
    accumulation = engine.gradient_accumulation_steps()
    rows = tiny.rows(tokens, steps * accumulation * sp.data_size)
    for step in range(steps):
        first = (step * sp.data_size + sp.data_rank) * accumulation
        total = 0.0
        for row in rows[first : first + accumulation]:
            batch = {key: value.to(engine.device) for key, value in tiny.batch(row).items()}
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            total += loss.item() / accumulation
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {total:.4f}", flush=True)
    if dist.get_rank() == 0:
        print(sp.report())
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
