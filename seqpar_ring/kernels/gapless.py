"""Gapless: a kernel that cannot take empty segments, given calls that have none.

Calls cover what lies between two tiles with segments without queries or without keys (`schedule.calls`). Some kernels
answer those wrongly or crash (flash-attention issues 1537, 2421, 2562). For such a kernel they are left out.
"""

from __future__ import annotations

from seqpar_ring.kernels.regrouped import Part, Regrouped, part
from seqpar_ring.kernels.remembered import remembered
from seqpar_ring.schedule import Call


class Gapless(Regrouped):
    """The kernel it is made of, for calls of any kind. See the module."""

    def cut(self, call: Call) -> tuple[Part, ...]:
        """See `Regrouped.cut`."""
        return without_gaps(call)


@remembered
def without_gaps(call: Call) -> tuple[Part, ...]:
    """The call on the rows of the segments that have both queries and keys; nothing where there are none."""
    segments = zip(call.cu_q, call.cu_q[1:], call.cu_k, call.cu_k[1:], strict=False)
    some = [(a, b, c, d) for a, b, c, d in segments if a < b and c < d]
    return (part(some, call.left, call.right),) if some else ()
