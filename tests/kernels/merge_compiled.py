"""The GPU's merge compiled for GPUs that are not here, down to their machine code.

The interpreter shows what the kernel computes, and not whether a compiler takes it. Run as a process of its own, with
TRITON_CACHE_DIR an empty folder. Also shown is what makes it one pass over memory: whole 16 bytes are read and
written at once, and no register is spilled.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seqpar_ring.kernels.merge import AT_ONCE
from seqpar_ring.kernels.merge_triton import ROWS, _merge

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CODE = {"cuda": "cubin", "hip": "hsaco"}
SIZES = ("N", "E", "WIDTH", "ROWS")


def kind(argument: str, part: str) -> str:
    """The type of an argument, in Triton's words."""
    if argument in SIZES:
        return "constexpr"
    if argument.startswith("part"):
        return part
    return "*fp32" if "lse" in argument or argument == "out" else "i32"


def compiled(target: GPUTarget, parts: int, width: int, part: str) -> dict[str, str | bytes]:
    """What came out, by stage. Pointers are to 16 bytes, as torch's are where nothing was cut off before them."""
    names = _merge.arg_names
    signature = {name: kind(name, part) for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    sizes = {"N": parts, "E": width, "WIDTH": triton.next_power_of_2(width), "ROWS": ROWS}
    source = ASTSource(fn=_merge, signature=signature, constexprs=sizes, attrs=attributes)
    found: dict[str, str | bytes] = triton.compile(source, target=target).asm
    return found


def spilled(cubin: bytes) -> int:
    """Bytes of the stack that a thread uses, by NVIDIA's own tool, which Triton brings along."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with TemporaryDirectory() as folder:
        file = Path(folder) / "merge.cubin"
        file.write_bytes(cubin)
        said = subprocess.run([str(tool), "-res-usage", str(file)], capture_output=True, text=True, check=True).stdout
    used = re.search(r"STACK:(\d+).*LOCAL:(\d+)", said)
    assert used, said
    return int(used[1]) + int(used[2])


def check(name: str, parts: int, width: int, part: str) -> None:
    """Compiles it for one of `TARGETS`, and looks at what came out where NVIDIA's tools are for that."""
    target = TARGETS[name]
    stages = compiled(target, parts, width, part)
    assert len(stages[CODE[target.backend]]) > 1000, name
    if target.backend != "cuda":
        return
    ptx, cubin = stages["ptx"], stages["cubin"]
    assert isinstance(ptx, str)
    assert isinstance(cubin, bytes)
    assert spilled(cubin) == 0, (name, parts, spilled(cubin))
    if width % 8 == 0:  # else rows begin anywhere
        assert "ld.global.v4.b32" in ptx
        assert "st.global.v4.b32" in ptx
        assert not re.findall(r"(?:ld|st)\.global\.(?:v2\.)?b(?:8|16|64)\b", ptx), "less than 16 bytes at once"


def main() -> None:
    for parts, width, part in (1, 128, "*bf16"), (2, 80, "*fp32"), (3, 20, "*fp16"), (AT_ONCE, 256, "*bf16"):
        check("sm_90", parts, width, part)
    for name in TARGETS:
        check(name, AT_ONCE, 128, "*bf16")
    print("all right")


if __name__ == "__main__":
    main()
