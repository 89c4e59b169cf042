"""Let the convolutions of a CUDA graph compute channels last.

Before                                   After
    y = conv2d(x, w, b)                      v = clone(w, memory_format=channels_last)
                                             y = conv2d(x, v, b)

cuDNN's kernels for tensor cores read channels last; what lies otherwise they transpose, at every
call. PyTorch convolves channels last where the input or the weight lies so, gives its result that
layout, and what computes element by element, normalises or pools keeps it. So it is enough to lay
the weights, once, and all convolutions change together: between two layouts each layer would copy.

The rule is: in float16 and bfloat16, which tensor cores compute in, unless all convolutions are
depthwise and leave them nothing to do. Where a GPU is at hand, the whole graph is timed both ways
on its example inputs, and the rule only breaks ties; then float32 may change, too, which uses
tensor cores as far as the user allows TF32.

Left alone: weights that are not constant; float64, which PyTorch convolves channels first; what is
on another device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.affine import is_constant
from fxopt.backends.eager.program import program_of
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.devices import waiter
from fxopt.effects import is_pure
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.shapes import dtype_of, rank_of, shape_of
from fxopt.text import graph_text
from fxopt.timings import Timings

aten = torch.ops.aten
_CONVOLUTIONS = (
    aten.conv2d.default, aten.conv3d.default,
    aten.conv_transpose2d.input, aten.conv_transpose3d.input,
)  # fmt: skip
_LAYOUT = {4: torch.channels_last, 5: torch.channels_last_3d}
_HALF = (torch.float16, torch.bfloat16)
_NAMES = ("channels last", "channels first")


@dataclass(frozen=True)
class UseChannelsLast:
    """Lay the weights of convolutions on CUDA so that they compute channels last."""

    timings: Timings | None = field(default=None, compare=False)

    name: ClassVar[str] = "use-channels-last"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Lay all weights, or none."""
        rewriter = Rewriter(graph)
        found = []
        for node in graph.find(*_CONVOLUTIONS):
            why = _obstacle(graph, node)
            if why is None:
                found.append(node)
            else:
                rewriter.miss(node, why)
        why = self._drawback(graph, found) if found else None
        for node in found:
            if why is None:
                _lay(rewriter, node)
            else:
                rewriter.miss(node, why)
        return rewriter.result()

    def _drawback(self, graph: GraphModule, found: Sequence[fx.Node]) -> str | None:
        """Why channels last is no better, in words: measured where possible, else by rule."""
        by_rule = any(dtype_of(node) in _HALF and not _is_depthwise(node) for node in found)
        examples = None if self.timings is None else examples_on_gpu(graph)
        if self.timings is None or examples is None:
            return None if by_rule else "only depthwise ones are in half precision, or none"
        names = _NAMES if by_rule else _NAMES[::-1]  # the first one breaks ties
        question = f"{' '.join(names)}\n{gpu(examples)}\n{graph_text(graph)}"
        answer = self.timings.known(question)
        if answer not in names:
            twin = graph.copy()
            rewriter = Rewriter(twin)
            for node in found:
                _lay(rewriter, next(n for n in twin.find(node.target) if n.name == node.name))
            rewriter.result()
            graphs = dict(zip(_NAMES, (twin, graph), strict=True))
            answer = self.timings.fastest(
                question, {name: _runner(graphs[name], examples) for name in names}
            )
        return None if answer == _NAMES[0] else "channels first is faster here"


def _obstacle(graph: GraphModule, node: fx.Node) -> str | None:
    """Why a convolution is left as it is, in words."""
    device = node.meta["val"].device
    if device.type != "cuda":
        return f"it runs on {device.type}"
    if not is_constant(graph, node.args[1]):
        return "its weight is not constant"
    if dtype_of(node) not in (*_HALF, torch.float32):
        return f"PyTorch convolves {dtype_of(node)} channels first"
    return None


def _is_depthwise(node: fx.Node) -> bool:
    """Whether no two channels meet in a convolution."""
    args: Any = node.args
    x, weight, groups = args[0], args[1], args[6]  # of transposed convolutions, too
    return groups != 1 and bool(groups == shape_of(x)[1 - rank_of(weight)])


def _lay(rewriter: Rewriter, node: fx.Node) -> None:
    args: Any = node.args
    x, weight, *rest = args
    laid = rewriter.insert(
        aten.clone.default, weight, memory_format=_LAYOUT[rank_of(weight)],
        before=node, origin=node, like=weight,
    )  # fmt: skip
    new = rewriter.insert(node.target, x, laid, *rest, before=node, origin=node, like=node)
    rewriter.replace(node, new)


def examples_on_gpu(graph: GraphModule) -> tuple[Any, ...] | None:
    """Return example inputs to time a graph on; None without, and where a run leaves traces."""
    examples = graph.info.example_inputs
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    if len(examples) != len(graph.placeholders) or not all(map(is_pure, calls)):
        return None
    tensors = [one for one in examples if isinstance(one, torch.Tensor)]
    return examples if tensors and all(one.is_cuda for one in tensors) else None


def gpu(examples: Sequence[Any]) -> str:
    """Return what the timings of a GPU depend on beside the graph, as text."""
    device = next(one.device for one in examples if isinstance(one, torch.Tensor))
    parts = (
        torch.cuda.get_device_name(device), torch.version.cuda, torch.backends.cudnn.version(),
        torch._C._get_fp32_precision_getter("cuda", "conv"), torch.backends.cudnn.benchmark,
    )  # fmt: skip
    return ", ".join(map(str, (*parts, *(getattr(x, "shape", x) for x in examples))))


def _runner(graph: GraphModule, examples: Sequence[Any]) -> Callable[[], None]:
    function = program_of(graph).function

    wait = waiter(examples)

    def run() -> None:
        with torch.no_grad(), torch._C._DisableAutocast():
            function(*examples)
        wait()

    return run
