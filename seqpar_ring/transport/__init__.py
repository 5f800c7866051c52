"""Moving tensors between ranks: over torch.distributed, or between threads of one process (lockstep).

`Transport` is all that the rest of the package knows of it. Nothing here knows of attention, plans or process groups'
making. `DistributedTransport` lives in `seqpar_ring.transport.distributed`, `LockstepWorld` in `.lockstep`.
"""

from seqpar_ring.transport.base import LANES, Handle, Recv, Send, Transport, TransportStats
from seqpar_ring.transport.distributed import DistributedTransport
from seqpar_ring.transport.lockstep import LockstepTransport, LockstepWorld

__all__ = [
    "LANES",
    "DistributedTransport",
    "Handle",
    "LockstepTransport",
    "LockstepWorld",
    "Recv",
    "Send",
    "Transport",
    "TransportStats",
]
