"""Operators whose constants are packed once, and whose kernels are made once per shape.

A call is: find the kernel by the input's shape and strides, make room for the result, tell oneDNN
both addresses, run. Kernels are shared by all threads; the objects that hold addresses are not.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fxopt.backends.eager.layout import laid_out
from fxopt.backends.eager.onednn.library import Library, OneDnnError
from fxopt.backends.eager.onednn.primitives import (
    BIAS,
    NO_GRIDS,
    OTHER,
    SCRATCHPAD,
    SOURCE,
    TARGET,
    WEIGHTS,
    Descriptor,
    Memory,
    Primitive,
    Then,
    reordered,
)

Call = Callable[..., torch.Tensor]
_KEPT = 256  # shapes of inputs for which kernels are kept


@dataclass(frozen=True)
class Kernel:
    """A kernel for inputs of one shape that lie in one way."""

    primitive: Primitive
    x: Descriptor
    x_strides: tuple[int, ...]  # of the tensor as the caller has it
    result: Descriptor
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    constants: dict[int, Memory] = field(default_factory=dict)
    other: Descriptor | None = None  # of what is added to the result
    other_dtype: torch.dtype | None = None


class Prepared(ABC):
    """An operator for inputs of any shape, in any number of threads."""

    def __init__(self, api: Library, dtype: torch.dtype, then: Then) -> None:
        self.api = api
        self.dtype = self.result_dtype = self.other_dtype = dtype
        self.then = then
        self.grids = NO_GRIDS
        self._kernels: dict[tuple[tuple[int, ...], tuple[int, ...], int], Kernel] = {}
        self._making = threading.Lock()
        self._here = _OfThread()

    def __call__(self, x: torch.Tensor, *other: torch.Tensor) -> torch.Tensor:
        """Return the result in memory of its own, or in that of `other`, if so prepared."""
        calls = self._here.calls
        # oneDNN makes a kernel for a number of threads
        key = (x.shape, x.stride(), x.dtype, x.is_cpu, torch.get_num_threads())
        call = calls.get(key)
        if call is None:
            if len(calls) >= _KEPT:
                calls.clear()
            call = calls[key] = self._call_for(x)
        return call(x, *other)

    @abstractmethod
    def result_sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sizes of the result for inputs of these sizes."""

    @abstractmethod
    def obstacle(self, sizes: tuple[int, ...]) -> str | None:
        """Why inputs of these sizes cannot be computed on, in words; None where they can."""

    @abstractmethod
    def strides_for(self, x: torch.Tensor) -> tuple[int, ...]:
        """Return how an input is to lie: it is copied where it lies differently."""

    @abstractmethod
    def make(self, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Kernel:
        """Return the kernel for inputs of these sizes and strides."""

    def _call_for(self, x: torch.Tensor) -> Call:
        """Return what runs for inputs like `x`, in this thread."""
        if x.dtype is not self.dtype or x.device.type != "cpu":
            raise OneDnnError(
                f"A kernel for {self.dtype} on the CPU was called with {x.dtype} on {x.device}."
            )
        sizes = tuple(x.shape)
        why = self.obstacle(sizes)
        if why is not None:
            raise OneDnnError(
                f"Inputs {list(sizes)} do not fit: {why}. Check the shapes that the model is given."
            )
        wanted = self.result_sizes(sizes)
        if math.prod(wanted) == 0:
            return lambda *_: torch.empty(wanted, dtype=self.result_dtype)
        kernel = self._kernel(sizes, self.strides_for(x))
        call = _bound(self.api, kernel, self.then)
        if laid_out(x, kernel.x_strides) is x:
            return call
        return lambda x, *other: call(laid_out(x, kernel.x_strides), *other)

    def _kernel(self, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Kernel:
        key = (sizes, strides, torch.get_num_threads())
        with self._making:
            if key not in self._kernels:
                if len(self._kernels) >= _KEPT:
                    self._kernels.clear()
                self._kernels[key] = self.make(sizes, strides)
            return self._kernels[key]


class _OfThread(threading.local):
    """The calls that one thread has made ready."""

    def __init__(self) -> None:
        self.calls: dict[Any, Call] = {}


class Constants:
    """The weight and bias of an operator; the weight in each layout that a kernel asked for."""

    def __init__(self, api: Library, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """`weight` and `bias` are views of the dimensions that oneDNN wants."""
        self.free = Descriptor.free(api, weight.shape, weight.dtype)
        self._plain = _memory_of(api, weight)
        self._packed: list[Memory] = []
        self.bias = None if bias is None else _memory_of(api, bias.contiguous())

    @property
    def bias_descriptor(self) -> Descriptor | None:
        """How the bias lies."""
        return None if self.bias is None else self.bias.descriptor

    def of(self, primitive: Primitive) -> dict[int, Memory]:
        """Return the constants as a kernel wants them."""
        wanted = primitive.descriptor(WEIGHTS)
        for packed in self._packed:
            if packed.descriptor.equals(wanted):
                break
        else:
            packed = reordered(self._plain, wanted)
            self._packed.append(packed)
        return {WEIGHTS: packed} if self.bias is None else {WEIGHTS: packed, BIAS: self.bias}


def _memory_of(api: Library, tensor: torch.Tensor) -> Memory:
    """Return the memory of a tensor, as it lies."""
    return Memory(Descriptor.strided(api, tensor.shape, tensor.stride(), tensor.dtype), tensor)


def _bound(api: Library, kernel: Kernel, then: Then) -> Call:
    """Return a function that runs a kernel, with memory objects of its own."""
    primitive = kernel.primitive
    source, target = Memory(kernel.x), Memory(kernel.result)
    scratchpad, added = Memory(primitive.scratchpad), Memory(kernel.other or kernel.result)
    memories = {SOURCE: source, TARGET: target, **kernel.constants}
    room = primitive.scratchpad.size
    if room:
        memories[SCRATCHPAD] = scratchpad
    if then.other == "read":
        memories[OTHER] = added
    arguments = primitive.arguments(memories)
    count = len(arguments)

    # names of this function are found faster than attributes
    execute, place, stream, handle = api.execute, api.set_data_handle, api.stream, primitive.handle
    x_at, y_at, other_at, scratchpad_at = (m.handle for m in (source, target, added, scratchpad))
    empty, empty_strided, byte = torch.empty, torch.empty_strided, torch.uint8
    sizes, strides, dtype = kernel.sizes, kernel.strides, kernel.dtype
    other_dtype = kernel.other_dtype or dtype

    def launch(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        place(x_at, x.data_ptr())
        place(y_at, y.data_ptr())
        if room:
            scratch = empty(room, dtype=byte)
            place(scratchpad_at, scratch.data_ptr())
        if execute(handle, stream, count, arguments):
            raise OneDnnError(f"oneDNN's kernel for inputs {list(x.shape)} failed.")
        return y

    def plain(x: torch.Tensor) -> torch.Tensor:
        return launch(x, empty_strided(sizes, strides, dtype=dtype))

    def adding(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        other = ready(other)
        place(other_at, other.data_ptr())
        return launch(x, empty_strided(sizes, strides, dtype=dtype))

    def writing_over(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return launch(x, ready(other))

    def ready(other: torch.Tensor) -> torch.Tensor:
        if other.shape != sizes or other.dtype is not other_dtype:
            raise OneDnnError(
                f"{list(other.shape)} {other.dtype} cannot be added to {list(sizes)} "
                f"{other_dtype}."
            )
        return laid_out(other, strides)

    calls: dict[str, Call] = {"none": plain, "read": adding, "written over": writing_over}
    call = calls[then.other]
    # the arguments point to these, and end when the call does
    call.held = (kernel, *memories.values())  # type: ignore[attr-defined]
    return call
