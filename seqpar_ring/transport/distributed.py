"""Transport over torch.distributed: a process group per lane, so KV, dKV and collectives never wait for each other.

Works with gloo on CPU and NCCL on CUDA; the tensors of a collective are put on the transport's device, which its groups
can carry. Errors and timeouts of the backend come back as `TransportError` that says who waited for whom and in which
lane. Neither backend tells the two sides' sizes apart: gloo ends the receiving process when more arrives than is
expected and fills only a part when less does, which is why plans are agreed on before anything is posted. This module
makes no groups (`seqpar_ring.groups` does), but translates ranks of the group to the global ones that posting takes.
"""

from __future__ import annotations

import pickle
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from seqpar_ring.errors import TransportError
from seqpar_ring.transport.agreement import Claim, claim, digest, settle
from seqpar_ring.transport.base import BaseTransport, Handle, Recv, Send, alone

LOST: weakref.WeakKeyDictionary[dist.ProcessGroup, str] = weakref.WeakKeyDictionary()
"""Process groups over which something failed, and what: no message goes over them any more, whatever the backend."""


class DistributedTransport(BaseTransport):
    """The ranks of one or more process groups over the same processes. Collective: all of them make it together.

    Args:
        lanes: process group of each lane; "control" is needed (for collectives), "kv" and "dkv" to exchange on them.
        device: where the tensors that travel live.
        timeout: seconds the groups were made with; for messages.

    Raises:
        TransportError: the ranks could not reach each other.
    """

    def __init__(self, lanes: Mapping[str, dist.ProcessGroup], device: torch.device, timeout: float) -> None:
        control = lanes["control"]
        super().__init__(dist.get_rank(control), dist.get_world_size(control), lanes)
        self.device, self.timeout = device, timeout
        parts = str(dist.get_backend_config(control)).split(",")  # "cpu:gloo,cuda:nccl"
        self._backends = dict(part.split(":", 1) for part in parts)
        # torch.distributed holds a group until it is destroyed, and then its threads must end: those that live on until
        # the interpreter ends may abort the process. So there is no second hold here.
        self._lanes = weakref.WeakValueDictionary(lanes)
        self._global_ranks = dist.get_process_group_ranks(control)
        for lane, group in self._lanes.items():
            # NCCL wants all ranks in a group's first call; a ring's first exchange may involve only some of them.
            with self._collective(f"connecting lane {lane}"):
                dist.all_reduce(torch.zeros(1, device=device), group=group)

    def groups(self) -> Sequence[dist.ProcessGroup]:
        """See `Transport.groups`."""
        return list(self._lanes.values())

    def carries(self, device: torch.device) -> bool:
        """See `Transport.carries`. gloo takes tensors of a GPU in collectives only."""
        backend = self._backends.get(device.type)
        return backend is not None and (device.type == "cpu" or backend != "gloo")

    def exchange(self, sends: Sequence[Send], recvs: Sequence[Recv], lane: str = "kv") -> Handle:
        """See `Transport.exchange`."""
        sends, recvs = self._to_post(sends, recvs, lane)
        group = self._group(lane)
        # Receives first: gloo tells a sender that its message may come over the connection on which our own would be
        # under way already, so between two ranks that send first one direction waits for the other.
        both = [(dist.irecv, m) for m in recvs] + [(dist.isend, m) for m in sends]
        ops = [
            dist.P2POp(how, x.detach() if x.requires_grad else x, self._global_ranks[peer], group)
            for how, (peer, x) in both
        ]
        under_way = _Works(self, ops, (recvs, sends), lane)
        if ops:
            under_way.start()
        return under_way

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        """See `Transport.all_gather`."""
        return super().all_gather(x.detach().to(self.device), sizes, dim).to(x.device)

    @alone("a sum")
    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Transport.all_reduce`."""
        mine = x.detach().resolve_conj().resolve_neg()
        total = mine.to(self.device, copy=True, memory_format=torch.contiguous_format)
        self.stats.count("control", 2 * (self.world - 1) * total.nbytes // self.world)
        group = self._group("control")
        with self._collective("all_reduce"):
            dist.all_reduce(total, group=group)
        return total.to(x.device)

    @alone("an agreement")
    def agree(self, what: str, record: Mapping[str, object], error: Exception | None = None) -> None:
        """See `Transport.agree`. Costs one all_gather of three integers while all is well."""
        error = self._or_broken(error)
        if error is not None and self._lanes.get("control") in LOST:
            raise error  # there is nobody to tell
        said = claim(what, record, error)
        digests = self._gather_integers(digest(said), what)
        if all(d == digests[0] and not d[0] for d in digests):
            return
        settle(self._gather_claims(said, what), self.rank, error)

    def _gather_integers(self, numbers: Sequence[int], what: str) -> list[tuple[int, ...]]:
        mine = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        gathered = [torch.zeros_like(mine) for _ in range(self.world)]
        self.stats.count("control", (self.world - 1) * mine.nbytes)
        group = self._group("control")
        with self._collective(f"agreement on {what}"):
            dist.all_gather(gathered, mine, group=group)
            return [tuple(int(n) for n in row) for row in torch.stack(gathered).tolist()]

    def _gather_claims(self, said: Claim, what: str) -> list[Claim]:
        data = torch.frombuffer(bytearray(pickle.dumps(said)), dtype=torch.uint8).to(self.device)
        sizes = [size for (size,) in self._gather_integers([data.numel()], what)]
        parts = self.all_gather(data, sizes).cpu().split(sizes)
        return [pickle.loads(bytes(part.tolist())) for part in parts]

    def _group(self, lane: str) -> dist.ProcessGroup:
        found = self._lanes.get(lane)
        if found is None:
            raise TransportError(
                "the process groups of this SequenceParallel were destroyed",
                fix="Make a new one after torch.distributed.init_process_group.",
                lane=lane,
            )
        if found in LOST:
            raise TransportError(
                f"the other ranks cannot be reached any more, since {LOST[found]}",
                fix="Start again from the last checkpoint; or make a new SequenceParallel if all ranks are alive.",
                lane=lane,
            )
        return found

    @contextmanager
    def _collective(self, name: str) -> Iterator[None]:
        """Count the time of a collective, and say which one it was if it fails."""
        started = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            others = [r for r in range(self.world) if r != self.rank]
            raise self._gave_up(f"ranks {others}", name, "control", started, error) from error
        finally:
            self.stats.seconds_waited += time.perf_counter() - started

    def _gave_up(self, whom: str, where: str, lane: str, started: float, error: Exception) -> TransportError:
        what = f"rank {self.rank} waited {time.perf_counter() - started:.1f} s for {whom} in {where}, in vain"
        if lane in self._lanes:
            LOST.setdefault(self._lanes[lane], what)
        return TransportError(
            what,
            fix="See whether that rank died, failed or is held up elsewhere; raise timeout if it is only slow.",
            timeout=self.timeout,
            global_ranks=self._global_ranks,
            backend_says=str(error),
        )


class _Works:
    """An exchange under way; holds its tensors until then."""

    def __init__(
        self,
        transport: DistributedTransport,
        ops: list[dist.P2POp],
        messages: tuple[Sequence[Recv], Sequence[Send]],
        lane: str,
    ) -> None:
        self._transport, self._ops, self._messages, self._lane = transport, ops, messages, lane
        self._works: list[dist.Work] = []

    def start(self) -> None:
        """Post it."""
        started = time.perf_counter()
        try:
            self._works = dist.batch_isend_irecv(self._ops)
        except (RuntimeError, ValueError) as error:
            raise self._gave_up(None, started, error) from error

    def wait(self) -> None:
        """See `Handle.wait`."""
        started = time.perf_counter()
        try:
            for i, work in enumerate(self._works):
                try:
                    work.wait()
                except RuntimeError as error:
                    raise self._gave_up(i, started, error) from error
        finally:
            self._transport.stats.seconds_waited += time.perf_counter() - started
            self._works, self._ops, self._messages = [], [], ((), ())

    def _gave_up(self, i: int | None, started: float, error: Exception) -> TransportError:
        """Of the work with this number; NCCL returns one for the whole batch, gloo one for each message."""
        recvs, sends = self._messages
        who = [f"a message from rank {m.peer}" for m in recvs] + [f"rank {m.peer} to take a message" for m in sends]
        whom = " and ".join(who) if i is None or len(self._works) != len(who) else who[i]
        return self._transport._gave_up(whom, f"lane {self._lane}", self._lane, started, error)
