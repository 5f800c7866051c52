"""Peak memory of a training step on each rank, against the length of the sequence and the ranks that share it; and of
the head with whole logits and in tiles.

    python benchmarks/training_memory.py [--out benchmarks/results]

Counted by the C library: every large tensor is an mmap of its own once the threshold is fixed, and a thread reads, all
the time, how many bytes are mapped. What is there before the step (weights, their gradients) is told apart from what
the step adds at its fullest. fp32, layers checkpointed, attention kept. Nothing here needs a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import described
from memory import M_MMAP_THRESHOLD, THRESHOLD, mapped
from torch import nn

from seqpar_ring import SequenceParallel
from seqpar_ring.batch import IGNORED
from seqpar_ring.testing import RankPool
from seqpar_ring.tiling import summed_cross_entropy, tiles

LENGTHS = (2048, 4096, 8192, 16384)
SIZES = (1, 2, 4)
VOCABULARY, HIDDEN, LAYERS = 4096, 256, 4
LARGE = 128_256


def peak(act: Callable[[], object]) -> int:
    """The most bytes that were mapped while it ran."""
    most, done = mapped(), threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, mapped())
            time.sleep(0.0002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        act()
    finally:
        done.set()
        watcher.join()
    return most


def step(sp: SequenceParallel, tokens: int) -> dict[str, int]:
    """Bytes of one rank: before a step, and what the step adds."""
    from seqpar_ring.integrations.transformers import parallelize
    from transformers import LlamaConfig, LlamaForCausalLM

    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, THRESHOLD)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"hidden_size": HIDDEN, "intermediate_size": 3 * HIDDEN, "num_hidden_layers": LAYERS}
    config = LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=8, num_key_value_heads=4, **shape)
    model = parallelize(LlamaForCausalLM(config).train(), sp)
    model.activation_checkpointing_enable({"use_reentrant": False})

    def once(length: int) -> None:
        ids = torch.arange(length)[None] % 251
        model(input_ids=ids, labels=ids).loss.backward()

    once(256)  # gradients exist after it, and what is made once
    before = mapped()
    return {"before": before, "added": peak(lambda: once(tokens)) - before}


def sharded() -> list[dict[str, Any]]:
    """For each number of ranks and each length, the fullest rank."""
    rows = []
    for size in SIZES:
        with RankPool(size, timeout=900) as pool:
            for tokens in LENGTHS:
                found = pool.run(step, tokens, remat="attention", logits=512)
                added = max(one["added"] for one in found)
                rows.append({"ranks": size, "tokens": tokens, "before": found[0]["before"], "added": added})
                print(f"{size} ranks, {tokens} tokens: {added / 2**20:.1f} MiB", flush=True)
    return rows


def head(_: SequenceParallel, tokens: int, count: int) -> int:
    """Bytes that the loss of one shard and its backward add, the head with whole logits (count 1) or in tiles."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, THRESHOLD)
    hidden, labels = torch.randn(1, tokens, 64, requires_grad=True), torch.arange(tokens)[None] % LARGE
    linear = nn.Linear(64, LARGE, bias=False)
    summed_cross_entropy(hidden[:, :8], labels[:, :8], linear, 1, IGNORED).backward()
    before = mapped()
    return peak(lambda: summed_cross_entropy(hidden, labels, linear, count, IGNORED).backward()) - before


def heads() -> list[dict[str, Any]]:
    """Whole logits as far as memory goes, and tiles as far as 32,768 tokens."""
    rows = []
    for tokens in (2048, 4096, 8192, 32768):
        for how in ("whole", "auto"):
            if how == "whole" and tokens > 8192:
                continue  # three tensors of 15.7 GiB
            with RankPool(1, timeout=900) as pool:
                count = tiles(tokens, LARGE, how).number
                (added,) = pool.run(head, tokens, count)
            rows.append({"tokens": tokens, "vocabulary": LARGE, "tiles": count, "added": added})
            print(f"head of {LARGE} words, {tokens} tokens, {count} tiles: {added / 2**20:,.0f} MiB", flush=True)
    return rows


def main() -> None:
    """Measure, print, and write the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    out = parser.parse_args().out
    result = {"machine": described(), "layers": LAYERS, "hidden": HIDDEN, "vocabulary": VOCABULARY}
    result |= {"steps": sharded(), "heads": heads()}
    (out / "training-memory.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
