"""What oneDNN's functions take and make, as objects that free what they hold."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from ctypes import c_int, c_void_p
from dataclasses import dataclass
from typing import Any

import torch

from fxopt.backends.eager.onednn.library import Library, OneDnnError, dims

DTYPES = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}
SOURCE, TARGET, WEIGHTS, BIAS, SCRATCHPAD = 1, 17, 33, 41, 80
OTHER = 32768 | 2  # the second argument of the first operation behind
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
_CLIP, _RELU, _ADD = 47, 32, 131056  # eltwise clip_v2 and relu, binary add
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

    `other` is "none"; "written over", where the result replaces it; or "read".
    """

    activation: str = "none"
    scalars: tuple[float, ...] = ()
    other: str = "none"


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
) -> Primitive:
    """Return a kernel that convolves."""
    around = dims(padding)
    with _Attributes(api, then, result) as attributes:
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
) -> Primitive:
    """Return a kernel that multiplies matrices."""
    with _Attributes(api, then, result) as attributes:
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
    with _Attributes(api, Then(), result) as attributes:
        description = api.made(
            "pooling_forward_primitive_desc_create", api.engine, _INFERENCE, _MAX_POOL, x.handle,
            result.handle, dims(stride), dims(kernel), dims([step - 1 for step in dilation]),
            dims(padding), dims(padding_end), attributes,
        )  # fmt: skip
    return Primitive(api, description)


def reordered(source: Memory, target: Descriptor) -> Memory:
    """Return the same numbers, laid out as `target` says."""
    api = target.api
    description = api.made(
        "reorder_primitive_desc_create", source.descriptor.handle, api.engine, target.handle,
        api.engine, None,
    )  # fmt: skip
    primitive = Primitive(api, description)
    result = Memory.new(target)
    arguments = primitive.arguments({SOURCE: source, TARGET: result})
    if api.execute(primitive.handle, api.stream, len(arguments), arguments):
        raise OneDnnError("oneDNN could not lay a weight out in memory.")
    return result


class _Attributes:
    """What a kernel is to do with its result, and that its scratchpad comes from outside."""

    def __init__(self, api: Library, then: Then, result: Descriptor) -> None:
        self.api = api
        self.then = then
        self.result = result

    def __enter__(self) -> c_void_p:
        api = self.api
        self._operations = api.made("post_ops_create")
        self._attributes = api.made("primitive_attr_create")
        try:
            if self.then.other == "written over":
                api.post_ops_append_sum(self._operations, 1.0, 0, 0)
            elif self.then.other == "read":
                api.post_ops_append_binary(self._operations, _ADD, self.result.handle)
            if self.then.activation != "none":
                api.post_ops_append_eltwise(self._operations, *_eltwise(self.then))
            api.primitive_attr_set_post_ops(self._attributes, self._operations)
            api.primitive_attr_set_scratchpad_mode(self._attributes, _USER_SCRATCHPAD)
        except OneDnnError:
            self.__exit__()
            raise
        return self._attributes

    def __exit__(self, *_: object) -> None:
        self.api.primitive_attr_destroy(self._attributes)
        self.api.post_ops_destroy(self._operations)


def _eltwise(then: Then) -> tuple[int, float, float]:
    if then.activation == "leaky_relu":
        return _RELU, then.scalars[0], 0.0
    if then.activation == "hardtanh":
        return _CLIP, then.scalars[0], then.scalars[1]
    return ACTIVATIONS[then.activation]
