"""Block attention: kernels that give (out, lse) of a block and its gradients, their registry, and the merge."""

from seqpar_ring.kernels.base import (
    Capabilities,
    Kept,
    Kernel,
    Request,
    Resting,
    Scores,
    architecture_of,
    deterministic,
    lacks,
)
from seqpar_ring.kernels.cpu import CpuKernel
from seqpar_ring.kernels.cudnn import CudnnKernel
from seqpar_ring.kernels.flash2 import Flash2Kernel
from seqpar_ring.kernels.flash3 import Flash3Kernel
from seqpar_ring.kernels.flash4 import Flash4Kernel
from seqpar_ring.kernels.merge import merge_
from seqpar_ring.kernels.reference import ReferenceKernel
from seqpar_ring.kernels.registry import Choice, names, refuse_impossible, register, registered, select, unregister
from seqpar_ring.kernels.torch_cudnn import TorchCudnnKernel
from seqpar_ring.kernels.torch_flash import TorchFlashKernel

for kernel in (
    Flash3Kernel(),
    Flash4Kernel(),
    CudnnKernel(),
    TorchCudnnKernel(),
    Flash2Kernel(),
    TorchFlashKernel(),
    CpuKernel(),
    ReferenceKernel(),
):
    register(kernel)

__all__ = [
    "Capabilities",
    "Choice",
    "CpuKernel",
    "CudnnKernel",
    "Flash2Kernel",
    "Flash3Kernel",
    "Flash4Kernel",
    "Kept",
    "Kernel",
    "ReferenceKernel",
    "Request",
    "Resting",
    "Scores",
    "TorchCudnnKernel",
    "TorchFlashKernel",
    "architecture_of",
    "deterministic",
    "lacks",
    "merge_",
    "names",
    "refuse_impossible",
    "register",
    "registered",
    "select",
    "unregister",
]
