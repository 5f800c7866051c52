"""transformers' Trainer over a ring: one call, `ring(Trainer, size=..)`, and the rest as ever.

torchrun --standalone --nproc-per-node 2 examples/trainer.py --config configs/trainer.yaml

Replace `tiny.model()` and `tiny.rows()` by your model and data set; the rest stays. Under "training" stand arguments of
TrainingArguments; with "deepspeed" there, naming a config with a "seqpar_ring" block, leave "ring" out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tiny
import torch
import torch.distributed as dist
import typer
import yaml
from seqpar_ring.integrations.trainer import ring
from transformers import Trainer, TrainingArguments, default_data_collator


def main(config: Annotated[Path, typer.Option(help="YAML: the ring's settings and Trainer's arguments.")]) -> None:
    """Train, with an evaluation before and one after."""
    job = yaml.safe_load(config.read_text())
    rows = tiny.rows(job["tokens"], job["rows"])
    trainer = ring(Trainer, **job.get("ring", {}))(
        model=tiny.model(),
        # The first evaluation is part of train(): under DeepSpeed or FSDP2 none may come before it.
        args=TrainingArguments(**job["training"], eval_on_start=True, use_cpu=not torch.cuda.is_available()),
        data_collator=default_data_collator,
        train_dataset=rows[2:],
        eval_dataset=rows[:2],
    )
    trainer.train()
    before = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    after = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        print(f"evaluation loss {before:.4f} -> {after:.4f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
