"""Which kernel is chosen, why, and what is said when none can."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seqpar_ring.errors import ConfigError, UnsupportedError
from seqpar_ring.geometry import INF
from seqpar_ring.kernels import (
    Capabilities,
    CpuKernel,
    Kept,
    Kernel,
    ReferenceKernel,
    Request,
    Scores,
    deterministic,
    lacks,
    names,
    register,
    registry,
    select,
    unregister,
)
from seqpar_ring.kernels.gapless import Gapless
from seqpar_ring.kernels.squares import Squares
from seqpar_ring.kernels.trial import Entry
from seqpar_ring.schedule import Call


class Mine:
    """A user's kernel: a reference that declares less."""

    name = "mine"

    def __init__(self, **can: Any) -> None:
        self.capabilities = Capabilities(dtypes=(torch.float32,), **can)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, scores: Scores) -> tuple[Tensor, Tensor]:
        return ReferenceKernel().forward(q, k, v, call, scores)

    def backward(self, dout: Tensor, kept: Kept, call: Call, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
        return ReferenceKernel().backward(dout, kept, call, scores)


@pytest.fixture
def registered(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    kernel = Mine(**request.param)
    register(kernel)
    yield kernel
    unregister(kernel.name)


GPU = ("flash3", "flash4", "cudnn", "torch_cudnn", "flash2", "torch_flash")
"""What is made for GPUs, in the order of preference."""


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Entry]:
    """A machine with a GPU and two kernels for it, whose trials find what the test writes here."""
    found: dict[str, Entry] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(registry, "tried", lambda kernel, request: found[kernel.name])
    monkeypatch.setattr(registry, "_KERNELS", {})
    monkeypatch.setattr(registry, "_CHOICES", {})
    for name, priority in (("quick", 300), ("slow", 200)):
        kernel = Mine(devices=("cuda",), priority=priority)
        kernel.name, kernel.capabilities = name, replace(kernel.capabilities, dtypes=(torch.bfloat16,))
        register(kernel)
    register(CpuKernel())
    register(ReferenceKernel())
    return found


def request(**changes: Any) -> Request:
    return Request("cpu", torch.float32, 64, 64, 8, 2)._replace(**changes)


def test_the_built_in_kernels_are_there_in_the_order_auto_prefers_them() -> None:
    assert names() == (*GPU, "cpu", "reference")
    assert isinstance(select(request()).kernel, Kernel)


def test_capabilities_with_a_list_are_refused_where_a_kernel_is_registered() -> None:
    devices: Any = ["cpu"]
    with pytest.raises(ConfigError, match=r"cannot be hashed .*mine.*list.*as tuples"):
        register(Mine(devices=devices))
    assert "mine" not in names()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_auto_takes_the_cpu_kernel_on_a_cpu(dtype: torch.dtype) -> None:
    kernel, reason = select(request(dtype=dtype, window=True))
    assert kernel.name == "cpu"
    assert reason == '"cpu": preferred of all that can'


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"softcap": True}, '"reference": "cpu" lacks softcap'),
        ({"alibi": True}, '"reference": "cpu" lacks ALiBi'),
    ],
    ids=["softcap", "ALiBi"],
)
def test_auto_falls_back_to_the_reference_and_says_what_the_cpu_kernel_lacks(
    changes: dict[str, Any], reason: str
) -> None:
    choice = select(request(**changes))
    assert (choice.kernel.name, choice.reason) == ("reference", reason)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_on_a_gpu_that_is_not_there_each_kernel_made_for_it_says_what_it_lacks() -> None:
    kernel, reason = select(request(device="cuda:1", dtype=torch.bfloat16))
    assert kernel.name == "reference"
    assert [part.split(" lacks ")[0] for part in reason.removeprefix('"reference": ').split("; ")] == [
        f'"{name}"' for name in GPU
    ]
    assert '"torch_flash" lacks a GPU with CUDA' in reason


@pytest.mark.parametrize(
    ("found", "chosen", "reason"),
    [
        (
            {"quick": Entry("", "", 600e12), "slow": Entry("", "", 350e12)},
            "quick",
            '"quick": 600 TFLOP/s here, "slow" 350',
        ),
        (
            {"quick": Entry("", "", 345e12), "slow": Entry("", "", 350e12)},
            "quick",
            '"quick": 345 TFLOP/s here, "slow" 350',
        ),
        (
            {"quick": Entry("", "", 300e12), "slow": Entry("", "", 350e12)},
            "slow",
            '"slow": 350 TFLOP/s here, "quick" 300',
        ),
        (
            {"quick": Entry("right answers here (dq is off by 0.5)", "", 0.0), "slow": Entry("", "", 350e12)},
            "slow",
            '"slow": 350 TFLOP/s here; "quick" lacks right answers here (dq is off by 0.5)',
        ),
        (
            {"quick": Entry("a working call", "", 0.0), "slow": Entry("right answers here", "", 0.0)},
            "reference",
            '"reference": "quick" lacks a working call; "slow" lacks right answers here',
        ),
    ],
    ids=["the fastest", "nearly as fast", "faster than the preferred", "one errs", "all err"],
)
def test_on_a_gpu_the_fastest_of_those_that_pass_a_trial_is_taken(
    found: dict[str, Entry], chosen: str, reason: str, on_gpu: dict[str, Entry]
) -> None:
    on_gpu.update(found)
    kernel, why = select(request(device="cuda", dtype=torch.bfloat16))
    assert kernel.name == chosen
    assert why == reason


