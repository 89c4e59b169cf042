"""Proof by comparison: the optimized graph must compute what the original did."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.dialect import retarget
from fxopt.graph_module import GraphModule
from fxopt.inputs import Inputs, as_inputs, evaluation
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

    Flags are restored afterwards, and buffers that the model changes are copies.
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
        buffers = {name: model.get_buffer(name).clone() for name in graph.info.mutated
                   if name in dict(model.named_buffers())}
        with torch.no_grad(), evaluation(model):
            result = torch.func.functional_call(model, buffers, args, kwargs)
        found = pytree.tree_leaves(result)
        flat_out: list[Any] = [None] * len(outputs)
        for place, index in zip(wanted, outputs, strict=True):
            flat_out[index] = found[place]
        return flat_out

    return run


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

    Without a `tolerance` the bound is the dtype's own, or 20 times the original's own error
    against float64 where that is larger; it is measured only if needed.
    """
    from fxopt.testing.checks import relative_error

    started = time.perf_counter()
    worst, bound = 0.0, 0.0
    for flat in inputs:
        expected = _seeded(reference, flat)
        result = _seeded(found, flat)
        error = relative_error(list(result), list(expected))
        limit = tolerance if tolerance is not None else _base_tolerance(original, expected)
        if error > limit and tolerance is None:
            limit = max(limit, OWN_ERROR_FACTOR * own_error(original, flat, expected))
        worst, bound = max(worst, error), max(bound, limit)
        if error > limit:
            return Verification(what, error, limit, time.perf_counter() - started)
    return Verification(what, worst, bound, time.perf_counter() - started)


def own_error(original: GraphModule, flat: Sequence[Any], expected: Sequence[Any]) -> float:
    """Return the original's error against itself in float64; 0 where it cannot run in float64."""
    from fxopt.testing.checks import relative_error

    try:
        wide = retarget(original, dtype=torch.float64)
        widened = [_widen(value) for value in flat]
        exact = _seeded(runner(wide), widened)
    except RuntimeError:
        return 0.0  # an operator without a float64 kernel: the dtype's own tolerance stays
    narrowed = [
        value.to(like.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for value, like in zip(exact, expected, strict=True)
    ]
    error = relative_error(list(expected), narrowed)
    return error if error < 1.0 else 0.0


def _widen(value: Any) -> Any:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if is_float else value


def _seeded(run: Run, flat: Sequence[Any]) -> Sequence[Any]:
    """Run on copies of the inputs (the model may write to them) with the generator's seed fixed."""
    copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in flat]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return run(copies)


def _base_tolerance(original: GraphModule, expected: Sequence[Any]) -> float:
    """The tolerance of the coarsest dtype that the graph computes in."""
    dtypes = {
        node.meta["val"].dtype
        for node in original.graph.nodes
        if isinstance(node.meta.get("val"), torch.Tensor)
    }
    return max((BASE_TOLERANCE[d] for d in dtypes if d in BASE_TOLERANCE), default=1e-5)
