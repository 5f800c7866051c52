"""megatron-core on a machine without a GPU: the few places that ask for CUDA get the CPU instead. For tests only.

Import it before megatron.core, in a process of its own: it changes torch for good. Nothing of attention is touched; the
slice of the rotary embedding that a rank takes is done here, since Megatron's goes through pinned memory, and `FAULTS`
lets a test take the wrong one.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
FAULTS: set[str] = set()
"""What is done wrongly on purpose."""


class NoStream:
    """A stream or an event on a device that has none."""

    def __getattr__(self, name: str) -> Callable[..., NoStream]:
        return lambda *args, **kwargs: NoStream()  # a stream records an event


def shim_torch() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.synchronize = cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: None
    cuda.current_stream = cuda.Stream = cuda.Event = lambda *args, **kwargs: NoStream()
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.is_current_stream_capturing = lambda: False
    cuda.FloatTensor, cuda.IntTensor, cuda.LongTensor = torch.FloatTensor, torch.IntTensor, torch.LongTensor


class OnTheCpu(TorchFunctionMode):
    """What is asked to be made on a GPU, or moved there, is on the CPU. For optimizers; enter it once a thread."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:  # the distributed optimizer asks for the name
            return str(func(*args)).replace("torch.", "torch.cuda.")
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = CPU
        return func(*args, **kwargs)


def shim_megatron() -> None:
    from megatron.core.models.common.embeddings import rope_utils, rotary_pos_embedding, yarn_rotary_pos_embedding
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16 asks for it where Transformer Engine is not installed
    # 0.16 finds its own stand-ins for Transformer Engine and takes them for it.
    multi_latent_attention.HAVE_TE = "transformer_engine" in sys.modules
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    for module in (rope_utils, rotary_pos_embedding, yarn_rotary_pos_embedding):  # imported by name into the others
        module.get_pos_emb_on_this_cp_rank = slice_of_angles
    packed = rope_utils._get_thd_freqs_on_this_cp_rank
    rope_utils._get_thd_freqs_on_this_cp_rank = lambda rank, *args: packed(0 if "rope" in FAULTS else rank, *args)


def slice_of_angles(angles: torch.Tensor, dim: int, cp_group: Any) -> torch.Tensor:
    """Chunks r and 2 W - 1 - r of 2 W."""
    W, r = cp_group.size(), 0 if "rope" in FAULTS else cp_group.rank()
    chunks = angles.unflatten(dim, (2 * W, -1)).index_select(dim, torch.tensor([r, 2 * W - 1 - r]))
    return chunks.flatten(dim, dim + 1)


if torch.cuda.is_available():
    raise RuntimeError("the shim is for machines without a GPU")
shim_torch()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Transformer Engine and Apex are missing, as megatron-core says at length
    shim_megatron()