def test_where_bits_must_be_the_same_each_time_no_clock_chooses(on_gpu: dict[str, Entry]) -> None:
    on_gpu.update({"quick": Entry("", "", 300e12), "slow": Entry("", "", 350e12)})
    for told, name in ((False, "slow"), (True, "quick")):
        asked = request(device="cuda", dtype=torch.bfloat16)._replace(deterministic=told)
        assert select(asked).kernel.name == name


def test_a_kernel_that_errs_in_empty_segments_gets_calls_without_them(on_gpu: dict[str, Entry]) -> None:
    gaps = "right answers here (out of empty segments is off by nan)"
    on_gpu.update({"quick": Entry("", gaps, 9e12), "slow": Entry("", "", 1e12)})
    kernel, why = select(request(device="cuda", dtype=torch.bfloat16))
    assert isinstance(kernel, Gapless)
    assert f"rows are gathered, as it lacks {gaps}" in why


def test_a_kernel_that_is_asked_for_by_name_and_errs_is_refused(on_gpu: dict[str, Entry]) -> None:
    on_gpu.update({"quick": Entry("right answers here (dq is off by 0.5)", "", 0.0), "slow": Entry("", "", 1e12)})
    with pytest.raises(UnsupportedError, match=r'"quick" lacks right answers here .* Use kernel "slow" or "reference"'):
        select(request(device="cuda", dtype=torch.bfloat16), "quick")


def test_kernels_that_need_squares_get_calls_that_are_cut() -> None:
    square = Mine(square=True, priority=500)
    register(square)
    try:
        kernel, why = select(request())
    finally:
        unregister(square.name)
    assert isinstance(kernel, Squares)
    assert why == '"mine": preferred of all that can; calls are cut into full and square causal blocks'


def test_a_dense_kernel_is_not_chosen_for_several_documents() -> None:
    can = Capabilities(dtypes=(torch.float32,), varlen=False)
    assert lacks(can, request(documents=1)) == ()
    assert lacks(can, request(documents=3)) == ("several documents in a call (3)",)


def test_a_gpu_of_another_architecture_and_widths_beyond_the_limit_are_lacks() -> None:
    can = Capabilities(dtypes=(torch.float32,), architectures=(9, 10), max_head_dim=128, more_widths=((192, 128),))
    assert lacks(can, request(architecture=9)) == ()
    assert lacks(can, request(architecture=8)) == ("GPUs of compute capability 8.x (has 9, 10)",)
    can = replace(can, unequal_value_dim=True)
    latent = request(head_dim=192, value_dim=128)
    assert lacks(can, latent._replace(kv_heads=latent.heads)) == ()
    assert lacks(can, latent._replace(heads=4, kv_heads=2)) == (
        "head width 192 (up to 128; these widths where no query heads share a key head)",
    )
    assert lacks(can, request(head_dim=192, value_dim=192)) == ("head width 192 (up to 128)",)


def test_who_cannot_give_the_same_bits_lacks_that_where_torch_is_told_to() -> None:
    can = Capabilities(dtypes=(torch.float32,), max_deterministic_dim=192, unequal_value_dim=True)
    wide = request(deterministic=True, value_dim=256)
    assert lacks(can, wide._replace(deterministic=False)) == lacks(can, request(deterministic=True)) == ()
    assert lacks(can, wide) == ("the same bits each time, at head width 256",)
    assert lacks(replace(can, max_deterministic_dim=0), request(deterministic=True)) != ()
    assert lacks(replace(can, max_deterministic_dim=None), wide) == ()


def test_only_who_is_to_raise_is_strict_about_determinism() -> None:
    assert deterministic()  # conftest
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert not deterministic()
    finally:
        torch.use_deterministic_algorithms(True)


def test_a_named_kernel_is_taken_though_auto_would_prefer_another() -> None:
    choice = select(request(), "reference")
    assert (choice.kernel.name, choice.reason) == ("reference", '"reference": asked for by name')


def test_an_unknown_kernel_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown kernel \[kernel='refrence'\]. Fix: Did you mean \"reference\"\?"):
        select(request(), "refrence")


