"""The planner's memory against training: every allocation of a step tracked, its fullest moment beside the prediction.

    python benchmarks/planner_memory.py [--out benchmarks/results] [--only "'bf16'"] [--again]

What is allocated is seen as `tracked` says. The second step is measured, of ZeRO 3, which learns in the first what to
gather, the third, so that whatever is made once is there. Models are small and sequences long, so that activations
count as they do in earnest; the error of what a step adds to the states is given beside that of the whole. Two ranks,
in some cases four, DeepSpeed, gloo, no GPU. What the results hold already is not measured again but compared with what
the planner says now.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from machine import described
from torch.profiler import ProfilerActivity, profile
from tracked import blocks_of, mended, most_of, places, spans_of

from seqpar_ring import SequenceParallel
from seqpar_ring.config import Settings
from seqpar_ring.planner.hardware import Device, load
from seqpar_ring.planner.job import Choice, Workload
from seqpar_ring.planner.memory import Memory, largest, memory
from seqpar_ring.planner.model import Model, of_config
from seqpar_ring.planner.states import Buckets
from seqpar_ring.testing import RankPool

HIDDEN, VOCABULARY = 128, 512
SHAPE = {"hidden_size": HIDDEN, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCABULARY}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SHAPE, "num_key_value_heads": 2, "intermediate_size": 384},
    "qwen3": {**SHAPE, "num_key_value_heads": 2, "intermediate_size": 320, "head_dim": 64, "tie_word_embeddings": True},
    "gpt2": {**SHAPE, "n_positions": 8192, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    | {"bos_token_id": 0, "eos_token_id": 0},
    "gemma3_text": {**SHAPE, "num_key_value_heads": 2, "intermediate_size": 384, "head_dim": 32, "sliding_window": 256},
    "qwen3_moe": {**SHAPE, "num_key_value_heads": 2, "intermediate_size": 384, "head_dim": 32}
    | {"moe_intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 2},
}
"""Grouped heads; norms of queries and keys and a tied head; LayerNorm, an MLP of two matrices and learned positions;
two more norms a layer, and windows; a mixture of experts."""

LORA = "llama, LoRA"
MODELS[LORA] = MODELS["llama"]
RANK = 8
"""Of the adapters of `LORA`, beside each projection of a layer."""

ATTENTION = "seqpar_ring::attention_backward"

GRID = ("llama", "qwen3", "gpt2")
"""Models that are measured in every way."""

LENGTHS = (2048, 4096, 8192)
MODES = {"kept": (True, "attention"), "again": (True, "none"), "saved": (False, "attention")}
"""Whether layers are recomputed, and what becomes of attention then."""

BUCKETS = Buckets(HIDDEN**2, int(0.9 * HIDDEN**2))


class Case(NamedTuple):
    """One training set-up."""

    model: str
    tokens: int
    zero: int
    mode: str
    dtype: str = "fp32"
    ranks: int = 2
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def choice(self) -> Choice:
        """As the planner takes it."""
        checkpointing, remat = MODES[self.mode]
        block = {"size": self.ranks, "remat": remat, **dict(self.settings)}
        return Choice(self.ranks, Settings.parse(block), checkpointing, self.zero)

    @property
    def workload(self) -> Workload:
        """What is trained, as the planner takes it."""
        model = shapes(self.model)
        return Workload(model, (self.tokens,), self.dtype, trained=adapters(model) if self.model == LORA else None)


Figures = list[dict[str, int]]


def shapes(name: str) -> Model:
    """The planner's view of a model of transformers."""
    from transformers import AutoConfig

    return of_config(AutoConfig.for_model(family(name), **MODELS[name]).to_dict(), name)


def family(name: str) -> str:
    """What transformers calls it."""
    return name.partition(",")[0]


def adapters(model: Model) -> int:
    """Parameters of LoRA's adapters: a matrix from each projection's width to `RANK`, one from there on."""
    q, k, c, f = model.heads * model.head_dim, model.kv_heads * model.head_dim, model.hidden, model.intermediate
    return model.layers * RANK * (2 * (c + q) + 2 * (c + k) + 3 * (c + f))


