"""Write docs/reference.md: every public name with its signature and its docstring, read from the sources.

Run from the repository's root, with the development tools installed: `make reference`. Nothing is imported: griffe
reads the sources. What is listed below is what is public; a test holds the page to the sources.
"""

from __future__ import annotations

import re
from pathlib import Path

import griffe
from griffe import Alias, Attribute, Class, DocstringSectionKind, Function, Object

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference.md"

PUBLIC: dict[str, dict[str, tuple[str, ...]]] = {
    "seqpar_ring": {
        "SequenceParallel": (
            *("plan", "shard_batch", "loss", "tiled_loss", "count_targets"),
            *("describe", "decided", "report", "reset_report", "close"),
        ),
        "Plan": (
            *("shard", "gather", "shard_keys", "gather_keys", "masked", "position_ids", "tokens", "local_tokens"),
            *("backward_schedule", "explain"),
        ),
        "ring_attention": (),
        "Settings": (),
        "Report": (),
    },
    "seqpar_ring.planner.model": {"Model": ("of_attention",)},
    "seqpar_ring.remat": {"keeping": (), "context_fn": ()},
    "seqpar_ring.errors": dict.fromkeys(
        (
            *("SeqparError", "ConfigError", "GroupError", "PlanError", "BatchError", "UnsupportedError"),
            *("ScheduleError", "DisagreementError", "TransportError", "VersionError"),
        ),
        (),
    ),
    "seqpar_ring.integrations.transformers": {"parallelize": ()},
    "seqpar_ring.integrations.trainer": {"ring": ()},
    "seqpar_ring.integrations.deepspeed": {"initialize": (), "install": (), "uninstall": ()},
    "seqpar_ring.integrations.deepspeed_checkpoints": {"save": (), "load": ()},
    "seqpar_ring.integrations.megatron": {
        "with_ring": (),
        "shard_batch": (),
        "with_layouts": (),
        "batch_on_this_rank": (),
        "RingCoreAttention": (),
    },
    "seqpar_ring.kernels": {
        "Kernel": ("forward", "backward"),
        "Capabilities": (),
        "Request": (),
        "Scores": (),
        "Resting": (),
        "Kept": (),
        "register": (),
        "unregister": (),
    },
    "seqpar_ring.trace": {"recording": (), "ranges": ()},
    "seqpar_ring.testing": {
        "run_lockstep": (),
        "run_processes": (),
        "dense_attention": (),
        "assert_matches_dense": (),
        "Case": (),
    },
}
"""By module: the public names, and of a class those of its members that are public."""

HANDED_OUT = {"Plan", "Report", "Model", "RingCoreAttention"}
"""Classes whose instances come from something else than a call of theirs."""

HEAD = """# Reference

Made by `make reference` from the docstrings of the sources. What stands here is stable from the first release; every
other name may change. The functions that carry ring-flash-attn's names are in [compat.md](compat.md), the commands in
[cli.md](cli.md), the settings as DeepSpeed's config has them in [deepspeed.md](deepspeed.md).

A tensor's shape stands behind its name: B sequences, S tokens (of this rank, unless it says of the whole), H query
heads, G key heads, D the width of queries and keys, E that of values, C of hidden states, V words.
"""

LABELS = {
    DocstringSectionKind.parameters: "Arguments",
    DocstringSectionKind.other_parameters: "Arguments",
    DocstringSectionKind.attributes: "Attributes",
    DocstringSectionKind.raises: "Raises",
    DocstringSectionKind.yields: "Yields",
}


def text() -> str:
    """The whole page."""
    core, integrations = (_read(folder) for folder in ("seqpar_ring", "integrations"))  # installed as a part of it
    lines = [HEAD, *(f"- [{name}](#{_anchor(name)}): {', '.join(map(_code, PUBLIC[name]))}" for name in PUBLIC)]
    for name, members in PUBLIC.items():
        lines += ["", f"## {name}"]
        _, _, inside = name.partition(".")
        module = integrations if inside.startswith("integrations.") else core
        inside = inside.removeprefix("integrations.")
        for member, own in members.items():
            found = _final(module[inside] if inside else module, member)
            lines += _described(found, 3)
            for one in own:
                lines += _described(_final(found, one), 4, member)
    return "\n".join(lines) + "\n"


