"""One of the GPU's kernels over its real library, without a GPU: `python real_library.py flash4 sm_90`.

The numbers need a GPU. What does not: that the library takes the arguments that a wrapper gives it, in that order and
by those names, for every call that the capabilities declare, and that results have the shapes that it expects. For
flash-attention 4 more: its kernels are compiled for the GPU that is named, as they are there when first called. The
others run on torch's meta device, by the shape functions that come with them; of flash-attention 2 and 3 the Python
half is real, and what lies below it, which has to be built, answers with shapes.
"""

from __future__ import annotations

import os
import site
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from itertools import product
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqpar_ring.geometry import INF
from seqpar_ring.kernels import (
    CudnnKernel,
    Flash2Kernel,
    Flash3Kernel,
    Flash4Kernel,
    Kept,
    Kernel,
    Request,
    Scores,
    TorchCudnnKernel,
    TorchFlashKernel,
    cudnn,
    flash2,
    flash3,
    flash4,
    lacks,
    torch_cudnn,
    torch_flash,
)
from seqpar_ring.kernels.library import Function, Library
from seqpar_ring.schedule import Call

CALLS = {
    "causal": Call(0, 0, INF, 0, (0, 256), (0, 256)),
    "full": Call(0, 0, INF, INF, (0, 100), (0, 300)),
    "packed": Call(0, 0, INF, 0, (0, 130, 131, 300), (0, 130, 131, 300)),
    "window": Call(0, 0, 64, 0, (0, 130, 300), (0, 130, 300)),
    "band": Call(0, 0, 64, 9, (0, 130, 300), (0, 200, 400)),
    "open below": Call(0, 0, INF, 8, (0, 10), (0, 4)),
    "open above": Call(0, 0, 3, INF, (0, 10), (0, 4)),
    "one query, some without keys": Call(0, 0, INF, INF, (0, 1, 2, 3), (0, 0, 9, 12)),
}

SMS = 132
"""Multiprocessors of the GPU that is compiled for."""


class Case(NamedTuple):
    """One call: which of `CALLS`, and the tensors that it is made with."""

    call: str
    widths: tuple[int, int]
    heads: tuple[int, int] = (8, 2)
    softcap: float | None = None
    dtype: torch.dtype = torch.bfloat16
    batch: int = 1
    deterministic: bool = False

    def request(self, device: str, architecture: int) -> Request:
        call = CALLS[self.call]
        return Request(
            device,
            self.dtype,
            *self.widths,
            *self.heads,
            window=call.left < INF,
            softcap=self.softcap is not None,
            architecture=architecture,
            documents=len(call.cu_q) - 1,
            deterministic=self.deterministic,
        )


def many() -> Iterator[Case]:
    """Where a call costs nothing."""
    widths = (64, 64), (128, 128), (80, 80), (256, 256), (20, 20), (64, 32), (192, 128)
    heads = (8, 8), (8, 2), (8, 1)
    for fields in product(CALLS, widths, heads, (None, 30.0), (torch.bfloat16, torch.float16), (1, 2), (False, True)):
        yield Case(*fields)


def few() -> Iterator[Case]:
    """Where each is compiled, for several seconds. What is the same bits each time needs a GPU to be compiled."""
    for call, width in product(("causal", "full", "band"), (64, 128)):
        yield Case(call, (width, width))
    for call in ("open below", "open above", "one query, some without keys"):
        yield Case(call, (128, 128))
    yield Case("packed", (128, 128), (8, 1), softcap=30.0, dtype=torch.float16)
    yield Case("causal", (20, 20), batch=2)
    yield Case("window", (128, 128), (8, 8))
    yield Case("causal", flash4.LATENT, (8, 8))


class There(NamedTuple):
    """A kernel whose library is taken to be there, and how to call it."""

    kernel: Kernel
    cases: Iterable[Case]
    device: str = "meta"
    mode: Callable[[], AbstractContextManager[Any]] = nullcontext


def present(library: Library) -> Library:
    """The same, whether there is a GPU or not."""
    there = copy(library)
    there.__class__ = type("Present", (type(library),), {"absent": ""})
    return there


def over_torch(architecture: str) -> There:
    """torch's own varlen flash attention."""
    return There(TorchFlashKernel(present(torch_flash.LIBRARY), ("meta",)), many())


def over_torch_cudnn(architecture: str) -> There:
    """torch's own cuDNN attention."""
    return There(TorchCudnnKernel(present(torch_cudnn.LIBRARY), ("meta",)), many())


def over_cudnn(architecture: str) -> There:
    """NVIDIA's operators, by the shape functions that they are registered with."""
    return There(CudnnKernel(present(cudnn.LIBRARY), ("meta",)), many())