def settings_of(case: Case) -> dict[str, Any]:
    """As `RankPool.run` takes them."""
    return case.choice.settings.model_dump(exclude={"size", "timeout"})


def predicted(case: Case) -> Memory:
    """What the planner says."""
    return memory(case.workload, case.choice, device(), BUCKETS)


def device() -> Device:
    """A process of a CPU."""
    return cast(Device, load("cpu").description)


def measured(sp: SequenceParallel, case: Case) -> dict[str, int]:
    """Bytes of one rank: before a step, and the most in forward, backward, attention's backward, and the update."""
    torch.set_num_threads(1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        marks, held, begin = _steps(sp, case)
    blocks = list(mended(sorted(blocks_of(seen)), held, begin))
    spans = dict(zip(("forward", "backward", "update"), pairwise(marks), strict=True))
    found = {name: most_of(blocks, *span) for name, span in spans.items()}
    found["attention"] = max((most_of(blocks, *span) for span in spans_of(seen, ATTENTION, begin)), default=0)
    return {"before": most_of(blocks, 0, begin, last=True), **found, "peak": max(found.values())}


def _steps(sp: SequenceParallel, case: Case) -> tuple[list[int], set[int], int]:
    """Some steps: the times that part the last, and the places that tensors hold at its beginning."""
    engine, batch = _engine(sp, case)
    steps = 3 if case.zero == 3 else 2
    for step in range(steps):
        gc.collect()
        held = places() if step == steps - 1 else set()
        marks = [time.time_ns()]
        loss = engine(**batch).loss
        marks.append(time.time_ns())
        engine.backward(loss)
        del loss
        marks.append(time.time_ns())
        engine.step()
        marks.append(time.time_ns())
    engine.destroy()
    return marks, held, marks[0]


def _engine(sp: SequenceParallel, case: Case) -> tuple[Any, dict[str, torch.Tensor]]:
    rank = str(sp.groups.global_rank)
    os.environ.update(LOCAL_RANK=rank, RANK=rank, WORLD_SIZE=str(sp.world_size), DS_ACCELERATOR="cpu")
    warnings.simplefilter("ignore")
    from deepspeed.utils import groups, logger
    from seqpar_ring.integrations.deepspeed import initialize
    from transformers import AutoConfig, AutoModelForCausalLM

    logger.setLevel("ERROR")
    groups.mpu = groups.mesh_device = None
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": case.dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": case.zero,
            "reduce_bucket_size": BUCKETS.reduce,
            "stage3_prefetch_bucket_size": BUCKETS.prefetch,
            "stage3_param_persistence_threshold": 10 * HIDDEN,
        },
        "seqpar_ring": sp.settings.model_dump(),
    }
    torch.manual_seed(0)
    of_family = AutoConfig.for_model(family(case.model), **MODELS[case.model])
    model: Any = AutoModelForCausalLM.from_config(of_family).train()
    model = model.bfloat16() if case.dtype == "bf16" else model
    if case.model == LORA:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [p for p in model.parameters() if p.requires_grad]
    engine = initialize(model=model, optimizer=torch.optim.AdamW(trained), config=config)[0]
    if case.choice.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.arange(case.tokens)[None] % VOCABULARY
    return engine, {"input_ids": ids, "labels": ids}


def compared(case: Case, found: Figures) -> dict[str, Any]:
    """A case's row: measured on the fullest rank, and predicted."""
    most = max(found, key=lambda one: one["peak"])
    said = predicted(case)
    before = sum(part.bytes for part in said.parts if part.when == "always")
    return {
        **case._asdict(),
        "measured": most,
        "predicted": {"before": round(before), "peak": round(said.peak), "at": said.at},
        "moments": {name: round(size) for name, size in said.moments.items()},
        "parts": {part.name: round(part.bytes) for part in said.parts},
        "error": said.peak / most["peak"] - 1,
        "error_of_what_a_step_adds": (said.peak - before) / (most["peak"] - most["before"]) - 1,
        "error_of_attention": said.moments["backward of attention"] / most["attention"] - 1,
    }


