"""Data: the descriptions of models and hardware that come with the package, one YAML file each, by name.

They stand in `configs/` at the top of the tree and are installed as `seqpar_ring.data`; a checkout that is only on the
path, and not installed, is read where it stands. It hands out what the files say and does not check it: `hardware` and
`model` know what must be in them.
"""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from seqpar_ring.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # not in Python 3.10, and wanted as a type only

HOME = "seqpar_ring.data"

WORDS = {"hardware": "devices and links", "models": "models"}
"""The kinds, as a message calls them."""

_EXAMPLES = {"hardware": "hardware", "model": "models"}


def names(kind: str) -> list[str]:
    """All names of a kind: "models" or "hardware"."""
    return sorted(entry.name[:-5] for entry in _folder(kind).iterdir() if entry.name.endswith(".yaml"))


def named(kind: str, name: str) -> Any:
    """The description of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in names(kind):
        fix = did_you_mean(name, names(kind))
        raise ConfigError(f"there is no {name!r} among the {WORDS[kind]} that come with the package", fix=fix)
    return copy.deepcopy(_parsed(kind, name))


@lru_cache(maxsize=64)
def _parsed(kind: str, name: str) -> Any:
    """Files that come with the package do not change, and YAML is slow to read."""
    return yaml.safe_load(_folder(kind).joinpath(f"{name}.yaml").read_text(encoding="utf-8"))


def read(path: Path, what: str) -> Any:
    """The content of a YAML or JSON file of the user's.

    Args:
        path: the file.
        what: what it should be, for messages: "hardware", "model".

    Raises:
        ConfigError: there is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise ConfigError(f"there is no such {what} file", fix="Check the path.", path=str(path))
    # JSON is YAML too, but for tabs and for numbers such as 1e-05.
    form, parse = ("JSON", json.loads) if path.suffix.lower() == ".json" else ("YAML", yaml.safe_load)
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, OSError) as error:
        says = " ".join(str(error).split())
        fix = f"See configs/{_EXAMPLES[what]} for examples."
        raise ConfigError(f"{path} is no {form}", fix=fix, says=says) from None


def _folder(kind: str) -> Traversable:
    try:
        return files(HOME).joinpath(kind)
    except ModuleNotFoundError:
        return Path(__file__).resolve().parents[2] / "configs" / kind
