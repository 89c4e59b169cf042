"""Several ways to lower one place of the graph, and the fastest of them put there."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.backends.eager.onednn import OneDnnError, library, operators
from fxopt.backends.eager.program import write_program
from fxopt.rewrite import Rewriter
from fxopt.shapes import dtype_of, is_tensor, shape_of
from fxopt.text import target_text
from fxopt.timings import Timings

_ERROR = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the largest value
_BYTES = (torch.uint8, torch.int8)  # may differ by a step, where a number lies between two
_SMALL = 2**17  # multiplications: a call of oneDNN takes the time of about as many
Build = Callable[[], fx.Node]  # inserts the nodes of one way and returns the last one


def replace_by_fastest(
    rewriter: Rewriter,
    old: fx.Node,
    inputs: Sequence[fx.Node],
    ways: Mapping[str, Build],
    timings: Timings | None,
) -> None:
    """Replace `old`, computed from `inputs` and constants, in the fastest way.

    It is the first way without `timings`, or where no example of a size is known. A way that
    returns `old` itself leaves the graph as it is.
    """
    if timings is None or len(ways) == 1 or not all(map(_has_hints, inputs)):
        new = next(iter(ways.values()))()
    else:
        new = _fastest(rewriter, old, inputs, ways, timings)
    rewriter.prune([new])
    if new is not old:
        rewriter.replace(old, new)


def _fastest(
    rewriter: Rewriter,
    old: fx.Node,
    inputs: Sequence[fx.Node],
    ways: Mapping[str, Build],
    timings: Timings,
) -> fx.Node:
    """Build the way that is known to be the fastest, or all of them, and time them."""
    question = _question(old, inputs, ways)
    answer = timings.known(question)
    if answer is not None and answer in ways:
        return ways[answer]()
    built = {name: build() for name, build in ways.items()}
    arguments = [_sample(node) for node in inputs]
    runners = {}
    for name, node in built.items():
        with contextlib.suppress(OneDnnError):  # no kernel for this dtype or shape on this machine
            runner = _runner(rewriter, inputs, node, arguments)
            runner()
            runners[name] = runner
    return built[timings.fastest(question, _agreeing(runners))]


def _agreeing(runners: Mapping[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """Return the ways that compute what the last of them does, PyTorch's own."""
    results = {name: run()[0] for name, run in runners.items()}
    *_, expected = results.values()
    if expected.dtype in _BYTES:
        bound, results = 1.0, {name: found.float() for name, found in results.items()}
        expected = expected.float()
    else:
        finite = expected[expected.isfinite()]
        bound = _ERROR[expected.dtype] * float(finite.abs().max()) if finite.numel() else 0.0
    return {
        name: runners[name]
        for name, found in results.items()
        if torch.allclose(found, expected, rtol=0.0, atol=bound, equal_nan=True)
    }


def library_way(node: fx.Node, build: Build) -> dict[str, Build]:
    """Return the way by oneDNN's own library under its name; none where it has no such kernels."""
    api = library()
    if api is None or not operators.supports(dtype_of(node)):
        return {}
    return {f"oneDNN {api.version}": build}


def itself(node: fx.Node) -> fx.Node:
    """The way of what is there already."""
    return node


def is_small(x: fx.Node, weight: Sequence[int]) -> bool:
    """Whether a layer is so small that the call takes the time, and the shortest call is best.

    It multiplies each element of `x` [n, …] with `weight`, a shape without the inputs' channels.
    """
    if not _has_hints(x):
        return False
    return math.prod(_sizes(shape_of(x))) * math.prod(weight) < _SMALL


def _question(old: fx.Node, inputs: Sequence[fx.Node], ways: Mapping[str, Build]) -> str:
    """Return what a timing depends on: operators, their settings, shapes and dtypes, as text."""
    lines = [f"{' '.join(ways)}"]
    numbers: dict[fx.Node, int] = {}
    for node in (*inputs, *cone(old, inputs)):
        numbers[node] = len(numbers)
        value = node.meta["val"]
        kind = f"{value.dtype} {_sizes(value.shape)}" if is_tensor(node) else str(value)
        if node in inputs:
            lines.append(f"{kind} {_is_channels_last(node)}")
        else:
            args = fx.node.map_aggregate(
                (node.args, node.kwargs), lambda a: _argument_text(a, numbers)
            )
            lines.append(f"{target_text(node.target)} {args} -> {kind}")
    return "\n".join(lines)


def _argument_text(value: Any, numbers: Mapping[fx.Node, int]) -> str:
    if not isinstance(value, fx.Node):
        return repr(value)
    if value in numbers:
        return f"%{numbers[value]}"
    return f"constant {dtype_of(value)} {_sizes(shape_of(value))}"


def _has_hints(node: fx.Node) -> bool:
    """Whether an example of every size is known."""
    shape = node.meta["val"].shape
    return all(isinstance(size, int) or size.node.has_hint() for size in shape)


def _sizes(shape: Any) -> list[int]:
    return [size if isinstance(size, int) else size.node.hint for size in shape]


def cone(last: fx.Node, inputs: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the calls between `inputs` and `last`, in the order of their arguments."""
    found: dict[fx.Node, None] = {}
    pending = [(last, False)]
    while pending:
        node, is_done = pending.pop()
        if node in found or node in inputs or node.op != "call_function":
            continue
        if is_done:
            found[node] = None
        else:
            pending.append((node, True))
            pending += [(value, False) for value in node.all_input_nodes]
    return list(found)


def _runner(
    rewriter: Rewriter, inputs: Sequence[fx.Node], last: fx.Node, arguments: Sequence[Any]
) -> Callable[[], Any]:
    nodes = cone(last, inputs)  # what reads the last one takes it in whatever layout it has
    program = write_program(rewriter.graph, inputs, nodes, [last], as_captured=False)

    def run() -> Any:
        with torch.no_grad():
            return program.function(*arguments)

    return run


def _sample(node: fx.Node) -> torch.Tensor:
    """Return a tensor like a node's value, laid out as it is between convolutions."""
    value = node.meta["val"]
    sizes = _sizes(value.shape)
    own = torch.Generator().manual_seed(0)  # the caller's random numbers stay as they are
    sample = torch.rand(sizes, generator=own, device="cpu")
    if value.dtype in _BYTES:
        whole = torch.iinfo(value.dtype)
        sample = sample.mul_(whole.max - whole.min).add_(whole.min)
    sample = sample.to(value.dtype)
    if _is_channels_last(node):
        return sample.to(memory_format=_CHANNELS_LAST[len(sizes)])
    return sample


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _is_channels_last(node: fx.Node) -> bool:
    """Whether a value presumably lies channels last: images do, but for those that callers give."""
    return node.op != "placeholder" and node.meta["val"].dim() in _CHANNELS_LAST
