"""Fake quantization, as ONNX writes quantized models: QuantizeLinear and DequantizeLinear.

    fake_quantize(x, s, z, qmin, qmax)   →   DequantizeLinear(QuantizeLinear(x, s, z), s, z)
    fake_quantize(weight, s, z, …)       →   DequantizeLinear(integers, s, z)

Runtimes make one layer that computes with integers of a layer between such nodes. What the file
holds of a weight are its integers. ONNX Runtime's CPU kernels want integers of a bias, too, with
the scale s_x · s_w; a bias that an int32 cannot hold is added behind the layer.

A range narrower than 8 bits is cut off behind QuantizeLinear on ONNX Runtime's CPU, where a Clip in
front would keep the layer before it in floats; elsewhere in front, where other engines look for it.
Activations of 9 to 16 bits need opset 21 there; OpenVINO would leave out their rounding. Otherwise,
in float64, and for scales that are no constants or vary along several dimensions, floating-point
operators round.

Weights of layers that compute in floats on ONNX Runtime's CPU come from their integers by Cast and
Mul, and so do those with scales along several dimensions: groups. The runtime computes these once,
a DequantizeLinear at each run; and it would turn that with a MatMul into one that rounds the other
operand, too, which nobody asked for. No other layer of it takes integers of 4 bits, so these are
stored as 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.backends.onnx.describe import all_rules, shape_of
from fxopt.backends.onnx.emit import Emitter, Value
from fxopt.backends.onnx.registry import emits
from fxopt.quantization.operator import fake_quantize

aten = torch.ops.aten

_NARROW = (torch.uint8, torch.int8)
_OPSET_OF_WIDE = 21
# Layers that ONNX Runtime's CPU computes with integers, or dequantizes the weights for, and the
# dimension of the weight along which scales may vary: that of the outputs.
_LAYERS = {
    aten.linear.default: 0, aten.matmul.default: 1, aten.mm.default: 1,
    aten.conv1d.default: 0, aten.conv2d.default: 0, aten.conv3d.default: 0,
    aten.conv1d.padding: 0, aten.conv2d.padding: 0, aten.conv3d.padding: 0,
    aten.conv_transpose1d.default: 1, aten.conv_transpose2d.input: 1,
    aten.conv_transpose3d.input: 1,
}  # fmt: skip
_POOLS = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)


@dataclass(frozen=True)
class _Form:
    """Integers q = clamp(round(x / s), qmin − z, qmax − z) + zero, from `low` to `high`."""

    dtype: torch.dtype
    axis: int | None  # along which scales and zero points vary; None for one of each
    zero: torch.Tensor
    low: int
    high: int

    @property
    def is_cut(self) -> bool:
        """Whether the range ends before the type does."""
        limits = torch.iinfo(self.dtype)
        return self.low > limits.min or self.high < limits.max


@emits(fake_quantize)
def _fake_quantize(
    e: Emitter, x: Any, scale: Any, zero_point: Any, qmin: int, qmax: int
) -> Value | None:
    node = e.node
    if is_weight(e, node):
        return None if is_left_to_linears(e, node) else weight(e, node)
    form = _form(e, node)
    if form is None:
        return _in_floats(e, node)
    value = e.operand(x, torch.float32)
    is_cut_behind = e.on_cpu and form.dtype in _NARROW
    if form.is_cut and not is_cut_behind:
        value = _cut_in_front(e, value, node)
    given = _scales(e, scale, form), _zeros(e, form)
    steps = e.op("QuantizeLinear", value, *given, axis=form.axis)
    if form.is_cut and is_cut_behind:
        ends = [e.constant(torch.tensor(end, dtype=form.dtype)) for end in (form.low, form.high)]
        steps = e.op("Clip", steps, *ends)
    value = e.op("DequantizeLinear", steps, *given, axis=form.axis)
    return e.cast(value, torch.float32, _dtype(e, node))


def _form(e: Emitter, node: fx.Node, *, centred: bool = False) -> _Form | None:
    """Return the integers of a call; None where QuantizeLinear has none for it.

    `centred` asks for zero points of 0 where they are possible, as weights may have them.
    """
    x, scale, zero_point, qmin, qmax = _arguments(node)
    s, z = e.tensor(scale), e.tensor(zero_point)
    if s is None or z is None or _wide(node) is torch.float64:
        return None
    z = z.expand(torch.broadcast_shapes(s.shape, z.shape))
    axes = [axis for axis, size in enumerate(z.shape) if size != 1]
    rank = len(shape_of(node))
    axis = axes[0] + rank - z.dim() if axes else None
    if len(axes) > 1 or len(shape_of(x)) != rank:
        return None
    if axis is not None and shape_of(x)[axis] != z.numel():
        return None  # x has it by broadcasting only
    for dtype, zero in _choices(e, z, qmin, centred):
        limits = torch.iinfo(dtype)
        low, high = int((qmin - z + zero).min()), int((qmax - z + zero).max())
        used = (low, high, int(zero.min()), int(zero.max()))
        if all(limits.min <= number <= limits.max for number in used):
            return _Form(dtype, axis, zero, low, high)
    return None


def _choices(
    e: Emitter, z: torch.Tensor, qmin: int, centred: bool
) -> Iterator[tuple[torch.dtype, torch.Tensor]]:
    """Yield types and zero points, the best first."""
    if centred:
        yield torch.int8, torch.zeros_like(z)
    yield torch.uint8, z
    if e.on_cpu:  # its kernels read and write one type, and are faster with this one
        yield torch.uint8, z - qmin
    yield torch.int8, z
    yield torch.uint8, z - qmin
    if e.on_cpu and e.opset >= _OPSET_OF_WIDE and not centred:
        yield torch.uint16, z
        yield torch.int16, z
        yield torch.uint16, z - qmin


def _cut_in_front(e: Emitter, value: Value, node: fx.Node) -> Value:
    """(qmin − z) · s ≤ x ≤ (qmax − z) · s, whose ends are rounded to themselves afterwards."""
    _, scale, zero_point, qmin, qmax = _arguments(node)
    for op_type, end in (("Max", qmin), ("Min", qmax)):

        def limit(s: torch.Tensor, z: torch.Tensor, end: int = end) -> torch.Tensor:
            return (end - z).float() * s.float()

        value = e.op(op_type, value, e.weights([scale, zero_point], f"at_{end}", limit))
    return value


def _in_floats(e: Emitter, node: fx.Node) -> Value:
    """min(max(round(x / s), qmin − z), qmax − z) · s"""
    x, scale, zero_point, qmin, qmax = _arguments(node)
    e.note(
        f"fake_quantize from {qmin} to {qmax} rounds with floating-point operators: QuantizeLinear "
        "takes float32, one constant scale or one per channel, and beyond 8 bits opset 21."
    )
    wide = _wide(node)
    scales, zeros = e.operand(scale, wide), e.operand(zero_point, wide)
    steps = e.op("Round", e.op("Div", e.operand(x, wide), scales))
    steps = e.op("Max", steps, e.op("Sub", e.number(float(qmin), wide), zeros))
    steps = e.op("Min", steps, e.op("Sub", e.number(float(qmax), wide), zeros))
    return e.cast(e.op("Mul", steps, scales), wide, _dtype(e, node))


def _scales(e: Emitter, scale: fx.Node, form: _Form) -> Value:
    """Return scales as QuantizeLinear takes them: without dimensions, or with one."""
    shape = () if form.axis is None else (form.zero.numel(),)
    how = "x".join(("scale", *map(str, shape)))
    return e.weights([scale], how, lambda s: s.float().expand(form.zero.shape).reshape(shape))


def _zeros(e: Emitter, form: _Form) -> Value:
    return e.constant(form.zero.to(form.dtype).reshape(() if form.axis is None else -1))


# -- weights ---------------------------------------------------------------------------------------


def is_weight(e: Emitter, node: Any) -> bool:
    """Whether a node is the fake quantization of a constant, or of a view of one."""
    if not _is_call(node):
        return False
    x, scale, zero_point = _arguments(node)[:3]
    return all(e.tensor(given) is not None for given in (_moved(x)[0], scale, zero_point))


def _moved(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Return what a node moves the elements of, and the calls that do, the last one first."""
    calls = []
    while _moves(node) and node.all_input_nodes == [node.args[0]]:
        calls.append(node)
        node = node.all_input_nodes[0]
    return node, calls


