"""Data: the descriptions of models and hardware that come with the package, one YAML file each, by name.

They stand in `configs/` at the top of the tree and are installed as `seqpar_ring.data`.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import yaml

from seqpar_ring.errors import ConfigError, did_you_mean

HOME = "seqpar_ring.data"


def names(kind: str) -> list[str]:
    """All names of a kind: "models", "devices" or "links"."""
    return sorted(entry.name[:-5] for entry in files(HOME).joinpath(kind).iterdir() if entry.name.endswith(".yaml"))


def named(kind: str, name: str) -> Any:
    """The description of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in names(kind):
        raise ConfigError(f"{name!r} is not one of the {kind} that come with the package", fix=did_you_mean(name, names(kind)))
    return yaml.safe_load(files(HOME).joinpath(kind, f"{name}.yaml").read_text())
