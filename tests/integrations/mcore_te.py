"""A stand-in for Transformer Engine, of which Megatron takes its layers: the same classes and keywords on plain torch.

Import it before megatron.core, in a process of its own: it puts `transformer_engine` among the modules that there are,
and Megatron then builds its Transformer Engine specs. Linear layers, norms and grouped layers compute, split as
Transformer Engine splits them, by Megatron's own communication. Its attention does not: a ring stands in for that.
Kernels, FP8 and all that makes Transformer Engine fast are absent. For tests only.
"""

from __future__ import annotations

import contextlib
import enum
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

VERSION = "2.6.0"
"""What it says it is: new enough for all that megatron-core 0.15 to 0.19 builds, and without kernels for routers."""

COLUMN, ROW = 0, 1
"""The dimension of a weight (out, in) that a column-parallel or row-parallel layer splits."""


def _parameter(shape: tuple[int, ...], dtype: torch.dtype | None, fill: float | None = None) -> nn.Parameter:
    made = torch.empty(shape, dtype=dtype, device="cpu")
    return nn.Parameter(made if fill is None else made.fill_(fill))


class Linear(nn.Module):
    """A linear layer, whole or one tensor-parallel rank's part."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        init_method: Callable[[Tensor], Any] | None = None,
        tp_group: Any = None,
        tp_size: int = 1,
        parallel_mode: str | None = None,
        sequence_parallel: bool = False,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.tp_group, self.parallel_mode, self.return_bias = tp_group, parallel_mode, return_bias
        self.sequence_parallel = sequence_parallel and parallel_mode is not None
        rows, columns = (tp_size if parallel_mode == mode else 1 for mode in ("column", "row"))
        self.weight = _parameter((out_features // rows, in_features // columns), params_dtype)
        self.bias = _parameter((out_features // rows,), params_dtype, 0.0) if bias else None
        split = [self.weight] if parallel_mode == "row" or self.bias is None else [self.weight, self.bias]
        for parameter in split if parallel_mode else []:
            parameter.tensor_model_parallel, parameter.partition_stride = True, 1
            parameter.partition_dim = ROW if parallel_mode == "row" else COLUMN
        if init_method is not None:
            init_method(self.weight)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        out = self._reduced(functional.linear(self._gathered(x), self.weight, None if self.return_bias else self.bias))
        return (out, self.bias) if self.return_bias else out

    def _gathered(self, x: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        if self.parallel_mode != "column" or self.tp_group is None:
            return x
        if self.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(x, group=self.tp_group)
        return mappings.copy_to_tensor_model_parallel_region(x, group=self.tp_group)

    def _reduced(self, out: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        if self.parallel_mode != "row" or self.tp_group is None:
            return out
        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
        return mappings.reduce_from_tensor_model_parallel_region(out, group=self.tp_group)


def _normal(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm where there is a bias, else RMSNorm."""
    if bias is None:
        return functional.rms_norm(x, weight.shape, weight, eps)
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


