"""`check_pass`: everything that a test of a pass should ask, asked at once."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt import dialect
from fxopt.capture import capture
from fxopt.contract import Pass, PassResult
from fxopt.difference import bytes_of, relative_error
from fxopt.graph_module import GraphModule
from fxopt.inputs import as_inputs
from fxopt.text import graph_text


def noisy(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fill every float parameter and buffer with noise, in place, and return the model.

    A fresh batch norm is almost the identity, and a layer scale starts at 1e-6: a pass that simply
    deleted them would pass a test on fresh weights. Names that end in `var` get positive values.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("var"):
                value = 0.5 + noise.abs()
            elif tensor.dim() > 1:
                value = noise / max(tensor[0].numel(), 1) ** 0.5
            else:
                value = 1 + 0.3 * noise if name.endswith("weight") else 0.3 * noise
            tensor.copy_(value)
    return model


def random_inputs_like(inputs: Any, seed: int = 1) -> Any:
    """Return nested inputs of the same structure with other random floats; integers are kept."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)

    return pytree.tree_map_only(torch.Tensor, draw, inputs)


def op_counts(graph: GraphModule) -> dict[str, int]:
    """Return how often each operator stands in the graph, by its short name ('conv2d')."""
    counts = Counter(
        node.target._schema.name.split("::")[-1]
        if hasattr(node.target, "_schema")
        else getattr(node.target, "__name__", str(node.target))
        for node in graph.graph.nodes
        if node.op == "call_function"
    )
    return dict(sorted(counts.items()))


def check_pass(
    optimization: Pass,
    model: torch.nn.Module,
    inputs: Any,
    *,
    before: Mapping[str, int] | None = None,
    after: Mapping[str, int] | None = None,
    text: str | None = None,
    rewrites: int | None = None,
    misses: list[str] | None = None,
    dynamic_shapes: Any = None,
    tolerance: float = 1e-10,
    add_noise: bool = True,
    gradients: bool = True,
    double: bool = True,
) -> tuple[GraphModule, PassResult]:
    """Run one pass on one small model and check all that must hold, in float64 by default.

    1. the captured graph is the one that is meant (`before`: counts of the operators named);
    2. the graph is legal dialect before and after;
    3. the result is the one that is meant (`after` counts, `text` of the graph, `rewrites`, and
       for each of `misses` a reason that contains it; `misses=[]` wants none at all);
    4. `modified` is honest about the graph's text and about its constants;
    5. outputs agree with the model's within `tolerance`, on fresh inputs, with noisy weights;
    6. gradients of the inputs agree too, and no trainable parameter of the graph lost its own;
    7. a second run changes nothing.

    Returns the rewritten graph and what the pass reported. Raises AssertionError otherwise.
    """
    model = copy.deepcopy(model).eval()
    if double:
        model = model.double()
        inputs = pytree.tree_map_only(
            torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs
        )
    if add_noise:
        noisy(model)
    graph = capture(model, inputs, dynamic_shapes=dynamic_shapes)
    dialect.check(graph)
    _expect_counts("before", graph, before)
    text_before, constants_before = graph_text(graph), _fingerprint(graph)

    result = optimization.run(graph)

    dialect.check(graph)
    _expect_counts("after", graph, after)
    if text is not None:
        expect(graph_text(graph).strip() == text.strip(), "the graph is now", graph)
    if rewrites is not None:
        expect(result.rewrites == rewrites, f"{result.rewrites} rewrites, expected {rewrites}")
    if misses is not None:
        _expect_misses(result, misses)
    changed = (text_before, constants_before) != (graph_text(graph), _fingerprint(graph))
    words = f"modified says {result.modified}, the graph says {changed}"
    expect(result.modified == changed, words)
    _expect_same_function(model, graph, inputs, tolerance)
    if gradients:
        _expect_gradients(model, graph, inputs, max(tolerance, 1e-9))
    again = optimization.run(graph)
    expect(not again.modified, f"a second run changed the graph again: {again}")
    return graph, result


def expect(holds: bool, words: str, graph: GraphModule | None = None) -> None:
    """Raise AssertionError with these words, and the graph, unless it holds; under `-O`, too."""
    if not holds:
        raise AssertionError(words if graph is None else f"{words}\n{graph_text(graph)}")


def _expect_counts(when: str, graph: GraphModule, expected: Mapping[str, int] | None) -> None:
    if expected is not None:
        found = op_counts(graph)
        wrong = {op: found.get(op, 0) for op, n in expected.items() if found.get(op, 0) != n}
        expect(not wrong, f"{when}: expected {dict(expected)}, found {wrong} in {found}")


def _expect_misses(result: PassResult, expected: list[str]) -> None:
    reasons = [miss.reason for miss in result.misses]
    if not expected:
        expect(not reasons, f"expected no misses, found {reasons}")
    for part in expected:
        expect(any(part in said for said in reasons), f"no reason says '{part}': {reasons}")


def _fingerprint(graph: GraphModule) -> list[tuple[str, str]]:
    """Return a digest of every constant's bytes, by name."""
    return [
        (name, hashlib.sha256(bytes_of(tensor)).hexdigest())
        for name, tensor in sorted(graph.constants().items())
    ]


def _expect_same_function(
    model: torch.nn.Module, graph: GraphModule, inputs: Any, tolerance: float
) -> None:
    for fresh in (inputs, random_inputs_like(inputs)):
        call = as_inputs(fresh)
        with torch.no_grad():
            torch.manual_seed(0)
            expected = copy.deepcopy(model)(*call.args, **call.kwargs)
            torch.manual_seed(0)
            found = copy.deepcopy(graph)(*call.args, **call.kwargs)
        error = relative_error(found, expected)
        expect(error <= tolerance, f"outputs differ by {error:.3g} > {tolerance:g}", graph)


def _expect_gradients(
    model: torch.nn.Module, graph: GraphModule, inputs: Any, tolerance: float
) -> None:
    expected = input_gradients(copy.deepcopy(model), inputs)
    trained = copy.deepcopy(graph)
    found = input_gradients(trained, inputs)
    error = relative_error(found, expected)
    expect(error <= tolerance, f"gradients of the inputs differ by {error:.3g}")
    if expected:
        for name, parameter in trained.named_parameters():
            used = any(n.op == "get_attr" and n.target == name for n in trained.graph.nodes)
            reached = not used or not parameter.requires_grad or parameter.grad is not None
            expect(reached, f"no gradient reaches the parameter {name}")


def input_gradients(module: torch.nn.Module, inputs: Any) -> list[torch.Tensor]:
    """Return the gradients of the summed squares of all outputs, for each float input."""
    leaves: list[torch.Tensor] = []

    def require(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1] * 1  # so that an in-place operator may write to it

    call = as_inputs(pytree.tree_map_only(torch.Tensor, require, inputs))
    torch.manual_seed(0)
    outputs = pytree.tree_leaves(module(*call.args, **call.kwargs))
    terms = [
        (out * out).sum()
        for out in outputs
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.requires_grad
    ]
    if not terms or not leaves:
        return []
    torch.stack([term.double() for term in terms]).sum().backward()
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