def cases() -> Iterator[Case]:
    """Three models x three lengths x ZeRO 0 and 3 x layers recomputed or not, and others one at a time."""
    for mode, tokens, zero, model in product(MODES, LENGTHS, (0, 3), GRID):
        yield Case(model, tokens, zero, mode)
    for mode, zero, model in product(MODES, (0, 3), GRID):
        yield Case(model, LENGTHS[1], zero, mode, "bf16")
    for mode, model in product(("kept", "saved"), ("gemma3_text", "qwen3_moe")):
        yield Case(model, LENGTHS[1], 0, mode, "bf16")
    for zero in (1, 2):
        yield Case("llama", LENGTHS[1], zero, "kept", "bf16")
    for mode, zero in product(MODES, (0, 3)):
        yield Case(LORA, LENGTHS[1], zero, mode, "bf16")
    yield Case("llama", 8192, 0, "kept", settings=(("mlp", 1024), ("logits", 512)))
    yield Case("llama", 8192, 0, "saved", settings=(("block_tokens", 512),))
    yield Case("llama", 8192, 3, "kept", ranks=4)
    yield Case("llama", 8192, 3, "kept", ranks=4, settings=(("schedule", "all_gather"),))
    yield Case("qwen3", 8192, 0, "again", ranks=4, settings=(("heads", 2),))


def run(chosen: list[Case], known: dict[str, Figures], keep: Callable[[], None]) -> list[dict[str, Any]]:
    """Rows of these cases: what is not known yet is measured, cases of one world in the same processes."""
    rows = []
    for ranks in sorted({case.ranks for case in chosen}):
        with RankPool(ranks, timeout=600) as pool:
            for case in (one for one in chosen if one.ranks == ranks):
                if str(case) not in known:
                    known[str(case)] = pool.run(measured, case, **settings_of(case))
                    keep()
                rows.append(compared(case, known[str(case)]))
                print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """A case in a line."""
    mib = {name: row[name]["peak"] / 2**20 for name in ("measured", "predicted")}
    what = f"{row['model']:6} {row['dtype']} x{row['ranks']} {row['tokens']:6} zero {row['zero']} {row['mode']:6}"
    errors = " ".join(f"{error:+7.1%}" for name, error in row.items() if name.startswith("error"))
    at = f"{row['predicted']['at']} {row['settings'] or ''}"
    return f"{what} {mib['measured']:8.1f} {mib['predicted']:8.1f} MiB {errors} {at}"


def limits(known: dict[str, Figures], keep: Callable[[], None]) -> list[dict[str, Any]]:
    """The largest sequence that fits in a given memory, and what steps of 0.95 and 1.05 of it hold."""
    rows = []
    for case, size in ((Case("llama", 0, 3, "kept"), 64 * 2**20), (Case("qwen3", 0, 0, "saved"), 128 * 2**20)):
        limit = device().model_copy(update={"memory": float(size)})
        most = largest(case.workload._replace(lengths=(1,)), case.choice, limit, BUCKETS)
        lengths = [round(most * factor) for factor in (0.95, 1.05)]
        peaks = [row["measured"]["peak"] for row in run([case._replace(tokens=n) for n in lengths], known, keep)]
        rows.append({**case._asdict(), "limit": size, "largest": most, "tokens": lengths, "peaks": peaks})
        print(f"{case.model}: {most} tokens in {size / 2**20:.0f} MiB; {lengths} take {peaks} bytes", flush=True)
    return rows


def main() -> None:
    """Measure what is not measured yet, print, and write the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--only", default="", help="cases that contain this, e.g. \"'bf16'\"")
    parser.add_argument("--again", action="store_true", help="measure what is in the results already, too")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "planner-memory.json"
    old = json.loads(file.read_text()) if file.exists() and not args.again else {}
    known: dict[str, Figures] = old.get("figures", {})
    result: dict[str, Any] = {"machine": described(), **{key: old.get(key, []) for key in ("worst", "limits", "cases")}}

    def keep() -> None:
        file.write_text(json.dumps({**result, "figures": known}, indent=1) + "\n")

    rows = run([case for case in cases() if args.only in str(case)], known, keep)
    if not args.only:
        errors = [name for name in rows[0] if name.startswith("error")]
        result |= {"worst": {name: max(abs(row[name]) for row in rows) for name in errors}, "cases": rows}
        result["limits"] = limits(known, keep)
    keep()


if __name__ == "__main__":
    main()