class LayerNormLinear(Linear):
    """A norm, and a linear layer behind it."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        params_dtype: torch.dtype | None = None,
        **others: Any,
    ) -> None:
        super().__init__(in_features, out_features, params_dtype=params_dtype, **others)
        self.eps = eps
        self.layer_norm_weight = _parameter((in_features,), params_dtype, 1.0)
        self.layer_norm_bias = _parameter((in_features,), params_dtype, 0.0) if normalization == "LayerNorm" else None
        for parameter in (self.layer_norm_weight, self.layer_norm_bias):
            if parameter is not None:
                parameter.sequence_parallel = self.sequence_parallel

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        return super().forward(_normal(x, self.layer_norm_weight, self.layer_norm_bias, self.eps))


class RMSNorm(nn.Module):
    """x / rms(x), scaled."""

    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        hidden_size: int | None = None,  # as it was called before
        **_: Any,
    ) -> None:
        super().__init__()
        self.eps, self.bias = eps, None
        self.weight: Any = _parameter((normalized_shape or hidden_size or 0,), params_dtype, 1.0)
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return _normal(x, self.weight, self.bias, self.eps)


class LayerNorm(RMSNorm):
    """With a mean taken off, and a bias."""

    def __init__(self, *given: Any, **others: Any) -> None:
        super().__init__(*given, **others)
        self.bias: Any = _parameter(tuple(self.weight.shape), self.weight.dtype, 0.0)
        self.bias.sequence_parallel = self.weight.sequence_parallel


class GroupedLinear(nn.Module):
    """One linear layer for each expert: rows come expert by expert, so many of each."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        init_method: Callable[[Tensor], Any] | None = None,
        params_dtype: torch.dtype | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.num_gemms = num_gemms
        for i in range(num_gemms):
            weight = _parameter((out_features, in_features), params_dtype)
            if init_method is not None:
                init_method(weight)
            self.register_parameter(f"weight{i}", weight)

    def forward(self, x: Tensor, m_splits: Sequence[int], is_first_microbatch: bool | None = None) -> Tensor:
        parts = x.split([int(n) for n in m_splits])
        return torch.cat([functional.linear(part, getattr(self, f"weight{i}")) for i, part in enumerate(parts)])


class DotProductAttention(nn.Module):
    """Never to be called: whoever builds a layer with it and trains has not got a ring."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, *_: Any, **__: Any) -> Tensor:
        raise AssertionError("Transformer Engine's attention was called, which should be a ring's")


class Format(enum.Enum):
    """Formats of FP8."""

    E4M3 = "e4m3"
    HYBRID = "hybrid"


class Recipe:
    """How to scale in FP8."""

    def __init__(self, **options: Any) -> None:
        self.__dict__.update(options)


class QuantizedTensor:
    """A tensor in FP8: there are none."""


class FP8GlobalStateManager:
    """Whether FP8 is on: it is not."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


class CudaRNGStatesTracker:
    """States of random numbers; nothing here draws any."""

    def reset(self) -> None:
        self.states: dict[str, Any] = {}

    def set_states(self, states: dict[str, Any]) -> None:
        self.states = states

    def add(self, name: str, seed: int) -> None:
        self.states[name] = seed


def _absent(*_: Any, **__: Any) -> None:
    raise AssertionError("a function of Transformer Engine was called that only FP8 needs")


def install() -> None:
    """Make it what `import transformer_engine` finds."""
    recipes = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling")
    layers = (Linear, LayerNormLinear, RMSNorm, LayerNorm, GroupedLinear, DotProductAttention)
    contents: dict[str, dict[str, Any]] = {
        "": {"__version__": VERSION},
        "common": {},
        "common.recipe": {"Format": Format, **{name: type(name, (Recipe,), {}) for name in recipes}},
        "pytorch": {one.__name__: one for one in layers},
        "pytorch.fp8": {
            "FP8GlobalStateManager": FP8GlobalStateManager,
            **dict.fromkeys(("fp8_autocast", "fp8_model_init"), contextlib.nullcontext),
        },
        "pytorch.ops": {"Sequential": nn.Sequential, "FusibleOperation": nn.Module},
        "pytorch.tensor": {"QuantizedTensor": QuantizedTensor},
        "pytorch.distributed": {
            "CudaRNGStatesTracker": CudaRNGStatesTracker,
            **dict.fromkeys(("activation_recompute_forward", "is_fp8_activation_recompute_enabled"), _absent),
        },
    }
    for name, content in contents.items():
        path = ".".join(["transformer_engine", *filter(None, [name])])
        module = types.ModuleType(path)
        module.__dict__.update(
            content, __path__=[], __spec__=importlib.machinery.ModuleSpec(path, None, is_package=True)
        )
        sys.modules[path] = module
        if name:
            parent, _, own = path.rpartition(".")
            setattr(sys.modules[parent], own, module)


if "megatron.core" in sys.modules:
    raise RuntimeError(
        "the stand-in comes before megatron.core, which looks for Transformer Engine while it is imported"
    )
install()
