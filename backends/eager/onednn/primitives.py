"""What oneDNN's functions take and make, as objects that free what they hold."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Mapping, Sequence
from ctypes import c_int, c_void_p
from dataclasses import dataclass, field
from typing import Any

import torch

from fxopt.backends.eager.onednn.library import Library, OneDnnError, dims

DTYPES = {
    torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.int32: 4, torch.int8: 5,
    torch.uint8: 6,
}  # fmt: skip
SOURCE, TARGET, WEIGHTS, BIAS, SCRATCHPAD = 1, 17, 33, 41, 80
OTHER = 32768 | 2  # the second argument of the first operation behind
SCALES, ZERO_POINTS = 4096, 8192  # of an argument: added to its number
_ANY = 1  # a layout of oneDNN's choice
_INFERENCE = 96
_USER_SCRATCHPAD = 1
_ALIGNMENT = 64  # bytes
_QUERY = {SOURCE: 129, WEIGHTS: 131, TARGET: 133, SCRATCHPAD: 136}

# Activations: name → algorithm, alpha, beta; see "Eltwise" in the oneDNN developer guide.
ACTIVATIONS: dict[str, tuple[int, float, float]] = {
    "relu": (32, 0.0, 0.0),
    "tanh": (33, 0.0, 0.0),
    "sigmoid": (41, 0.0, 0.0),
    "swish": (44, 1.0, 0.0),
    "hardswish": (52, 1 / 6, 0.5),
    "hardsigmoid": (40, 1 / 6, 0.5),
    "gelu_none": (49, 0.0, 0.0),
    "gelu_tanh": (43, 0.0, 0.0),
}
_CLIP, _RELU, _LINEAR = 47, 32, 38  # eltwise clip_v2, relu and linear
_ADD = 131056  # binary add
_DIRECT = 1  # convolution
_MAX_POOL = 511


class Descriptor:
    """How a tensor lies in memory: sizes, dtype, and strides or a layout of oneDNN's own."""

    def __init__(self, api: Library, handle: c_void_p) -> None:
        self.api = api
        self.handle = handle
        weakref.finalize(self, api.memory_desc_destroy, handle).atexit = False

    @classmethod
    def strided(
        cls, api: Library, sizes: Sequence[int], strides: Sequence[int], dtype: torch.dtype
    ) -> Descriptor:
        """Return the descriptor of a tensor as PyTorch has it."""
        made = api.made(
            "memory_desc_create_with_strides", len(sizes), dims(sizes), DTYPES[dtype],
            dims(strides),
        )  # fmt: skip
        return cls(api, made)

    @classmethod
    def free(cls, api: Library, sizes: Sequence[int], dtype: torch.dtype) -> Descriptor:
        """Return the descriptor of a tensor whose layout oneDNN is to choose."""
        made = api.made(
            "memory_desc_create_with_tag", len(sizes), dims(sizes), DTYPES[dtype], _ANY
        )
        return cls(api, made)

    @property
    def size(self) -> int:
        """The bytes that such a tensor takes."""
        return int(self.api.memory_desc_get_size(self.handle))

    def equals(self, other: Descriptor) -> bool:
        """Whether two tensors lie alike."""
        return bool(self.api.memory_desc_equal(self.handle, other.handle))


@dataclass(frozen=True)
class Then:
    """What a kernel does to its result before it writes it: `activation(result [+ other])`.

    `other` is "none"; "written over", where the result replaces it; or "read". Then comes a factor,
    and what lies outside of `bounds` becomes the nearest of them.
    """

    activation: str = "none"
    scalars: tuple[float, ...] = ()
    other: str = "none"
    factor: float = 1.0
    bounds: tuple[float, float] | None = None


class Memory:
    """A place for a tensor that lies as a descriptor says; `handle` is oneDNN's object."""

    def __init__(self, descriptor: Descriptor, tensor: torch.Tensor | None = None) -> None:
        api = descriptor.api
        self.descriptor = descriptor
        self.tensor = tensor  # keeps what the handle points to
        address = c_void_p(None if tensor is None else tensor.data_ptr())
        self.handle = api.made("memory_create", descriptor.handle, api.engine, address)
        weakref.finalize(self, api.memory_destroy, self.handle).atexit = False

    @classmethod
    def new(cls, descriptor: Descriptor) -> Memory:
        """Return memory of its own."""
        room = torch.empty(descriptor.size + _ALIGNMENT, dtype=torch.uint8)
        start = -room.data_ptr() % _ALIGNMENT
        return cls(descriptor, room[start:])


@dataclass(frozen=True)
class Grids:
    """The scales and zero points of a kernel's arguments, each itself an argument of every call.

    A weight's scales differ along the dimensions whose bits are set in `weight_mask`.
    """

    memories: Mapping[int, Memory] = field(default_factory=dict)
    weight_mask: int = 0


NO_GRIDS = Grids()


class Primitive:
    """A kernel for one shape of inputs."""

    def __init__(self, api: Library, description: c_void_p) -> None:
        self.api = api
        self._description = description
        weakref.finalize(self, api.primitive_desc_destroy, description).atexit = False
        self.handle = api.made("primitive_create", description)
        weakref.finalize(self, api.primitive_destroy, self.handle).atexit = False
        self.scratchpad = self.descriptor(SCRATCHPAD)

    def descriptor(self, which: int) -> Descriptor:
        """Return how the kernel wants an argument to lie."""
        found = self.api.primitive_desc_query_md(self._description, _QUERY[which], 0)
        if not found:
            raise OneDnnError(f"oneDNN's kernel has no argument {which}.")
        return Descriptor(self.api, self.api.made("memory_desc_clone", found))

    def arguments(self, memories: Mapping[int, Memory]) -> Any:
        """Return the arguments of a call, as oneDNN's function takes them."""
        rows = [_Argument(number, memory.handle) for number, memory in memories.items()]
        return (_Argument * len(rows))(*rows)