def _read(folder: str) -> Object:
    options = griffe.GoogleOptions(returns_multiple_items=False, returns_named_value=False, warnings=False)
    read = griffe.load(folder, search_paths=[ROOT], docstring_parser="google", docstring_options=options)
    assert isinstance(read, griffe.Module)
    return read


def _final(inside: Object | Alias, name: str) -> Object:
    """What a name stands for, wherever it is defined.

    The package imports some of its names when they are first used, and says so only to type checkers.
    """
    path = inside.imports.get(name) if isinstance(inside, griffe.Module) and name not in inside.members else None
    found: Object | Alias = inside[name] if path is None else inside.modules_collection[path]
    return found.final_target if isinstance(found, Alias) else found


def _described(what: Object, level: int, of: str = "") -> list[str]:
    lines = ["", f"{'#' * level} {_code(f'{of}.{what.name}' if of else what.name)}"]
    if isinstance(what, (Function, Class)) and what.name not in HANDED_OUT:
        lines += ["", "```text", _signature(what), "```"]
    elif isinstance(what, Attribute) and what.annotation is not None:
        lines[-1] += f": {_code(str(what.annotation))}"
    for section in what.docstring.parsed if what.docstring else []:
        lines += ["", *_section(section)]
    return lines


def _signature(what: Function | Class) -> str:
    """As it is called, on several lines where it is long."""
    if isinstance(what, Function):
        return _in_lines(what.name, re.sub(r"^\((self|cls)(, )?", "(", str(what.signature())[len(what.name) :]))
    start = what.members.get("__init__")
    if isinstance(start, Function):
        return _signature(start).replace("__init__", what.name, 1).removesuffix(" -> None")
    fields = [one for one in what.attributes.values() if one.annotation is not None and "property" not in one.labels]
    if not fields or any(str(base) == "Protocol" for base in what.bases):
        return f"class {what.name}({', '.join(map(str, what.bases))})"
    return _in_lines(what.name, f"({', '.join(f'{one.name}: {one.annotation}{_default(one)}' for one in fields)})")


def _default(field: Attribute) -> str:
    """Of a field of a NamedTuple or of a model of pydantic, which may say more than the value."""
    value = "" if field.value is None else str(field.value)
    if value.startswith("Field("):
        found = re.search(r"default=([^,)]+)", value)
        value = found[1] if found else ""
    return f" = {value}" if value else ""


def _in_lines(name: str, rest: str) -> str:
    if len(name + rest) <= 100:
        return name + rest
    last = rest.rindex(")")
    return "\n".join([f"{name}(", *(f"    {one}," for one in _parameters(rest[1:last])), rest[last:]])


def _parameters(inside: str) -> list[str]:
    """Cut at the commas that are in no bracket."""
    found, depth = [""], 0
    for char in inside:
        depth += (char in "[(") - (char in "])")
        if char == "," and not depth:
            found.append("")
        else:
            found[-1] += char
    return [one.strip() for one in found]


def _section(section: griffe.DocstringSection) -> list[str]:
    if section.kind is DocstringSectionKind.text:
        return [section.value]
    if section.kind is DocstringSectionKind.returns:
        return [f"Returns: {_line(section.value[0].description)}"]
    if section.kind in LABELS:
        named = section.kind is not DocstringSectionKind.raises
        names = [one.name if named else str(one.annotation).strip("()") for one in section.value]
        about = [_line(one.description) for one in section.value]
        return [f"{LABELS[section.kind]}:", "", *map("- `{}`: {}".format, names, about)]
    raise ValueError(f"a section of a kind that has no form here: {section.kind}")


def _line(description: str) -> str:
    return " ".join(description.split())


def _code(name: str) -> str:
    return f"`{name}`"


def _anchor(heading: str) -> str:
    return re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(text())
    print(f"wrote {PAGE.relative_to(ROOT)}")
