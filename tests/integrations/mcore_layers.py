"""What each layer of a Megatron model is told about its ring: strings and lists of `cp_comm_type`, own settings."""

from __future__ import annotations

from typing import Any
from unittest import mock

from mcore_models import Case, config_of, model_of, parallel
from megatron.core import __version__
from seqpar_ring.integrations.megatron import RingCoreAttention

from seqpar_ring.groups import Groups

Told = tuple[str | None, str, int | None]
"""The `cp_comm_type` that a layer got, its schedule, and the ranks of its nodes."""


def told(config: Any, case: Case) -> list[Told]:
    """What the layers of a model were told."""
    build, seen = RingCoreAttention.__init__, []

    def noted(self: Any, **given: Any) -> None:
        build(self, **given)
        seen.append((given["cp_comm_type"], self.settings.schedule, self.settings.node))

    with mock.patch.object(RingCoreAttention, "__init__", noted):
        model_of(case, config)
    return seen


def strings(_: Groups, names: list[str | None]) -> list[list[Told]]:
    """For one string after the other: through TransformerConfig to every layer."""
    parallel(1, 4)
    cases = [Case(cp=4, options=(("cp_comm_type", name),), settings=(("node", 2),)) for name in names]
    return [told(config_of(case, 4), case) for case in cases]


def own(_: Groups, case: Case) -> list[Told]:
    """For the layers of a block's spec, each with settings of its own."""
    parallel(1, case.cp)
    return told(config_of(case, case.cp), case)


def lists(_: Groups, names: list[str]) -> tuple[tuple[int, ...], str, list[Told]]:
    """A string for each layer: the version of Megatron, what it raises itself, and what the layers were told.

    Up to 0.16 Megatron takes the next layer's, as it counts layers from one. So there the list gets one more in front,
    once the config has compared its length with the number of layers.
    """
    parallel(1, 2)
    case = Case(options=(("cp_comm_type", names),))
    config = config_of(case, 2)
    version = tuple(int(part) for part in __version__.split(".")[:2])
    try:
        return version, "", told(config, case)
    except IndexError as error:
        config.cp_comm_type = [names[0], *names]
        return version, str(error), told(config, case)
