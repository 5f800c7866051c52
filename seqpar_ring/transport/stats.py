"""What a rank sent and how long it waited: counted by a transport, and reported to users."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TransportStats:
    """What one rank sent and how long it waited since the last reset.

    Attributes:
        bytes_sent: by lane.
        messages: number of messages and collectives posted.
        seconds_waited: wall seconds spent in waits and collectives; on CUDA, the host's seconds only.
    """

    bytes_sent: dict[str, int] = field(default_factory=dict)
    messages: int = 0
    seconds_waited: float = 0.0

    def count(self, lane: str, nbytes: int) -> None:
        """Note one message of `nbytes` bytes."""
        self.bytes_sent[lane] = self.bytes_sent.get(lane, 0) + nbytes
        self.messages += 1

    def reset(self) -> None:
        """Start again from zero."""
        self.bytes_sent, self.messages, self.seconds_waited = {}, 0, 0.0

    def as_dict(self) -> dict[str, object]:
        """A copy as plain values, e.g. for a log."""
        return {
            "bytes_sent": dict(self.bytes_sent),
            "messages": self.messages,
            "seconds_waited": self.seconds_waited,
        }


@dataclass(frozen=True)
class Report:
    """What one rank sent, and how long it waited, since the last reset.

    Attributes:
        bytes_sent: bytes sent in each lane: "kv" keys and values, "dkv" their gradients, "control" what ranks agree on,
            sum or gather.
        messages: transfers and collectives.
        seconds_waited: time spent waiting for transfers that were not there yet.
    """

    bytes_sent: dict[str, int]
    messages: int
    seconds_waited: float

    def __str__(self) -> str:
        lanes = ", ".join(f"{lane} {size / 2**20:.1f} MiB" for lane, size in sorted(self.bytes_sent.items()))
        return f"sent {lanes or 'nothing'} in {self.messages} messages, waited {self.seconds_waited:.2f} s"