def over_flash2(architecture: str) -> There:
    """Its operators likewise; what is built from CUDA only has to be there when it is imported."""
    sys.modules["flash_attn_2_cuda"] = ModuleType("flash_attn_2_cuda")
    return There(Flash2Kernel(present(flash2.LIBRARY), ("meta",)), many())


def over_flash3(architecture: str) -> There:
    """The interface of `hopper/` in flash-attention's source; the operators below it answer with shapes."""
    for name in ("flash_attn_3", "flash_attn_3._C"):
        sys.modules[name] = ModuleType(name)
    from hopper import flash_attn_interface as interface  # type: ignore[import-not-found]

    def fwd(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
        assert len(rest) == 31, "as many as the operator of flash_api.cpp takes"
        return q.new_empty((*q.shape[:2], v.shape[2])), q.new_empty(q.shape[1::-1], dtype=torch.float32), None, None

    def bwd(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> tuple[Any, ...]:
        assert len(rest) == 16
        assert lse.shape == q.shape[1::-1]
        return (*rest[:3], lse)

    interface.flash_attn_3_cuda = SimpleNamespace(fwd=fwd, bwd=bwd)
    sys.modules[flash3.MODULE] = interface
    return There(Flash3Kernel(present(flash3.LIBRARY), ("meta",)), many())


def over_flash4(architecture: str) -> There:
    """Compiled for this architecture, by its own way of compiling for a GPU that is not there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    os.environ.update(
        FLASH_ATTENTION_ARCH=architecture, CUTE_DSL_ARCH=f"{architecture}a", FLASH_ATTENTION_NUM_SMS=str(SMS)
    )
    from cutlass import utils  # type: ignore[import-not-found]

    class Hardware:
        """What the driver would say of the GPU, as some kernels ask when they are compiled."""

        def get_device_multiprocessor_count(self) -> int:
            return SMS

        def get_max_active_clusters(self, cluster_size: int) -> int:
            return SMS // cluster_size

    utils.HardwareInfo = Hardware
    there = present(flash4.LIBRARY)
    there.function = on_gpu(there.function)  # type: ignore[method-assign]
    return There(Flash4Kernel(there, ("cpu",)), few(), "cpu", FakeTensorMode)


def on_gpu(function_of: Callable[[str], Function]) -> Callable[[str], Function]:
    """Functions that are given fake tensors on a GPU, of which a torch that is built without CUDA makes no views."""

    def move(x: Any, device: str) -> Any:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device) if isinstance(x, Tensor) else x

    def function(name: str) -> Function:
        def moved(*args: Any, **kwargs: Any) -> Any:
            named = {key: move(x, "cuda") for key, x in kwargs.items()}
            found = function_of(name)(*(move(x, "cuda") for x in args), **named)
            return tuple(move(x, "cpu") for x in found)

        return moved

    return function


def call_it(there: There, case: Case) -> None:
    """Forward and backward: what comes back has the shapes and dtypes of the kernel contract."""
    call, (D, E), (H, G), B = CALLS[case.call], case.widths, case.heads, case.batch
    m, n = call.cu_q[-1], call.cu_k[-1]

    def some(*shape: int) -> Tensor:
        return torch.empty(B, *shape, dtype=case.dtype, device=there.device)

    q, k, v, dout = some(m, H, D), some(n, G, D), some(n, G, E), some(m, H, E)
    scores = Scores(0.1, case.softcap)
    out, lse = there.kernel.forward(q, k, v, call, scores)
    assert out.shape == dout.shape
    assert lse.shape == (B, H, m)
    assert lse.dtype == torch.float32
    torch.are_deterministic_algorithms_enabled = lambda: case.deterministic
    kept = Kept(q, k, v, dout, torch.empty(B, H, m, device=there.device))
    found = there.kernel.backward(dout, kept, call, scores)
    assert [x.shape for x in found] == [x.shape for x in (q, k, v)]
    assert all(x.dtype in (case.dtype, torch.float32) for x in found)


def main(name: str, architecture: str, *folders: str) -> None:
    """Calls the kernel in every case that it is capable of; the first that its library does not take raises.

    Args:
        name: the kernel's.
        architecture: of the GPU, as "sm_90".
        folders: where its library is, if it is not installed: what pip's --target left, with .pth files to be read.
    """
    for folder in folders:
        site.addsitedir(folder)
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]  # which needs a GPU
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    there, done = OVER[name](architecture), 0
    with there.mode():
        for case in there.cases:
            if not lacks(there.kernel.capabilities, case.request(there.device, int(architecture[3:]) // 10)):
                call_it(there, case)
                done += 1
    assert done > 5, f"{done} calls are none"
    print(f"all right: {done} calls of {name} for {architecture}")


OVER = {
    "torch_flash": over_torch,
    "torch_cudnn": over_torch_cudnn,
    "cudnn": over_cudnn,
    "flash2": over_flash2,
    "flash3": over_flash3,
    "flash4": over_flash4,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
