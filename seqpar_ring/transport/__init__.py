"""Moving tensors between ranks: over torch.distributed, or between threads of one process (lockstep).

`Transport` is all that the rest of the package knows of it. Nothing here knows of attention, plans or process groups'
making. `DistributedTransport` lives in `seqpar_ring.transport.distributed`, `LockstepWorld` in `.lockstep`.
"""

from seqpar_ring.transport.base import FAR_LANES, LANES, Handle, Messenger, Recv, Send, Transport
from seqpar_ring.transport.distributed import DistributedTransport
from seqpar_ring.transport.lockstep import Link, LockstepTransport, LockstepWorld
from seqpar_ring.transport.stats import TransportStats
from seqpar_ring.transport.subgroup import Subgroup

__all__ = [
    "FAR_LANES",
    "LANES",
    "DistributedTransport",
    "Handle",
    "Link",
    "LockstepTransport",
    "LockstepWorld",
    "Messenger",
    "Recv",
    "Send",
    "Subgroup",
    "Transport",
    "TransportStats",
]