def test_a_named_kernel_that_lacks_something_is_refused_and_the_one_that_could_is_named() -> None:
    with pytest.raises(
        UnsupportedError, match=r'kernel "cpu" lacks softcap\. Fix: Use kernel "reference", or "auto"\.'
    ):
        select(request(softcap=True), "cpu")


def test_a_request_no_kernel_can_serve_is_refused_with_what_each_lacks() -> None:
    with pytest.raises(UnsupportedError) as caught:
        select(request(dtype=torch.int8, softcap=True))
    message = str(caught.value)
    assert "cpu lacks int8 (has float64, float32, bfloat16, float16), softcap;" in message
    assert "reference lacks int8 (has float64, float32, bfloat16, float16) [" in message


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_heads_that_do_not_divide_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match="8 query heads over 3 key/value heads"):
        select(request(kv_heads=3), name)


@pytest.mark.parametrize("registered", [{"softcap": True}], indirect=True)
def test_a_users_kernel_comes_before_the_reference_and_after_the_cpu_kernel(registered: Kernel) -> None:
    assert names() == (*GPU, "cpu", "mine", "reference")
    assert select(request()).kernel.name == "cpu"
    assert select(request(softcap=True)).kernel is registered
    assert select(request(), "mine").kernel is registered


@pytest.mark.parametrize("registered", [{"priority": 200, "max_head_dim": 128}], indirect=True)
def test_a_users_kernel_with_a_higher_priority_is_preferred_where_it_can(registered: Kernel) -> None:
    assert select(request()).kernel is registered
    choice = select(request(head_dim=256, value_dim=256))
    assert (choice.kernel.name, choice.reason) == ("cpu", '"cpu": "mine" lacks head width 256 (up to 128)')


@pytest.mark.parametrize("registered", [{}], indirect=True)
def test_a_name_can_be_taken_once(registered: Kernel) -> None:
    with pytest.raises(ConfigError, match="registered already"):
        register(registered)
    assert names() == (*GPU, "cpu", "mine", "reference")


def test_auto_is_not_a_name_for_a_kernel() -> None:
    kernel = Mine()
    kernel.name = "auto"
    with pytest.raises(ConfigError, match="registered already"):
        register(kernel)


def test_unregistering_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown kernel"):
        unregister("mine")


def test_what_a_kernel_lacks_is_listed_completely() -> None:
    can = Capabilities(dtypes=(torch.bfloat16,), devices=("cuda",), max_head_dim=32, window=False)
    assert lacks(can, request(window=True, softcap=True, value_dim=48)) == (
        "device cpu (has cuda)",
        "float32 (has bfloat16)",
        "head width 64 (up to 32)",
        "sliding window",
        "softcap",
        "value width 48 beside head width 64",
    )


def test_a_kernel_whose_op_this_torch_lacks_says_so_with_torchs_version() -> None:
    kernel = CpuKernel("_no_such_op")
    assert lacks(kernel.capabilities, request()) == (f"aten._no_such_op (torch is {torch.__version__})",)
    x = torch.zeros(1, 3, 2, 4)
    with pytest.raises(UnsupportedError, match=r"it lacks aten._no_such_op \(torch is "):
        kernel.forward(x, x, x, Call(0, 0, 3, 3, (0, 3), (0, 3)), Scores(1.0))


def test_a_kernel_without_windows_refuses_a_call_with_one() -> None:
    class Windowless(ReferenceKernel):
        capabilities = replace(ReferenceKernel.capabilities, window=False)

    x = torch.zeros(1, 3, 2, 4)
    Windowless().forward(x, x, x, Call(0, 0, INF, 0, (0, 3), (0, 3)), Scores(1.0))
    with pytest.raises(UnsupportedError, match="it lacks sliding window"):
        Windowless().forward(x, x, x, Call(0, 0, 1, 0, (0, 3), (0, 3)), Scores(1.0))


def test_no_kernel_library_is_imported_with_the_package_nor_for_another_kernel(tmp_path: Path) -> None:
    """On a machine with a GPU: importing starts CUDA, and takes FA4's compiler seconds."""
    (tmp_path / "flash_attn_interface.py").write_text("def flash_attn_varlen_func(): ...\n")
    code = """
import sys, torch
asked = []
torch.cuda.is_available = lambda: asked.append(1) or True
from seqpar_ring import SequenceParallel, kernels
from seqpar_ring.kernels import registry
assert kernels.names()[0] == "flash3"
assert not asked and "flash_attn_interface" not in sys.modules
SequenceParallel(1, kernel="cpu").plan(8)
assert "flash_attn_interface" not in sys.modules
registry._KERNELS["flash3"].capabilities
assert "flash_attn_interface" in sys.modules, "the test shows nothing"
"""
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True, timeout=200)
