"""Advice: what a plan's numbers mean, in sentences with the numbers: what does not hide, and what does better than a
ring.

Below the bandwidth that overlap needs it says from how many tokens a rank it would; where head sharding or an
all-gather beats the ring it says that, also of what was not chosen. It recommends nothing that was not priced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from seqpar_ring.planner.hardware import Machine
from seqpar_ring.planner.job import Workload
from seqpar_ring.planner.limits import overlap_tokens
from seqpar_ring.planner.search import Found, Option

NOTABLE = 0.05
"""Exposed time, or a difference between options, that is worth a sentence: this share of the attention's time."""


def advice(found: Found, workload: Workload, machine: Machine) -> Iterator[str]:
    """Sentences about the best option and what it was compared with."""
    if not found.options:
        return
    best = found.options[0]
    yield from overlap(best, workload, machine)
    plain = [o for o in found.options if o.choice.settings.head_degree == 1 and o.choice.settings.size > 1]
    yield from _against(best, _fastest(plain, "ring"), "a plain ring")
    yield from _against(best, _fastest(plain, "all_gather"), "an all-gather of all heads' keys and values")
    chosen = best.choice.settings
    if chosen.size > 1 and chosen.heads == chosen.size:
        yield "Head sharding alone is the fastest here: no ring runs, since the heads suffice for all ranks."
    if chosen.size == 1:
        yield "One device holds the whole sequence: sharing it out would only cost time, so all are data parallel."
    if not best.choice.checkpointing:
        yield "Nothing is recomputed, because everything fits; checkpointing would leave more room and cost time."


def overlap(option: Option, workload: Workload, machine: Machine) -> Iterator[str]:
    """How much of a ring's transfers shows, and from how many tokens a rank it would not."""
    s = option.choice.settings
    ring = s.size // s.head_degree
    if ring == 1:
        return
    attention = option.step.forward + option.step.backward
    exposed = option.step.exposed / attention if attention else 0.0
    far = s.size > machine.node
    link = machine.outer if far else machine.inner
    row = workload.model.row(workload.itemsize).shared(s.head_degree).sent(s.kv_dtype, s.dkv_dtype)
    # Heads that are shared out leave a rank fewer heads and more tokens: its hop carries those of all who share.
    enough = overlap_tokens(row, machine.device.paces(workload.dtype), link, machine.node, workload.causal)
    have = workload.tokens / ring
    if exposed < NOTABLE:
        yield f"Transfers hide: {exposed:.1%} of attention's time is exposed ({link.name}, {have:,.0f} tokens a hop)."
        return
    if have < enough.both:
        yield (
            f"Transfers do not hide: a hop over {link.name} needs {enough.forward:,.0f} tokens a rank in forward and "
            f"{enough.backward:,.0f} in backward; you have {have:,.0f}: {exposed:.0%} of attention's time is exposed."
        )
    else:
        yield (
            f"{exposed:.0%} of attention's time is exposed, although {have:,.0f} tokens a rank suffice for a hop over "
            f"{link.name} ({enough.both:,.0f} are needed): ranks wait for each other, or several share the link."
        )


def _fastest(options: Sequence[Option], schedule: str) -> Option | None:
    return next((o for o in options if o.choice.settings.schedule == schedule), None)


def _against(best: Option, other: Option | None, what: str) -> Iterator[str]:
    """Say so where something else than this was better by a notable amount."""
    if other is None or other is best:
        return
    slower = other.seconds_a_token / best.seconds_a_token - 1
    if slower > NOTABLE:
        s = other.choice.settings
        yield f"The best with {what} (size {s.size}) takes {slower:.0%} longer than what is chosen."
