"""The operators that graphs are lowered to: what oneDNN's own library computes.

Each is an operator of PyTorch, in the namespace `fxopt`, so that a lowered graph can be printed,
checked and run like any other. A program calls what `PREPARATIONS` makes of it instead: once for
the constants, then for each input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import OpOverload
from torch.autograd import forward_ad

from fxopt.backends.eager.layout import channels_last_strides
from fxopt.backends.eager.onednn.convolution import Convolution
from fxopt.backends.eager.onednn.library import Library, OneDnnError, library
from fxopt.backends.eager.onednn.linear import Linear
from fxopt.backends.eager.onednn.max_pool import MaxPool
from fxopt.backends.eager.onednn.prepared import Prepared
from fxopt.backends.eager.onednn.primitives import DTYPES, Then

_NAMESPACE = torch.library.Library("fxopt", "DEF")


@dataclass(frozen=True)
class Preparation:
    """How an operator is prepared: `make` takes all but its first `tensors` arguments.

    What it makes takes those: the input, and for some what is added to the result.
    """

    make: Callable[..., Prepared]
    tensors: int = 1


def here() -> Library:
    """Return the library. Raises OneDnnError where there is none."""
    found = library()
    if found is None:
        raise OneDnnError("oneDNN's library is not installed: pip install 'fxopt[onednn]'.")
    return found


def _layer(kind: Callable[..., Prepared], other: str, count: int) -> Callable[..., Prepared]:
    """Return what prepares a layer of `count` arguments with what follows it."""

    def make(*args: Any) -> Prepared:
        layer, (activation, scalars) = args[:count], args[count:]
        return kind(here(), Then(activation, tuple(scalars), other), *layer)

    return make


def _pool(*args: Any) -> Prepared:
    return MaxPool(here(), *args)


def define(
    name: str,
    schema: str,
    preparation: Preparation,
    fake: Callable[..., torch.Tensor],
    kernel: Callable[..., torch.Tensor] | None = None,
) -> OpOverload:
    """Register an operator with the kernel that prepares and calls at once, unless given another.

    `fake` gives a result of the right shape and dtype.
    """
    _NAMESPACE.define(f"{name}{schema}")

    def run(*args: Any) -> torch.Tensor:
        prepared = preparation.make(*args[preparation.tensors :])
        return prepared(*args[: preparation.tensors])

    _NAMESPACE.impl(name, run if kernel is None else kernel, "CPU")
    torch.library.register_fake(f"fxopt::{name}", fake, lib=_NAMESPACE)
    target: OpOverload = getattr(torch.ops.fxopt, name).default
    PREPARATIONS[target] = preparation
    return target


def _fake_convolution(x: Any, weight: Any, bias: Any, *geometry: Any) -> torch.Tensor:
    convolve = torch.conv2d if x.dim() == 4 else torch.conv3d
    return _channels_last(convolve(x, weight, bias, *geometry[:4]))


def _fake_pool(x: Any, _: torch.dtype, *geometry: Any) -> torch.Tensor:
    return _channels_last(torch.max_pool2d(x, *geometry))


def _channels_last(result: torch.Tensor) -> torch.Tensor:
    strides = channels_last_strides(result.shape)
    return torch.empty_strided(
        result.shape, strides, dtype=result.dtype, device=result.device
    )


def can_read(inputs: Iterable[Any]) -> bool:
    """Whether kernels may be called on these inputs now: they read memory, and nobody sees that.

    What is no plain tensor may have no memory, or not hold its numbers there; what traces or
    transforms calls would miss these.
    """
    is_watched = (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )
    return not is_watched and all(map(_is_plain, inputs))


def _is_plain(value: Any) -> bool:
    if not isinstance(value, torch.Tensor):
        return True
    kind = type(value)
    return (
        (kind is torch.Tensor or kind is torch.nn.Parameter)
        and not value.is_meta
        and not value.is_neg()
        and not value._is_zerotensor()
    )


@functools.cache
def supports(dtype: torch.dtype) -> bool:
    """Whether the library is installed and has kernels for a dtype on this processor."""
    if library() is None or dtype not in DTYPES or not dtype.is_floating_point:
        return False
    x, weight = torch.zeros(1, 16, 4, 4, dtype=dtype), torch.zeros(16, 16, 1, 1, dtype=dtype)
    try:
        torch.ops.fxopt.convolution(x, weight, None, [1, 1], [0, 0], [1, 1], 1, "none", [])
        torch.ops.fxopt.linear(x[0, :, 0].t(), weight[:, :, 0, 0], None, "none", [])
    except OneDnnError:
        return False
    return True


def _define_layer(
    name: str, kind: Callable[..., Prepared], constants: str, fake: Callable[..., torch.Tensor]
) -> tuple[OpOverload, OpOverload, OpOverload]:
    """Register a layer with an activation behind it: alone, added to `other`, and over `other`."""
    schema = f"{constants}, str activation, float[] scalars"
    count = constants.count(",") + 1
    return (
        define(
            name, f"(Tensor x, {schema}) -> Tensor", Preparation(_layer(kind, "none", count)), fake
        ),
        define(
            f"{name}_add", f"(Tensor x, Tensor other, {schema}) -> Tensor",
            Preparation(_layer(kind, "read", count), 2),
            lambda x, other, *constants: fake(x, *constants),
        ),
        define(
            f"{name}_add_", f"(Tensor x, Tensor(a!) other, {schema}) -> Tensor(a!)",
            Preparation(_layer(kind, "written over", count), 2), lambda x, other, *_: other,
        ),
    )  # fmt: skip


PREPARATIONS: dict[OpOverload, Preparation] = {}
convolution, convolution_add, convolution_add_ = _define_layer(
    "convolution", Convolution,
    "Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups",
    _fake_convolution,
)  # fmt: skip
linear, linear_add, linear_add_ = _define_layer(
    "linear", Linear, "Tensor weight, Tensor? bias",
    lambda x, weight, bias, *_: F.linear(x, weight, bias),
)  # fmt: skip
max_pool = define(
    "max_pool",
    "(Tensor x, ScalarType dtype, int[] window, int[] stride, int[] padding, int[] dilation, "
    "bool ceil_mode) -> Tensor",
    Preparation(_pool),
    _fake_pool,
)
