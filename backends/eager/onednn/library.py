"""oneDNN's own shared library, where one is installed, and its C interface.

PyTorch holds a oneDNN, too, but describes each call to it anew: that takes some 36 µs, as long as
a small network's layer. Here a kernel is made once and called in 3 µs. Both use the same threads:
the library must be built for GNU OpenMP, as PyTorch is, whose copy of that is already loaded.

See the oneDNN developer guide, "C API", for what each function does.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.metadata
import os
from collections.abc import Iterator
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch  # loads the OpenMP that the library is to find

from fxopt.errors import FxoptError

_OMP = 2  # dnnl_cpu_runtime_omp
_MAJOR = 3  # version 3 changed the interface
_PACKAGES = ("onednn-cpu-gomp",)
_DIMS = c_int64 * 12
_STATUS = {
    1: "out of memory", 2: "invalid arguments", 3: "not implemented", 5: "a runtime error",
    6: "not required", 7: "the graph is invalid",
}  # fmt: skip

# bits of dnnl_cpu_isa_t: sums of products of bytes, in registers of 256 and of 512 bits
_VNNI = 0x08 | 0x40

_P = c_void_p
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "dnnl_engine_create": (POINTER(_P), c_int, c_size_t),
    "dnnl_stream_create": (POINTER(_P), _P, c_int),
    "dnnl_memory_desc_create_with_strides": (POINTER(_P), c_int, _DIMS, c_int, _DIMS),
    "dnnl_memory_desc_create_with_tag": (POINTER(_P), c_int, _DIMS, c_int, c_int),
    "dnnl_memory_desc_clone": (POINTER(_P), _P),
    "dnnl_memory_desc_destroy": (_P,),
    "dnnl_memory_create": (POINTER(_P), _P, _P, _P),
    "dnnl_memory_destroy": (_P,),
    "dnnl_post_ops_create": (POINTER(_P),),
    "dnnl_post_ops_destroy": (_P,),
    "dnnl_post_ops_append_eltwise": (_P, c_int, c_float, c_float),
    "dnnl_post_ops_append_sum": (_P, c_float, c_int32, c_int),
    "dnnl_post_ops_append_binary": (_P, c_int, _P),
    "dnnl_primitive_attr_create": (POINTER(_P),),
    "dnnl_primitive_attr_destroy": (_P,),
    "dnnl_primitive_attr_set_post_ops": (_P, _P),
    "dnnl_primitive_attr_set_scratchpad_mode": (_P, c_int),
    "dnnl_primitive_attr_set_scales_mask": (_P, c_int, c_int),
    "dnnl_primitive_attr_set_zero_points_mask": (_P, c_int, c_int),
    "dnnl_convolution_forward_primitive_desc_create": (
        POINTER(_P), _P, c_int, c_int, _P, _P, _P, _P, _DIMS, _DIMS, _DIMS, _DIMS, _P,
    ),
    "dnnl_matmul_primitive_desc_create": (POINTER(_P), _P, _P, _P, _P, _P, _P),
    "dnnl_pooling_forward_primitive_desc_create": (
        POINTER(_P), _P, c_int, c_int, _P, _P, _DIMS, _DIMS, _DIMS, _DIMS, _DIMS, _P,
    ),
    "dnnl_reorder_primitive_desc_create": (POINTER(_P), _P, _P, _P, _P, _P),
    "dnnl_primitive_desc_destroy": (_P,),
    "dnnl_primitive_create": (POINTER(_P), _P),
    "dnnl_primitive_destroy": (_P,),
}  # fmt: skip


class OneDnnError(FxoptError):
    """oneDNN refused a call."""


class Library:
    """The functions of one shared library; each raises OneDnnError where oneDNN reports one.

    `engine` and `stream` are the processor and its queue, which is empty: calls finish.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._raw = ctypes.CDLL(path)
        version = self._raw.dnnl_version
        version.restype = POINTER(_Version)
        found = version().contents
        self.version = f"{found.major}.{found.minor}.{found.patch}"
        if found.major != _MAJOR or found.cpu_runtime != _OMP:
            raise OSError(
                f"'{path}' is oneDNN {self.version}, which is not version {_MAJOR} or not built "
                "for OpenMP"
            )
        for name, types in _SIGNATURES.items():
            function = getattr(self._raw, name)
            function.argtypes = types
            function.restype = c_int
            function.errcheck = _checked
            setattr(self, name.removeprefix("dnnl_"), function)
        self._declare_others()
        self.engine = self.made("engine_create", 1, 0)
        self.stream = self.made("stream_create", self.engine, 1)

    @property
    def multiplies_bytes(self) -> bool:
        """Whether the kernels that are used here multiply bytes exactly.

        Without instructions for that, sums of two products are kept in 16 bits, and cut off there.
        """
        return bool(self._raw.dnnl_get_effective_cpu_isa() & _VNNI)

    def made(self, name: str, *args: Any) -> c_void_p:
        """Call a function that makes an object, and return the object."""
        handle = c_void_p()
        getattr(self, name)(ctypes.byref(handle), *args)
        return handle

    def _declare_others(self) -> None:
        """Declare what reports no status, and what runs for each call of a kernel."""
        raw = self._raw
        raw.dnnl_memory_desc_get_size.restype = c_size_t
        raw.dnnl_memory_desc_get_size.argtypes = (_P,)
        self.memory_desc_get_size = raw.dnnl_memory_desc_get_size
        raw.dnnl_memory_desc_equal.argtypes = (_P, _P)
        self.memory_desc_equal = raw.dnnl_memory_desc_equal
        raw.dnnl_primitive_desc_query_md.restype = _P
        raw.dnnl_primitive_desc_query_md.argtypes = (_P, c_int, c_int)
        self.primitive_desc_query_md = raw.dnnl_primitive_desc_query_md
        raw.dnnl_primitive_execute.argtypes = (_P, _P, c_int, _P)
        self.execute = raw.dnnl_primitive_execute
        # so short that letting other Python threads run meanwhile would take longer
        holding = ctypes.PyDLL(self.path)
        holding.dnnl_memory_set_data_handle.argtypes = (_P, _P)
        self.set_data_handle = holding.dnnl_memory_set_data_handle

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"oneDNN's '{name}' is not declared here")


class _Version(ctypes.Structure):
    _fields_ = [
        ("major", c_int), ("minor", c_int), ("patch", c_int), ("hash", ctypes.c_char_p),
        ("cpu_runtime", ctypes.c_uint), ("gpu_runtime", ctypes.c_uint),
    ]  # fmt: skip


def dims(sizes: Any) -> Any:
    """Return sizes as oneDNN's functions want them."""
    return _DIMS(*sizes)


@functools.cache
def library() -> Library | None:
    """Return the installed library, None where there is none that shares PyTorch's threads.

    `FXOPT_ONEDNN` names another one; what it names must be usable: OSError otherwise. An empty
    value turns it off.
    """
    given = os.environ.get("FXOPT_ONEDNN")
    if given is not None:
        return Library(given) if given else None
    if not torch.backends.openmp.is_available():
        return None
    for path in _installed():
        try:
            return Library(str(path))
        except OSError:  # of another processor, or another version
            continue
    return None


def _installed() -> Iterator[Path]:
    for package in _PACKAGES:
        try:
            files = importlib.metadata.files(package) or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name == f"libdnnl.so.{_MAJOR}":
                yield Path(str(file.locate())).resolve()


def _checked(status: int, function: Any, args: Any) -> int:
    if status:
        raise OneDnnError(f"oneDNN's {function.__name__}: {_STATUS.get(status, status)}.")
    return status
