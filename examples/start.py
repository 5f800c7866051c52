"""From a checked job to a running engine: the ranks meet, a model is found or made, text is packed, DeepSpeed starts.

Nothing here trains. What the library chose (layout, schedule, kernel) is printed with its reasons.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import smollm2
import torch
import torch.distributed as dist
import transformers
from engine import precision_of
from job import Job
from longtext import Document, Row, pack, tokenize
from reference import cores
from report import Printer
from seqpar_ring.integrations.deepspeed import initialize
from training import Run
from transformers import AutoModelForCausalLM, AutoTokenizer

import seqpar_ring as sr
from seqpar_ring.errors import ConfigError
from seqpar_ring.kernels import Request


def start(job: Job, config: dict[str, Any], documents: list[Document]) -> Run:
    """The job under way on this rank. Collective over the world.

    Args:
        job: what to do, checked.
        config: the DeepSpeed config with its "seqpar_ring" block.
        documents: the text.

    Raises:
        ConfigError: no such model, or too little text.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    dist.init_process_group("gloo")
    torch.set_num_threads(max(1, cores() // int(os.environ["LOCAL_WORLD_SIZE"])))
    out = Printer()
    folder = model_folder(job, out)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = packed(job, documents, tokenizer, out)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # What attention computed is kept in every row, short ones too, where the setting `remat` would leave it to "auto".
    smollm2.checkpointed(model, context_fn=sr.remat.context_fn)
    engine, *_ = initialize(model=model, model_parameters=list(model.parameters()), config=config)
    run = Run(job, folder, tokenizer, rows, engine, engine.seqpar_ring, out)
    out.table(description(run, config))
    return run


def model_folder(job: Job, out: Printer) -> Path:
    """The model's folder, the same on every rank; rank 0 makes what is missing while the others wait."""
    folder = smollm2.prepare(job.model, job.seed, main=False)
    if folder is None:
        out.line(f"making {job.model} below {smollm2.FOLDER}/, this once ...")
        smollm2.prepare(job.model, job.seed, main=dist.get_rank() == 0)
        dist.barrier()
        folder = smollm2.prepare(job.model, job.seed, main=False)
    if folder is None:
        raise ConfigError(
            "rank 0's model is not visible here", fix="Run where all ranks share a folder.", model=job.model
        )
    return folder


def packed(job: Job, documents: list[Document], tokenizer: Any, out: Printer) -> list[Row]:
    """The rows of the text.

    Raises:
        ConfigError: fewer than two rows; one is trained on, one is held out.
    """
    tokens = tokenize(documents, tokenizer)
    total = sum(map(len, tokens))
    rows = pack(tokens, job.seq_len, job.seed)
    if len(rows) < 2:
        fix = "Give more text, or a smaller seq_len."
        raise ConfigError("too little text for two rows", fix=fix, tokens=total, seq_len=job.seq_len)
    source = ", ".join(map(str, job.text)) or "the topics of Python's help"
    size = f"{len(tokens):,} documents, {total:,} tokens, packed into {len(rows)} rows of {job.seq_len:,}"
    out.table([("text", f"{source}: {size}, one of them held out")])
    return rows


def description(run: Run, config: dict[str, Any]) -> list[tuple[str, str]]:
    """What runs, as names and texts."""
    engine, sp, model = run.engine, run.sp, run.engine.module.config
    heads = model.num_attention_heads, model.num_key_value_heads
    width = getattr(model, "head_dim", None) or model.hidden_size // heads[0]
    count = sum(getattr(weight, "ds_numel", weight.numel()) for weight in engine.module.parameters())
    plan = sp.plan(run.rows[0].lengths)
    kernel = plan.kernel(Request(engine.device.type, engine.module.dtype, width, width, *heads))
    optimizer = config["optimizer"]
    return [
        (
            "model",
            f"{run.job.model}: {count / 1e6:.1f} M parameters, {model.num_hidden_layers} layers, {heads[0]} query and "
            f"{heads[1]} key/value heads, {precision_of(engine.module)}",
        ),
        (
            "ranks",
            f"{sp.world_size}: {sp.size} share a sequence, times {sp.data_size} data parallel; "
            f"threads of each: {torch.get_num_threads()}",
        ),
        (
            "engine",
            f"DeepSpeed ZeRO-{engine.zero_optimization_stage()}, {optimizer['type']}, learning rate "
            f"{optimizer['params']['lr']:g}, gradient clipping {engine.gradient_clipping():g}, activation "
            f"checkpointing that keeps attention's results",
        ),
        ("plan", f"held-out row: {plan.explain()}\n  kernel: {kernel.kernel.name} ({kernel.reason})"),
    ]
