"""Megatron-core with its context parallelism over a ring: its model, schedule, DDP and optimizer, and one line of ours.

torchrun --nproc-per-node 8 examples/megatron_finetune.py --cp 4 --tp 2

Replace `tiny.rows()`, and the shape of the model, by your own; `with_ring` is what brings the ring in.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any

import tiny
import torch
import torch.distributed as dist
import typer
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import gpt_layer_specs as specs
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from seqpar_ring.integrations.megatron import batch_on_this_rank, with_ring
from torch import Tensor

SHAPE: dict[str, Any] = {"num_layers": 3, "hidden_size": 128, "num_attention_heads": 8, "num_query_groups": 4}
RECOMPUTE: dict[str, Any] = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def model_of(cp: int, tp: int, tokens: int, on_gpu: bool) -> Any:
    config = TransformerConfig(
        **SHAPE,
        hidden_dropout=0.0,
        attention_dropout=0.0,  # Megatron's default of 0.1 is refused
        context_parallel_size=cp,
        tensor_model_parallel_size=tp,
        calculate_per_token_loss=True,  # else the loss is a mean of the ranks' means
        **RECOMPUTE,
        bf16=on_gpu,
        params_dtype=torch.bfloat16 if on_gpu else torch.float32,
        use_cpu_initialization=not on_gpu,
        gradient_accumulation_fusion=False,
        finalize_model_grads_func=finalize_model_grads,
    )
    has_engine = importlib.util.find_spec("transformer_engine") is not None
    layer = specs.get_gpt_layer_with_transformer_engine_spec if has_engine else specs.get_gpt_layer_local_spec
    model = GPTModel(config, with_ring(layer()), 256, max_sequence_length=tokens, position_embedding_type="rope")
    return DistributedDataParallel(config, DistributedDataParallelConfig(), model.cuda() if on_gpu else model)


def batches(tokens: int, count: int, cp: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Packed rows: each document padded to a multiple of 2 cp, as Megatron's context parallelism wants it."""
    first = mpu.get_data_parallel_rank() * count  # each data-parallel rank trains on other rows
    for row in tiny.rows(tokens, count * mpu.get_data_parallel_world_size())[first : first + count]:
        starts = torch.cat([(row["position_ids"] == 0).nonzero()[:, 0], torch.tensor([tokens])])
        padded = (starts.diff() + 2 * cp - 1) // (2 * cp) * (2 * cp)
        cu, room = (torch.cat([n[:1] * 0, n.cumsum(0)]).to(device, torch.int32) for n in (starts.diff(), padded))
        where = torch.arange(tokens) + torch.repeat_interleave(room[:-1].cpu() - starts[:-1], starts.diff())
        ids = torch.zeros(1, int(room[-1]), dtype=torch.long).index_copy(1, where, row["input_ids"][None])
        mask = torch.zeros_like(ids, dtype=torch.float32).index_fill(1, where, 1.0)
        mask[:, where[starts[1:] - 1]] = 0  # the last token of a document predicts nothing
        whole = {"tokens": ids, "labels": ids.roll(-1, 1), "loss_mask": mask, "position_ids": torch.zeros_like(ids)}
        params = PackedSeqParams("thd", cu, cu, room, room, int(padded.max()), int(padded.max()))
        here = batch_on_this_rank(whole, mpu.get_context_parallel_group(), params)
        yield {**{key: x.to(device) for key, x in here.items()}, "params": params}


def forward_step(data: Iterator[dict[str, Any]], model: Any) -> tuple[Tensor, Any]:
    one = next(data)
    out = model(one["tokens"], one["position_ids"], None, labels=one["labels"], packed_seq_params=one["params"])
    return out, partial(loss_of, one["loss_mask"])


def loss_of(mask: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, the number of tokens, and both for the report: Megatron divides by the number over all ranks."""
    total, count = (out.float() * mask).sum(), mask.sum()
    return total, count.to(torch.int), torch.stack([total.detach(), count])


def main(
    cp: Annotated[int, typer.Option(help="Ranks that share a sequence.")] = 2,
    tp: Annotated[int, typer.Option(help="Ranks that share the model.")] = 1,
    tokens: Annotated[int, typer.Option(help="Of a packed row.")] = 1024,
    steps: Annotated[int, typer.Option(help="Optimizer steps of two micro-batches.")] = 6,
    clip: Annotated[float, typer.Option(help="Gradient clipping; 0: none.")] = 1.0,
) -> None:
    """Train, and print the loss of every step."""
    on_gpu = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    mpu.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp)
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    model = model_of(cp, tp, tokens, on_gpu)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=3e-3, bf16=on_gpu, clip_grad=clip), [model])
    data = batches(tokens, 2 * steps, cp, device)
    for step in range(steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        shape = {"num_microbatches": 2, "seq_length": tokens, "micro_batch_size": 1}
        run = get_forward_backward_func()
        done = run(forward_step_func=forward_step, data_iterator=data, model=[model], **shape)
        optimizer.step()
        total = torch.stack(done).sum(0)
        dist.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {total[0] / total[1]:.4f}, {int(total[1])} targets", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
