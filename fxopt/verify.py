"""Proof by comparison: the optimized graph must compute what the original did."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt.capture import attributes_kept
from fxopt.dialect import retarget
from fxopt.difference import relative_error
from fxopt.effects import is_pure
from fxopt.errors import FxoptError
from fxopt.graph_module import GraphModule
from fxopt.inputs import Inputs, as_inputs, evaluation
from fxopt.quantization.operator import fake_quantize
from fxopt.story import Verification

# How far two ways to compute the same may lie apart, relative to the largest output, before the
# original's own error in this dtype is measured against float64.
BASE_TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}
OWN_ERROR_FACTOR = 20.0
STEPS_APART = 5.0  # of 255 in 8 bits: as many as bfloat16 is given, of its 256
COARSEST = 0.5  # whatever the bits: beyond, all zeros would pass
# numbers on an edge between integers fall to either side in float32 alone, as they do in engines
ROUNDED_ERROR_FACTOR = 3.0

Run = Callable[[Sequence[Any]], Sequence[Any]]  # flat inputs to flat outputs


def runner(graph: GraphModule) -> Run:
    """Return a function that runs a graph on flat inputs and leaves the graph's state alone."""

    def run(flat: Sequence[Any]) -> Sequence[Any]:
        twin = graph.copy() if graph.info.mutated else graph
        with torch.no_grad():
            return twin.run(*flat)

    return run


def model_runner(model: torch.nn.Module, graph: GraphModule, inputs: Inputs) -> Run:
    """Return a function that runs the user's own model, in evaluation mode, on flat inputs.

    The model is left as it was: its flags and attributes, and the state that it changes.
    """
    leaves, spec = pytree.tree_flatten((inputs.args, inputs.kwargs))
    signature = graph.info.signature
    assert signature is not None
    places = [i for i, leaf in enumerate(signature.leaves) if leaf in signature.tensors]
    outputs = [leaf for leaf in signature.output.leaves if isinstance(leaf, int)]
    wanted = [i for i, leaf in enumerate(signature.output.leaves) if isinstance(leaf, int)]

    def run(flat: Sequence[Any]) -> Sequence[Any]:
        values = list(leaves)
        for place, value in zip(places, flat, strict=True):
            values[place] = value
        args, kwargs = pytree.tree_unflatten(values, spec)
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        written = {name: _twin(state[name]) for name in graph.info.mutated & set(state)}
        with torch.no_grad(), evaluation(model), attributes_kept(model):
            result = torch.func.functional_call(model, written, args, kwargs)
            found = [_own(leaf) for leaf in pytree.tree_leaves(result)]
        flat_out: list[Any] = [None] * len(outputs)
        for place, index in zip(wanted, outputs, strict=True):
            flat_out[index] = found[place]
        return flat_out

    return run


