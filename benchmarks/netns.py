"""Ranks on links of a chosen speed: a network namespace a rank, a bridge between them, and a token bucket at each port.

Needs root, `ip` and `tc` (iproute2), and touches nothing outside the namespaces it makes: the bridge has one of its
own. A rank is a process in its namespace that waits for functions to run, over gloo. Rates change between runs without
new processes. Everything is taken down at the end, processes by their handles and namespaces by names that hold this
process's id; what an earlier run that was killed left behind goes when the next one starts.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from seqpar_ring.errors import TransportError, UnsupportedError

T = TypeVar("T")

PREFIX = "seqpar-"
PORT = 29511
FRAME = 1448
"""Bytes of a message in a frame of 1,500 bytes."""

HEADERS = 1514 / FRAME
"""Bytes that cross a link for each byte of a message: Ethernet, IP and TCP."""

PACKET, LARGE = 16 << 10, 64 << 10
"""Bytes that a device takes at once. Small, so that the bucket can be small; or as much as Linux puts together without
being asked. Each packet costs interrupts and timers of the buckets, on the cores that compute: a network card that
takes large packets asks for next to none. So a large one is nearer to it where cores are busy and messages are long."""

SPARE = 16 << 10
"""Bytes of a bucket beyond a packet: what comes in while a timer is late. A packet and this much pass unlimited after a
pause."""

WINDOW = 256 << 10
"""Bytes that a connection has under way at most: enough for any rate here, as a bridge adds next to no delay."""

QUEUE = 64 * WINDOW
"""Bytes that may wait before a bucket: so many that nothing is ever dropped, and TCP has no reason to slow down."""

TCP = {"tcp_congestion_control": "reno", "tcp_slow_start_after_idle": "0", "tcp_wmem": f"4096 65536 {WINDOW}"}

START, GRACE = 120.0, 3.0
"""Seconds for all ranks to start and find each other; for one to end by itself."""


class Rates(NamedTuple):
    """Bytes of messages per second over each rank's link, in each direction; None: as fast as memory.

    With `node` and `inner`, ranks `node * i .. node * (i + 1)` are a node, and what they send each other has a link of
    its own, of `inner` bytes a second.
    """

    outer: float | None = None
    inner: float | None = None
    node: int = 1


def missing() -> str:
    """Why there can be no namespaces here; empty if there can."""
    lacking = [name for name in ("ip", "tc") if not shutil.which(name)]
    if lacking:
        return f"{' and '.join(lacking)} not found (iproute2)"
    name = f"{PREFIX}{os.getpid()}-try"
    try:
        _do("ip netns add", name)
        try:
            _do("ip -n", name, "link add name veth0 type veth peer name veth1")
            _do("tc -n", name, f"qdisc add dev veth0 root tbf rate 1mbit burst {PACKET + SPARE} limit {QUEUE}")
        finally:
            _do("ip netns delete", name)
    except UnsupportedError as error:
        return str(error)
    return ""


class Network:
    """Namespaces of so many ranks, joined by a bridge, in packets of so many bytes; a context manager."""

    def __init__(self, world: int, packet: int = PACKET) -> None:
        self.world, self.rates, self._packet = world, Rates(), packet
        self.names = [f"{PREFIX}{os.getpid()}-w{world}-{who}" for who in (*range(world), "bridge")]
        self._switch = self.names[-1]

    def __enter__(self) -> Network:
        _sweep()
        try:
            for name in self.names:
                _do("ip netns add", name)
                _do("ip -n", name, "link set lo up")
                # Else a packet holds what passes in a millisecond, so a slow link has many, however large they may be.
                for key, value in {**TCP, "tcp_min_tso_segs": str(self._packet // FRAME)}.items():
                    _run(["ip", "netns", "exec", name, "sysctl", "-q", "-w", f"net.ipv4.{key}={value}"])
            _do("ip -n", self._switch, "link add name bridge type bridge")
            _do("ip -n", self._switch, "link set bridge up")
            for rank in range(self.world):
                self._join(rank)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the namespaces, and with them devices and limits."""
        for name in self.names:
            with contextlib.suppress(UnsupportedError):
                _do("ip netns delete", name)

    def address(self, rank: int) -> str:
        """The rank's address within the bridge's network."""
        return f"10.77.0.{rank + 1}"

    def shape(self, rates: Rates) -> None:
        """Limit every link from now on. Only between runs: packets under way are dropped."""
        burst = self._packet + SPARE
        for rank in range(self.world):
            name, node = self.names[rank], range(rank // rates.node * rates.node, (rank // rates.node + 1) * rates.node)
            near = [self.address(peer) for peer in node if peer != rank and peer < self.world]
            _limit(name, "eth0", burst, rates, [f"dst {address}/32" for address in near])
            _limit(self._switch, f"port{rank}", burst, rates, [f"src {address}/32" for address in near])
        self.rates = rates

    def _join(self, rank: int) -> None:
        name, port = self.names[rank], f"port{rank}"
        _do("ip -n", self._switch, f"link add name {port} type veth peer name eth0 netns", name)
        for where, device in ((self._switch, port), (name, "eth0")):
            _do("ip -n", where, f"link set {device} gso_max_size {self._packet}")
            _do("ip -n", where, f"link set {device} up")
        _do("ip -n", self._switch, f"link set {port} master bridge")
        _do("ip -n", name, f"addr add {self.address(rank)}/24 dev eth0")


class ShapedRanks:
    """One process a rank, each in its namespace and on its core; a context manager.

    Args:
        world: number of ranks.
        timeout: seconds that one run may take.
        nice: priority of the ranks, as in nice(1), and of their sessions; below 0 where others use the cores too.
        packet: bytes of one, `PACKET` to `LARGE`.
    """

    def __init__(self, world: int, timeout: float = 300.0, nice: int = 0, packet: int = PACKET) -> None:
        self.network, self.world, self.timeout, self._nice = Network(world, packet), world, timeout, nice
        self._started: list[tuple[subprocess.Popen[bytes], Connection]] = []

    def __enter__(self) -> ShapedRanks:
        self.network.__enter__()
        try:
            for rank in range(self.world):
                self._started.append(self._start(rank))
            self._collect(START)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def shape(self, rates: Rates) -> None:
        """See `Network.shape`."""
        if rates != self.network.rates:
            self.network.shape(rates)

    def run(self, fn: Callable[..., T], *args: Any) -> list[T]:
        """Call `fn(groups, *args)` on every rank and return the results in rank order.

        Raises:
            TransportError: a rank failed, died or did not answer in time.
        """
        message = pickle.dumps((fn, args))
        for _, connection in self._started:
            connection.send_bytes(message)
        return self._collect(self.timeout)

    def close(self) -> None:
        """End the ranks, then remove their namespaces."""
        started, self._started = self._started, []
        for _, connection in started:
            connection.close()  # an idle rank ends by itself
        deadline = time.monotonic() + GRACE
        for process, _ in started:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.network.close()

    def _start(self, rank: int) -> tuple[subprocess.Popen[bytes], Connection]:
        here, there = Pipe()
        cores = sorted(os.sched_getaffinity(0))
        core = cores[rank * len(cores) // self.world] if self.world >= len(cores) else cores[rank]
        arguments = [rank, self.world, there.fileno(), core, self._nice, self.network.address(0)]
        command = ["ip", "netns", "exec", self.network.names[rank], sys.executable, __file__, *map(str, arguments)]
        path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
        environment = {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # that an address has no name is no news
        process = subprocess.Popen(command, pass_fds=[there.fileno()], env=environment, start_new_session=True)
        group = Path(f"/proc/{process.pid}/autogroup")
        if self._nice and group.exists():  # sessions share the cores first, and the processes of each what it gets
            group.write_text(str(self._nice))
        there.close()
        return process, here

    def _collect(self, limit: float) -> list[Any]:
        replies: dict[int, Any] = {}
        deadline = time.monotonic() + limit
        while len(replies) < self.world:
            pending = {c: rank for rank, (_, c) in enumerate(self._started) if rank not in replies}
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                fix = "Raise timeout if the ranks are only slow."
                raise TransportError("ranks did not answer in time", fix=fix, ranks=sorted(pending.values()))
            for connection in cast("list[Connection]", ready):
                rank = pending[connection]
                try:
                    ok, value = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    raise TransportError(f"rank {rank} ended", fix="See what it printed.") from None
                if not ok:
                    raise TransportError(f"rank {rank} failed", fix="See its traceback.", traceback=value)
                replies[rank] = value
        return [replies[rank] for rank in range(self.world)]


def main() -> None:
    """A rank: join the others, then run one function after the other until the parent closes the connection."""
    rank, world, fd, core, nice = map(int, sys.argv[1:6])
    connection = Connection(fd)
    os.sched_setaffinity(0, {core})
    if nice:
        os.nice(nice)
    import torch
    import torch.distributed as dist

    from seqpar_ring import groups
    from seqpar_ring.transport import FAR_LANES, LANES

    torch.set_num_threads(1)
    meet = f"tcp://{sys.argv[6]}:{PORT}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world, timeout=timedelta(seconds=START))
    mine = groups.make(world, timeout=START, lanes=LANES + FAR_LANES)
    connection.send_bytes(pickle.dumps((True, None)))
    with contextlib.suppress(EOFError, ConnectionResetError, BrokenPipeError):
        while True:
            message = connection.recv_bytes()
            try:
                fn, args = pickle.loads(message)
                reply = True, fn(mine, *args)
            except Exception:
                reply = False, traceback.format_exc()
            connection.send_bytes(pickle.dumps(reply))
    os._exit(0)  # nothing is left to be saved


def _limit(name: str, device: str, burst: int, rates: Rates, near: list[str]) -> None:
    """Replace the limits of a device by these."""
    with contextlib.suppress(UnsupportedError):  # there may be none
        _do("tc -n", name, f"qdisc delete dev {device} root")
    if rates.inner is None or not near:
        if rates.outer is not None:
            _do("tc -n", name, f"qdisc add dev {device} root tbf rate {_bits(rates.outer)} burst {burst} limit {QUEUE}")
        return
    # Band 0 is what goes between nodes, band 1 what stays within one; neither waits for the other.
    assert rates.outer is not None
    _do("tc -n", name, f"qdisc add dev {device} root handle 1: htb default 10")
    for minor, rate in ((10, rates.outer), (20, rates.inner)):
        limits = f"rate {_bits(rate)} ceil {_bits(rate)} burst {burst} cburst {burst}"
        _do("tc -n", name, f"class add dev {device} parent 1: classid 1:{minor} htb {limits}")
        _do("tc -n", name, f"qdisc add dev {device} parent 1:{minor} bfifo limit {QUEUE}")
    for match in near:
        _do("tc -n", name, f"filter add dev {device} parent 1: protocol ip u32 match ip {match} flowid 1:20")


def _bits(rate: float) -> str:
    return f"{round(8 * HEADERS * rate)}bit"


def _sweep() -> None:
    """Remove namespaces of runs that are no more."""
    for line in _do("ip netns list").splitlines():
        name = line.split()[0]
        owner = name.removeprefix(PREFIX).partition("-")[0]
        if name.startswith(PREFIX) and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            _do("ip netns delete", name)


def _do(command: str, *rest: str) -> str:
    """Run a command of iproute2: words, the names and options that follow last."""
    return _run([*command.split(), *(word for part in rest for word in part.split())])


def _run(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnsupportedError(" ".join(words) + " failed", fix="Run as root.", says=done.stderr.strip())
    return done.stdout


if __name__ == "__main__":
    main()
