"""Block attention: kernels that give (out, lse) of a block and its gradients, their registry, and the merge."""

from seqpar_ring.kernels.base import Capabilities, Kept, Kernel, Request, Scores, lacks, request_of
from seqpar_ring.kernels.cpu import CpuKernel
from seqpar_ring.kernels.merge import merge_
from seqpar_ring.kernels.reference import ReferenceKernel
from seqpar_ring.kernels.registry import Choice, names, refuse_impossible, register, registered, select, unregister

register(CpuKernel())
register(ReferenceKernel())

__all__ = [
    "Capabilities",
    "Choice",
    "CpuKernel",
    "Kept",
    "Kernel",
    "ReferenceKernel",
    "Request",
    "Scores",
    "lacks",
    "merge_",
    "names",
    "refuse_impossible",
    "register",
    "registered",
    "request_of",
    "select",
    "unregister",
]