def _twin(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a parameter or buffer that may stand in its place."""
    copied = tensor.detach().clone()
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(copied, requires_grad=tensor.requires_grad)
    return copied


def _own(value: Any) -> Any:
    """Return a copy of a tensor: what it is a view of may be put back to what it was."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def flat_inputs(graph: GraphModule, verify_inputs: Any) -> list[tuple[Any, ...]]:
    """Return the inputs to verify on: the user's (one set, or a list of sets), or the examples."""
    if verify_inputs is None:
        return [graph.info.example_inputs]
    sets = verify_inputs if isinstance(verify_inputs, list) else [verify_inputs]
    signature = graph.info.signature
    assert signature is not None
    found = []
    for one in sets:
        inputs = as_inputs(one)
        flat = signature.flatten(inputs.args, inputs.kwargs)
        signature.check(flat)
        found.append(tuple(flat))
    return found


def compare(
    what: str,
    found: Run,
    reference: Run,
    original: GraphModule,
    inputs: Sequence[tuple[Any, ...]],
    tolerance: float | None,
) -> Verification:
    """Compare two ways to compute the same on flat inputs; random numbers are seeded alike.

    One that fails to run differs infinitely; where the reference is all NaN or infinite, `what`
    says that equality proves nothing. Without a `tolerance` the bound is the dtype's own, or 20
    times the original's own error against float64 where that is larger; it is measured only if
    needed.
    """
    started = time.perf_counter()
    worst, bound = 0.0, 0.0
    proves = not inputs
    for flat in inputs:
        expected = seeded(reference, flat)
        proves |= _says_something(expected)
        limit = bound_of(0.0, original, flat, tolerance)
        try:
            result = seeded(found, flat)
        except FxoptError:
            raise
        except Exception as failure:
            words = f"{what}, which fails with {type(failure).__name__}: {failure}"
            return Verification(words, math.inf, limit, time.perf_counter() - started)
        error = relative_error(list(result), list(expected))
        limit = bound_of(error, original, flat, tolerance)
        worst, bound = max(worst, error), max(bound, limit)
        if error > limit:
            return Verification(what, error, limit, time.perf_counter() - started)
    if not proves:
        what += ", on inputs that prove nothing: no output of the model is a finite number"
    return Verification(what, worst, bound, time.perf_counter() - started)


def _says_something(expected: Sequence[Any]) -> bool:
    """Whether a result holds a finite number, or nothing at all that could be one."""
    tensors = [value for value in expected if isinstance(value, torch.Tensor) and value.numel()]
    return not tensors or any(bool(torch.isfinite(tensor).any()) for tensor in tensors)


def bound_of(
    error: float, original: GraphModule, flat: Sequence[Any], tolerance: float | None
) -> float:
    """Return the bound on an error: `tolerance`, or what the dtype and the original warrant.

    The original is measured against itself only: what capture got wrong must not widen the bound.
    """
    if tolerance is not None:
        return tolerance
    limit = _base_tolerance(original)
    if error > limit:
        own = own_error(original, flat, seeded(runner(original), flat))
        rounds = bool(original.find(fake_quantize))
        limit = max(limit, own * (ROUNDED_ERROR_FACTOR if rounds else OWN_ERROR_FACTOR))
    return limit


def own_error(original: GraphModule, flat: Sequence[Any], expected: Sequence[Any]) -> float:
    """Return the original's error against itself in float64; 0 where it cannot run in float64.

    0, too, where it draws random numbers: those are others in another dtype.
    """
    if any(map(_is_random, original.graph.nodes)):
        return 0.0
    try:
        wide = retarget(original, dtype=torch.float64)
        widened = [_widen(value) for value in flat]
        exact = seeded(runner(wide), widened)
    except RuntimeError:
        return 0.0  # an operator without a float64 kernel: the dtype's own tolerance stays
    narrowed = [
        value.to(like.dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for value, like in zip(exact, expected, strict=True)
    ]
    error = relative_error(list(expected), narrowed)
    return error if error < 1.0 else 0.0


def _is_random(node: fx.Node) -> bool:
    draws = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return draws and not is_pure(node)


def _widen(value: Any) -> Any:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if is_float else value


def seeded(run: Run, flat: Sequence[Any]) -> Sequence[Any]:
    """Run on copies of the inputs (the model may write to them) with the generator's seed fixed."""
    copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in flat]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(0)
        return run(copies)


def _base_tolerance(original: GraphModule) -> float:
    """The tolerance of the coarsest dtype, or the coarsest steps, that the graph computes in.

    What lies on the edge between two integers of a fake-quant falls to either side.
    """
    rounded = [
        node for node in original.find(fake_quantize) if node.all_input_nodes[0].op != "get_attr"
    ]
    if rounded:
        ends: list[Any] = [node.args[3:] for node in rounded]
        return min(STEPS_APART / min(qmax - qmin for qmin, qmax in ends), COARSEST)
    dtypes = {
        node.meta["val"].dtype
        for node in original.graph.nodes
        if isinstance(node.meta.get("val"), torch.Tensor)
    }
    return max((BASE_TOLERANCE[d] for d in dtypes if d in BASE_TOLERANCE), default=1e-5)