def _moves(node: fx.Node) -> bool:
    """Whether a call makes one tensor of the elements of another."""
    rule = all_rules().get(node.target)
    return rule is not None and rule.moves and isinstance(node.meta.get("val"), torch.Tensor)


def is_left_to_linears(e: Emitter, node: Any) -> bool:
    """Whether a node is a quantized weight of linear layers alone, each of which emits it."""

    def is_weight_of(layer: fx.Node) -> bool:
        is_linear = layer.target is aten.linear.default
        return is_linear and layer.args[1] is node and layer.args[0] is not node

    return is_weight(e, node) and len(shape_of(node)) == 2 and all(map(is_weight_of, node.users))


def weight(e: Emitter, node: fx.Node, *, turned: bool = False) -> Value:
    """Return a quantized constant, or its transpose, made from integers in the file."""
    x, scale, zero_point, qmin, qmax = _arguments(node)
    constant, moves = _moved(x)
    form = _form(e, node, centred=True) if _is_dequantized(e, node) else None
    z = e.tensor(zero_point)
    assert z is not None
    kind = form.dtype if form is not None else _smallest(qmin - z, qmax - z)
    wide, dtype = _wide(node), _dtype(e, node)

    def integers(w: torch.Tensor, s: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        for call in reversed(moves):
            w = call.target(w, *call.args[1:], **call.kwargs)  # type: ignore[operator]
        steps = (w.to(wide) / s.to(wide)).round().clamp(qmin - z, qmax - z)
        steps = steps if form is None else steps + form.zero
        return _laid_out(steps, turned).to(kind)

    turn = ".T" if turned else ""
    view = f".{moves[0].name}" if moves else ""
    name = f"{qmin}_to_{qmax}{'.cast' if form is None else ''}{view}{turn}"
    stored = e.weights([constant, scale, zero_point], name, integers)
    if form is not None:
        axis = 1 - form.axis if turned and form.axis is not None else form.axis
        given = _scales(e, scale, form), _zeros(e, form)
        value = e.op("DequantizeLinear", stored, *given, axis=axis)
        return e.cast(value, torch.float32, dtype)
    name = f"{str(wide).removeprefix('torch.')}{turn}"
    scales = e.weights([scale], name, lambda s: _laid_out(s.to(wide), turned))
    return e.cast(e.op("Mul", e.convert(stored, wide), scales), wide, dtype)


def _smallest(low: torch.Tensor, high: torch.Tensor) -> torch.dtype:
    """Return the smallest type that ONNX's Cast reads, for integers of these ranges."""
    for dtype in (torch.int8, torch.uint8, torch.int16):
        limits = torch.iinfo(dtype)
        if limits.min <= int(low.min()) and int(high.max()) <= limits.max:
            return dtype
    return torch.int32


def _laid_out(tensor: torch.Tensor, turned: bool) -> torch.Tensor:
    """Return a matrix, or what broadcasts against one, transposed if so asked."""
    return torch.atleast_2d(tensor).T if turned else tensor


def _is_dequantized(e: Emitter, node: fx.Node) -> bool:
    """Whether the runtime shall see a weight's integers."""
    return not e.on_cpu or any(_multiplies_integers(e, node, user) for user in node.users)


def _multiplies_integers(e: Emitter, node: fx.Node, layer: fx.Node) -> bool:
    """Whether ONNX Runtime's CPU may compute a layer with a weight's integers."""
    if layer.target not in _LAYERS or layer.args[1] is not node:
        return False
    form = _form(e, node, centred=True)
    if form is None or form.axis not in (None, _LAYERS[layer.target]):
        return False
    return _activation(e, layer.args[0]) is not None


def _activation(e: Emitter, node: Any) -> fx.Node | None:
    """Return the fake quantization of 8 bits whose values a node holds, in one scale."""
    while isinstance(node, fx.Node) and (node.target in _POOLS or _moves(node)):
        node = node.args[0]
    if not _is_call(node) or is_weight(e, node) or node.meta["val"].dtype is not torch.float32:
        return None
    form = _form(e, node)
    narrow = form is not None and form.dtype in _NARROW and form.axis is None
    return node if narrow else None


# -- biases ----------------------------------------------------------------------------------------


def bias(e: Emitter, x: Any, weights: Any, given: Any) -> tuple[Value | None, Value | None]:
    """Return the bias that a layer takes, and the one to be added to its result.

    Between a quantized activation and a quantized weight, ONNX Runtime's CPU has kernels for an
    int32 bias of scale s_x · s_w. It makes one of a float bias too, but of one that does not fit it
    makes another number.
    """
    if not e.on_cpu and is_weight(e, weights) and _is_uniform(e, given):
        return _nearly_uniform(e, weights, given), None
    if given is None or not e.on_cpu or not is_weight(e, weights) or e.tensor(given) is None:
        return (None if given is None else e.value(given)), None
    activation = _activation(e, x)
    form = _form(e, weights, centred=True)
    if activation is None or form is None or not _multiplies_integers(e, weights, e.node):
        return e.value(given), None
    nodes = [given, _arguments(activation)[1], _arguments(weights)[1]]
    b, s_x, s_w = (e.tensor(node) for node in nodes)
    assert b is not None and s_x is not None and s_w is not None

    def scales(b: torch.Tensor, s_x: torch.Tensor, s_w: torch.Tensor) -> torch.Tensor:
        product = s_x.float().reshape(()) * s_w.float().reshape(-1)
        return product.repeat(b.numel() // product.numel())  # once for each group

    def integers(b: torch.Tensor, s_x: torch.Tensor, s_w: torch.Tensor) -> torch.Tensor:
        return (b.double() / scales(b, s_x, s_w).double()).round()

    if not bool((integers(b, s_x, s_w).abs() < 2**31).all()):
        return None, e.value(given)
    stored = e.weights(nodes, "int32", lambda *tensors: integers(*tensors).to(torch.int32))
    zeros = e.constant(torch.zeros(b.shape, dtype=torch.int32))
    return e.op("DequantizeLinear", stored, e.weights(nodes, "scales", scales), zeros, axis=0), None


def _is_uniform(e: Emitter, bias: Any) -> bool:
    """Whether a linear layer adds the same number to each output, or none."""
    if e.node.target is not aten.linear.default:
        return False
    tensor = None if bias is None else e.tensor(bias)
    return bias is None or (tensor is not None and bool((tensor == tensor.reshape(-1)[:1]).all()))


def _nearly_uniform(e: Emitter, weights: Any, bias: Any) -> Value:
    """Return a bias that differs by less than any step, for OpenVINO.

    With none, or one number for all outputs, a product of few rows with a ReLU and a rounding
    behind it returns what it finds in memory (seen in 2026.4).
    """
    outputs = shape_of(weights)[0]
    tensor = None if bias is None else e.tensor(bias)
    number = torch.zeros(1) if tensor is None else tensor.detach().reshape(-1)[:1].float()
    ramp = torch.linspace(1, 2, outputs)
    near = ramp * 1e-30 if float(number) == 0 else number * (1 + ramp * 2.0**-22)
    return e.constant(near.to(_dtype(e, weights)))


# -- what a call is given --------------------------------------------------------------------------


def _is_call(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is fake_quantize


def _arguments(node: fx.Node) -> Any:
    return node.args


def _wide(node: fx.Node) -> torch.dtype:
    """Return the type that a call computes in."""
    return torch.float64 if node.meta["val"].dtype is torch.float64 else torch.float32


def _dtype(e: Emitter, node: fx.Node) -> torch.dtype:
    return e.shadow_of(node.meta["val"].dtype)
