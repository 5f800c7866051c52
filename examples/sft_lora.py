"""TRL's SFTTrainer over a ring: LoRA, packing with the borders of documents kept, and loss in tiles.

torchrun --standalone --nproc-per-node 2 examples/sft_lora.py --config configs/sft_lora.yaml

Replace `tiny.model()`, `tiny.tokenizer()` and `tiny.texts()` by your model, its tokenizer and your data set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tiny
import torch
import torch.distributed as dist
import typer
import yaml
from datasets import Dataset
from peft import LoraConfig
from seqpar_ring.integrations.trainer import ring
from trl import SFTConfig, SFTTrainer


def main(config: Annotated[Path, typer.Option(help="YAML: the ring's, LoRA's and SFTTrainer's arguments.")]) -> None:
    """Train the matrices of LoRA, and save them."""
    job = yaml.safe_load(config.read_text())
    data = Dataset.from_list([{"text": text[: job["characters"]]} for text in tiny.texts()[: job["documents"]]])
    trainer = ring(SFTTrainer, **job["ring"])(
        model=tiny.model(),
        args=SFTConfig(**job["training"], use_cpu=not torch.cuda.is_available()),
        processing_class=tiny.tokenizer(),
        train_dataset=data,
        peft_config=LoraConfig(**job["lora"]),
    )
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; adapter in {trainer.args.output_dir}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
