"""Subgroup: some ranks of a transport as messengers of their own, numbered anew from 0.

Head sharding needs the ranks that share heads and the ranks of one ring, both within a sequence group. Messages need no
process group of their own for that, only other numbers. It sends messages and nothing else: collectives and agreement
belong to the whole group.
"""

from __future__ import annotations

from collections.abc import Sequence

from seqpar_ring.transport.base import Handle, Messenger, Recv, Send


class Subgroup:
    """The ranks `ranks` of `whole`, in that order; the caller's own is among them. See `Messenger`."""

    def __init__(self, whole: Messenger, ranks: Sequence[int]) -> None:
        self._whole, self._ranks = whole, tuple(ranks)
        self.rank, self.world, self.lanes = self._ranks.index(whole.rank), len(self._ranks), whole.lanes

    def exchange(self, sends: Sequence[Send], recvs: Sequence[Recv], lane: str = "kv") -> Handle:
        """See `Messenger.exchange`."""
        return self._whole.exchange(
            [m._replace(peer=self._ranks[m.peer]) for m in sends],
            [m._replace(peer=self._ranks[m.peer]) for m in recvs],
            lane,
        )