class _Argument(ctypes.Structure):
    _fields_ = [("number", c_int), ("memory", c_void_p)]


def convolution(
    api: Library,
    x: Descriptor,
    weight: Descriptor,
    bias: Descriptor | None,
    result: Descriptor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    then: Then,
    other: Descriptor | None = None,
    grids: Grids = NO_GRIDS,
) -> Primitive:
    """Return a kernel that convolves."""
    around = dims(padding)
    with _Attributes(api, then, other or result, grids) as attributes:
        description = api.made(
            "convolution_forward_primitive_desc_create", api.engine, _INFERENCE, _DIRECT,
            x.handle, weight.handle, bias and bias.handle, result.handle, dims(stride),
            dims([step - 1 for step in dilation]), around, around, attributes,
        )  # fmt: skip
    return Primitive(api, description)


def matrix_product(
    api: Library,
    x: Descriptor,
    weight: Descriptor,
    bias: Descriptor | None,
    result: Descriptor,
    then: Then,
    other: Descriptor | None = None,
    grids: Grids = NO_GRIDS,
) -> Primitive:
    """Return a kernel that multiplies matrices."""
    with _Attributes(api, then, other or result, grids) as attributes:
        description = api.made(
            "matmul_primitive_desc_create", api.engine, x.handle, weight.handle,
            bias and bias.handle, result.handle, attributes,
        )  # fmt: skip
    return Primitive(api, description)


def max_pool(
    api: Library,
    x: Descriptor,
    result: Descriptor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    padding_end: Sequence[int],
) -> Primitive:
    """Return a kernel that takes the largest value of each window."""
    with _Attributes(api, Then(), None) as attributes:
        description = api.made(
            "pooling_forward_primitive_desc_create", api.engine, _INFERENCE, _MAX_POOL, x.handle,
            result.handle, dims(stride), dims(kernel), dims([step - 1 for step in dilation]),
            dims(padding), dims(padding_end), attributes,
        )  # fmt: skip
    return Primitive(api, description)


def conversion(source: Descriptor, target: Descriptor, grids: Grids = NO_GRIDS) -> Primitive:
    """Return a kernel that writes the same numbers in another layout, dtype or grid."""
    api = target.api
    with _Attributes(api, Then(), None, grids) as attributes:
        description = api.made(
            "reorder_primitive_desc_create", source.handle, api.engine, target.handle,
            api.engine, attributes,
        )  # fmt: skip
    return Primitive(api, description)


def reordered(source: Memory, target: Descriptor) -> Memory:
    """Return the same numbers, laid out as `target` says."""
    api = target.api
    primitive = conversion(source.descriptor, target)
    result = Memory.new(target)
    scratchpad = Memory.new(primitive.scratchpad)
    memories = {SOURCE: source, TARGET: result, SCRATCHPAD: scratchpad}
    arguments = primitive.arguments(memories)
    if api.execute(primitive.handle, api.stream, len(arguments), arguments):
        raise OneDnnError("oneDNN could not lay a weight out in memory.")
    return result


class _Attributes:
    """What a kernel is to do with its result, and that its scratchpad comes from outside."""

    def __init__(
        self, api: Library, then: Then, other: Descriptor | None, grids: Grids = NO_GRIDS
    ) -> None:
        self.api = api
        self.then = then
        self.other = other
        self.grids = grids

    def __enter__(self) -> c_void_p:
        api = self.api
        self._operations = api.made("post_ops_create")
        self._attributes = api.made("primitive_attr_create")
        try:
            if self.then.other == "written over":
                api.post_ops_append_sum(self._operations, 1.0, 0, 0)
            elif self.then.other == "read" and self.other is not None:
                api.post_ops_append_binary(self._operations, _ADD, self.other.handle)
            for operation in _eltwise(self.then):
                api.post_ops_append_eltwise(self._operations, *operation)
            for number in self.grids.memories:
                self._set_mask(number)
            api.primitive_attr_set_post_ops(self._attributes, self._operations)
            api.primitive_attr_set_scratchpad_mode(self._attributes, _USER_SCRATCHPAD)
        except OneDnnError:
            self.__exit__()
            raise
        return self._attributes

    def _set_mask(self, number: int) -> None:
        """Announce the scales or zero points that calls are given under this number."""
        if number & ZERO_POINTS:
            self.api.primitive_attr_set_zero_points_mask(self._attributes, number - ZERO_POINTS, 0)
            return
        argument = number - SCALES
        mask = self.grids.weight_mask if argument == WEIGHTS else 0
        self.api.primitive_attr_set_scales_mask(self._attributes, argument, mask)

    def __exit__(self, *_: object) -> None:
        self.api.primitive_attr_destroy(self._attributes)
        self.api.post_ops_destroy(self._operations)


def _eltwise(then: Then) -> Iterator[tuple[int, float, float]]:
    """Yield what is done to each element, in order."""
    if then.activation == "leaky_relu":
        yield _RELU, then.scalars[0], 0.0
    elif then.activation == "hardtanh":
        yield _CLIP, then.scalars[0], then.scalars[1]
    elif then.activation != "none":
        yield ACTIVATIONS[then.activation]
    if then.factor != 1.0:
        yield _LINEAR, then.factor, 0.0
    if then.bounds is not None:
        yield _CLIP, *then.bounds
