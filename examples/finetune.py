"""Fine-tune a real model on real long text, each row of it shared by several processes. No GPU, no network.

    torchrun --standalone --nproc-per-node 2 examples/finetune.py --config configs/quickstart.yaml

This is the command line: it reads the job and refuses what cannot work before anything heavy is loaded. The training
itself, an ordinary DeepSpeed loop, is training.py. With `--verify` one step in fp32 runs over all ranks and on one
process, the differences are printed, and nothing is trained.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from engine import BLOCK, slow_in_16_bits
from job import Job
from longtext import Document, read

from seqpar_ring.config import Settings
from seqpar_ring.errors import ConfigError, GroupError, SeqparError

TEXT = "A file or folder of text; more may follow it. Each file is a document. Default: the topics of Python's help."


def main(  # noqa: PLR0913 - a parameter is an option of the command line
    config: Annotated[Path, typer.Option(help="The job: a YAML file.")],
    text: Annotated[list[Path] | None, typer.Option(help=TEXT)] = None,
    more: Annotated[list[Path] | None, typer.Argument(hidden=True)] = None,
    model: Annotated[
        str | None, typer.Option(help='"smollm2", "tiny", or a folder that save_pretrained wrote.')
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a packed row.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate, instead of the DeepSpeed config's.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the trained checkpoint.")] = None,
    deepspeed: Annotated[Path | None, typer.Option(help="DeepSpeed config with a seqpar_ring block.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare one step with one process; train nothing.")] = False,
) -> None:
    """Fine-tune a model on long text, or verify one step."""
    files = [*(text or []), *(more or [])]
    overrides = {
        "model": model,
        "text": files,
        "seq_len": seq_len,
        "steps": steps,
        "output": output,
        "deepspeed": deepspeed,
    }
    try:
        world = ranks()
        job = Job.load(config, overrides)
        engine = job.engine_config(lr, fp32=verify or slow_in_16_bits())
        if verify:  # one micro-batch is compared, and its gradient would be a part of a step's
            engine = {**engine, "gradient_accumulation_steps": 1}
            engine.pop("train_batch_size", None)
        job.check(Settings.parse(engine[BLOCK], where=f'"{BLOCK}" in {job.deepspeed}'), world)
        good = carry_out(job, engine, read(job.text), verify)
    except SeqparError as error:
        # What is wrong with the job is wrong on every rank, and said once; anything else is said by whom it hits.
        if not isinstance(error, ConfigError | GroupError) or int(os.environ.get("RANK", 0)) == 0:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    raise typer.Exit(0 if good else 1)


def ranks() -> int:
    """The number of processes that torchrun started.

    Raises:
        ConfigError: started without torchrun.
    """
    if "WORLD_SIZE" not in os.environ:
        command = "torchrun --standalone --nproc-per-node 2 " + " ".join(sys.argv)
        raise ConfigError("this job runs under torchrun", fix=f"Start it with: {command}")
    return int(os.environ["WORLD_SIZE"])


def carry_out(job: Job, engine: dict[str, Any], documents: list[Document], verify: bool) -> bool:
    """Load what is heavy, offline and quietly, and do the job. Returns whether its checks passed."""
    # These are read when transformers, tqdm and DeepSpeed are imported. The job is one for processors, GPU or not.
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", DS_ACCELERATOR="cpu")
    # DeepSpeed calls collectives by their old names, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    from start import start
    from verify import verify as verified

    run = start(job, engine, documents)
    good = verified(run) if verify else run.train()
    run.close()
    return good


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
