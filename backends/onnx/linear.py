"""Matrix products: linear layers, matmul and its relatives, einsum, distances."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.backends.onnx import quantization
from fxopt.backends.onnx.describe import shape_of
from fxopt.backends.onnx.dtypes import FLOATS
from fxopt.backends.onnx.emit import Emitter, Value
from fxopt.backends.onnx.registry import emits


@emits("linear")
def _linear(e: Emitter, x: Any, weight: Any, bias: Any) -> Value:
    is_gemm = len(shape_of(x)) == 2 and len(shape_of(weight)) == 2
    is_turned = not is_gemm or _is_stored_turned(e, weight)
    matrix = _transposed(e, weight) if is_turned else _matrix(e, weight)
    within, behind = quantization.bias(e, x, weight, bias)
    if is_gemm:
        result = e.op("Gemm", x, matrix, within, transB=None if is_turned else 1)
    else:
        result = e.op("MatMul", x, matrix)
        result = result if within is None else e.op("Add", result, within)
    return result if behind is None else e.op("Add", result, behind)


def _matrix(e: Emitter, weight: Any) -> Value:
    is_left = quantization.is_left_to_linears(e, weight)
    return quantization.weight(e, weight) if is_left else e.value(weight)


def _transposed(e: Emitter, weight: Any) -> Value:
    if len(shape_of(weight)) < 2:
        return e.value(weight)
    if quantization.is_left_to_linears(e, weight):
        return quantization.weight(e, weight, turned=True)
    if _is_stored_turned(e, weight):
        return e.weight(weight, "T", lambda t: t.T)
    # a tied weight is stored once; the runtime turns it when it loads
    return e.op("Transpose", weight, perm=[1, 0])


def _is_stored_turned(e: Emitter, weight: Any) -> bool:
    """Whether a weight is a constant of linear layers alone, some of whose inputs are no matrices.

    A MatMul needs it transposed; a Gemm takes it either way.
    """
    if quantization.is_left_to_linears(e, weight):
        return any(len(shape_of(user.args[0])) != 2 for user in weight.users)
    tensor = e.tensor(weight)
    if tensor is None:
        return False
    layers = [(user, node) for node in e.readers(tensor) for user in node.users]
    return all(_is_weight_of(user, node) for user, node in layers) and any(
        len(shape_of(user.args[0])) != 2 for user, _ in layers
    )


def _is_weight_of(layer: fx.Node, weight: fx.Node) -> bool:
    is_linear = layer.target is torch.ops.aten.linear.default
    return is_linear and layer.args[1] is weight and layer.args[0] is not weight


@emits("matmul", "mm", "bmm", "dot", "vdot", "mv", "__matmul__")
def _matmul(e: Emitter, a: Any, b: Any) -> Value:
    if not e.out_shape and len(shape_of(a)) == 1:
        return e.op("ReduceSum", e.op("Mul", a, b), keepdims=0)
    dtype = e.out_dtype
    if dtype in FLOATS or dtype in (torch.int32, torch.int64):
        return e.op("MatMul", a, b)
    product = e.op("MatMul", e.operand(a, torch.int32), e.operand(b, torch.int32))
    return e.cast(product, torch.int32, dtype)


@emits("outer", "ger")
def _outer(e: Emitter, a: Any, b: Any) -> Value:
    left = e.op("Reshape", e.operand(a, e.out_dtype), [-1, 1])
    return e.op("Mul", left, e.operand(b, e.out_dtype))


@emits("addmm")
def _addmm(e: Emitter, bias: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Value:
    if e.out_dtype not in FLOATS:
        return _add_product(e, bias, a, b, beta, alpha)
    return e.op("Gemm", a, b, None if beta == 0 else bias, alpha=float(alpha), beta=float(beta))


@emits("baddbmm", "addbmm", "addmv")
def _baddbmm(e: Emitter, bias: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Value:
    if e.called.startswith("addbmm"):
        product = e.op("ReduceSum", e.op("MatMul", a, b), [0], keepdims=0)
        return _combined(e, bias, product, beta, alpha)
    return _add_product(e, bias, a, b, beta, alpha)


@emits("addr")
def _addr(e: Emitter, bias: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Value:
    product = e.op("Mul", e.op("Unsqueeze", a, [1]), b)
    return _combined(e, bias, product, beta, alpha)


def _add_product(e: Emitter, bias: Any, a: Any, b: Any, beta: Any, alpha: Any) -> Value:
    return _combined(e, bias, e.op("MatMul", a, b), beta, alpha)


def _combined(e: Emitter, bias: Any, product: Value, beta: Any, alpha: Any) -> Value:
    dtype = e.out_dtype
    if alpha != 1:
        product = e.op("Mul", product, e.number(alpha, dtype))
    if beta == 0:
        return product
    value = e.operand(bias, dtype)
    if beta != 1:
        value = e.op("Mul", value, e.number(beta, dtype))
    return e.op("Add", value, product)


@emits("einsum")
def _einsum(e: Emitter, equation: str, tensors: list[Any], path: Any = None) -> Value:
    equation = equation.replace(" ", "")
    if len(tensors) == 2 and (product := _as_matmul(e, equation, tensors)) is not None:
        return product
    dtype = e.out_dtype
    return e.op("Einsum", *(e.operand(x, dtype) for x in tensors), equation=equation)


def _as_matmul(e: Emitter, equation: str, tensors: list[Any]) -> Value | None:
    """Return the MatMul that an einsum of matrices with a shared batch is, where it is one."""
    left, _, out = equation.partition("->")
    a, _, b = left.partition(",")
    if "." in equation or not out or len(a) != len(b) or len(a) != len(out) or len(a) < 2:
        return None
    batch, rows, columns = out[:-2], out[-2], out[-1]
    if len(set(a)) != len(a) or len(set(b)) != len(b) or not a.startswith(batch):
        return None
    inner = set(a) - set(batch) - {rows}
    if len(inner) != 1 or not b.startswith(batch):
        return None
    (k,) = inner
    if set(a) != {*batch, rows, k} or set(b) != {*batch, k, columns} or rows == columns:
        return None
    turn = [*range(len(batch)), len(batch) + 1, len(batch)]
    dtype = e.out_dtype
    x, y = (e.operand(t, dtype) for t in tensors)
    if a != batch + rows + k:
        x = e.op("Transpose", x, perm=turn)
    if b != batch + k + columns:
        y = e.op("Transpose", y, perm=turn)
    return e.op("MatMul", x, y)


@emits("bilinear")
def _bilinear(e: Emitter, a: Any, b: Any, weight: Any, bias: Any) -> Value:
    value = e.op("Einsum", a, weight, b, equation="...i,kij,...j->...k")
    return value if bias is None else e.op("Add", value, bias)


@emits("cdist", "_cdist_forward")
def _cdist(e: Emitter, a: Any, b: Any, p: float, mode: Any = None) -> Value:
    rank = len(shape_of(a))
    gap = e.op("Sub", e.op("Unsqueeze", a, [rank - 1]), e.op("Unsqueeze", b, [rank - 2]))
    if p == 2:
        return e.op("ReduceL2", gap, [-1], keepdims=0)
    if p == 1:
        return e.op("ReduceL1", gap, [-1], keepdims=0)
    dtype = e.out_dtype
    powers = e.op("Pow", e.op("Abs", gap), e.number(p, dtype))
    return e.op("Pow", e.op("ReduceSum", powers, [-1], keepdims=0), e.number(1.0 / p, dtype))


@emits("linalg_cross", "cross")
def _cross(e: Emitter, a: Any, b: Any, dim: Any = -1) -> Value:
    dim = -1 if dim is None else dim
    ahead, behind = (e.constant(torch.tensor(o)) for o in ([1, 2, 0], [2, 0, 1]))

    def turned(x: fx.Node, order: Value) -> Value:
        return e.op("Gather", x, order, axis=dim)

    left = e.op("Mul", turned(a, ahead), turned(b, behind))
    return e.op("Sub", left, e.op("Mul", turned(a, behind), turned(b, ahead)))


@emits("det", "linalg_det")
def _det(e: Emitter, x: Any) -> Value:
    return e.op("Det", x)
