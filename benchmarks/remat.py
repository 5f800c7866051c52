"""What keeping attention costs and saves: a training step of a small Llama over two ranks, layers checkpointed.

For each length: no checkpointing, plain checkpointing (attention and its ring run again), and attention kept. CPU time
of one rank, medians over rounds in which the modes alternate; and the bytes that one rank sends. Run from the
repository's root: `python benchmarks/remat.py`. Writes benchmarks/results/remat.json.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine import described

from seqpar_ring import SequenceParallel
from seqpar_ring.testing import RankPool

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
LAYERS, HIDDEN, ROUNDS = 4, 512, 7
MODES = ("no checkpointing", "none", "attention")


def step_times(sp: SequenceParallel, tokens: int) -> dict[str, Any]:
    """CPU seconds of a step in each mode, each round, and the bytes sent in one step."""
    from seqpar_ring.integrations.transformers import parallelize
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    models = {}
    for mode in MODES:
        torch.manual_seed(0)
        shape = {"hidden_size": HIDDEN, "intermediate_size": 3 * HIDDEN, "num_hidden_layers": LAYERS}
        config = LlamaConfig(vocab_size=256, num_attention_heads=8, num_key_value_heads=4, **shape)
        keep = sp.settings.model_copy(update={"remat": "none" if mode == "none" else "attention"})
        models[mode] = parallelize(LlamaForCausalLM(config).train(), SequenceParallel.over(sp.groups, keep))
        if mode != MODES[0]:
            models[mode].activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.arange(tokens)[None] % 251
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    sent = {}
    for number in range(ROUNDS + 1):
        for mode, model in models.items():
            sp.reset_report()
            begin = time.process_time()
            model(input_ids=ids, labels=ids).loss.backward()
            if number:  # the first warms up
                seconds[mode].append(time.process_time() - begin)
            sent[mode] = sum(sp.report().bytes_sent.values())
            model.zero_grad()
    return {"seconds": seconds, "bytes": sent}


def main() -> None:
    """Measure, print a line for each length, and write the raw figures."""
    rows = {}
    for tokens in LENGTHS:
        with RankPool(2, timeout=600.0) as pool:
            found = pool.run(step_times, tokens)[0]
        rows[tokens] = found
        medians = {mode: statistics.median(times) for mode, times in found["seconds"].items()}
        line = ", ".join(f"{mode} {seconds:.3f} s" for mode, seconds in medians.items())
        print(f"{tokens} tokens: {line}; kept / plain {medians['attention'] / medians['none']:.3f}", flush=True)
    result = {"machine": described(), "layers": LAYERS, "hidden": HIDDEN, "rounds": ROUNDS, "by tokens": rows}
    Path("benchmarks/results/remat.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
