"""What a oneDNN kernel does to its result before it writes it: an addition, an activation."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.rewrite import Rewriter
from fxopt.shapes import dtype_of, is_tensor, same_metadata

aten = torch.ops.aten
mkldnn = torch.ops.mkldnn


@dataclass(frozen=True)
class Unary:
    """An activation as oneDNN's operators spell it."""

    name: str = "none"
    scalars: tuple[float, ...] = ()
    algorithm: str = ""

    @property
    def spelled(self) -> tuple[str, list[float]]:
        """Return the name and numbers that oneDNN's own library is given."""
        name = f"{self.name}_{self.algorithm}" if self.algorithm else self.name
        return name, list(self.scalars)


@dataclass(frozen=True)
class Epilogue:
    """What is done to a layer's result: `unary(result + other)`, and the nodes that say so."""

    nodes: tuple[fx.Node, ...] = ()  # in order; the last one's value is what the kernel writes
    other: fx.Node | None = None
    unary: Unary = Unary()

    def last_of(self, layer: fx.Node) -> fx.Node:
        """Return the node that has the final value."""
        return self.nodes[-1] if self.nodes else layer

    def inputs(self, x: fx.Node) -> tuple[fx.Node, ...]:
        """Return what the layer and its epilogue read beside constants, each once."""
        found = (x,) if self.other is None else (x, self.other)
        return tuple(dict.fromkeys(one for one in found if one.op != "get_attr"))

    def apply(self, rewriter: Rewriter, layer: fx.Node, new: fx.Node) -> fx.Node:
        """Insert the epilogue's nodes once more, behind `new` in the place of `layer`."""
        last, twins = self.last_of(layer), {layer: new}
        for node in self.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda a: twins.get(a, a))
            twins[node] = rewriter.insert(
                node.target, *args, before=last, origin=node, like=node, **kwargs
            )
        return twins[last]


def unary_of(node: fx.Node) -> Unary | None:
    """Return the activation that a node is, None where oneDNN has none for it."""
    args: Any = node.args
    match node.target:
        case aten.relu.default:
            return Unary("relu")
        case aten.sigmoid.default:
            return Unary("sigmoid")
        case aten.tanh.default:
            return Unary("tanh")
        case aten.silu.default:
            return Unary("swish")
        case aten.hardswish.default:
            return Unary("hardswish")
        case aten.hardsigmoid.default:
            return Unary("hardsigmoid")
        case aten.gelu.default:
            return Unary("gelu", (), str(node.kwargs["approximate"]))
        case aten.leaky_relu.default if args[1] > 0:
            return Unary("leaky_relu", (float(args[1]),))
        case aten.hardtanh.default:
            return Unary("hardtanh", (float(args[1]), float(args[2])))
    return None


def epilogue_of(layer: fx.Node, *, activation_after_sum: bool) -> Epilogue:
    """Return all that can be done to the result of `layer` as it is written.

    Only the layer's one user, and that one's, can be: a value that others read must be written.
    """
    activation = activation_of(layer)
    user = _only_user(layer)
    if user is None or activation.nodes:
        return activation
    other = _other_summand(user, layer)
    if other is None:
        return Epilogue()
    after = _only_user(user) if activation_after_sum else None
    if after is not None and after.target is aten.relu.default:
        return Epilogue((user, after), other, Unary("relu"))
    return Epilogue((user,), other)


def activation_of(layer: fx.Node) -> Epilogue:
    """Return the activation that alone reads the result of `layer`, if there is one."""
    user = _only_user(layer)
    unary = None if user is None else unary_of(user)
    if user is None or unary is None or not same_metadata(user, layer):
        return Epilogue()
    return Epilogue((user,), None, unary)


def onednn_obstacle(node: fx.Node) -> str | None:
    """Why oneDNN has no kernel for a layer here, in words."""
    if node.meta["val"].device.type != "cpu":
        return f"it runs on {node.meta['val'].device.type}"
    if dtype_of(node) not in onednn_dtypes():
        return f"oneDNN has no kernels for {dtype_of(node)} here"
    return None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other_summand(node: fx.Node, layer: fx.Node) -> fx.Node | None:
    """Return what a node adds to the value of `layer`, of the same shape; None for all else."""
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
        return None
    a, b = node.args[:2]
    other: Any = b if a is layer else a
    if other is layer or not is_tensor(other) or not same_metadata(other, layer):
        return None
    return other if same_metadata(node, layer) else None


@functools.cache
def onednn_dtypes() -> frozenset[torch.dtype]:
    """Return the dtypes that oneDNN has fast kernels for on this machine; none without oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    found = {torch.float32}
    if mkldnn._is_mkldnn_bf16_supported():
        found.add(torch.bfloat16)
    if mkldnn._is_mkldnn_fp16_supported():
        found.add(torch.float16)
    return frozenset(found)
