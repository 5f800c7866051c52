"""Which kernel is chosen, why, and what is said when none can."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
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
    lacks,
    names,
    register,
    select,
    unregister,
)
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


def request(**changes: Any) -> Request:
    return Request("cpu", torch.float32, 64, 64, 8, 2)._replace(**changes)


def test_the_built_in_kernels_are_there_in_the_order_auto_prefers_them() -> None:
    assert names() == ("cpu", "reference")
    assert isinstance(select(request()).kernel, Kernel)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_auto_takes_the_cpu_kernel_on_a_cpu(dtype: torch.dtype) -> None:
    kernel, reason = select(request(dtype=dtype, window=True))
    assert kernel.name == "cpu"
    assert reason == '"cpu": preferred of all that can'


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cuda:1"}, '"reference": "cpu" lacks device cuda (has cpu)'),
        ({"softcap": True}, '"reference": "cpu" lacks softcap'),
        ({"alibi": True}, '"reference": "cpu" lacks ALiBi'),
    ],
    ids=["cuda", "softcap", "ALiBi"],
)
def test_auto_falls_back_to_the_reference_and_says_what_the_cpu_kernel_lacks(
    changes: dict[str, Any], reason: str
) -> None:
    choice = select(request(**changes))
    assert (choice.kernel.name, choice.reason) == ("reference", reason)


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
    assert names() == ("cpu", "mine", "reference")
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
    assert names() == ("cpu", "mine", "reference")


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
