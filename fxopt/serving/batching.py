"""Requests as one batch: whether that is possible, and how they are joined and split again."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from fxopt.effects import effect
from fxopt.errors import OptionError
from fxopt.graph_module import GraphModule
from fxopt.signature import Signature, TensorLeaf

_ADVICE = "Serve the model without max_batch."


@dataclass(frozen=True)
class BatchLayout:
    """Which flat inputs have the batch in dimension 0; every output has.

    Inputs without it (a mask, a scale) are shared by a batch, so only requests that were given the
    very same tensor run together.
    """

    batched: tuple[bool, ...]
    low: int  # rows that one run of the model may have
    high: int | None

    def rows(self, flat: Sequence[Any]) -> int:
        """Return how many rows a request has."""
        return int(flat[self.batched.index(True)].shape[0])

    def key(self, flat: Sequence[Any]) -> Hashable:
        """Return what requests that may run together have in common."""
        return tuple(
            (value.shape[1:], value.device)
            if batched
            else id(value) if isinstance(value, torch.Tensor) else value
            for batched, value in zip(self.batched, flat, strict=True)
        )  # fmt: skip

    def join(self, requests: Sequence[Sequence[Any]]) -> list[Any]:
        """Return the flat inputs of all requests, one below the other."""
        with torch.no_grad():
            return [
                torch.cat(values) if batched else values[0]
                for batched, values in zip(self.batched, zip(*requests, strict=True), strict=True)
            ]

    def split(
        self, outputs: Sequence[torch.Tensor], rows: Sequence[int]
    ) -> list[tuple[torch.Tensor, ...]]:
        """Return the flat outputs of each request, in memory of its own."""
        parts = [output.split(list(rows)) for output in outputs]
        return [tuple(part.clone() for part in one) for one in zip(*parts, strict=True)]


def batch_layout(signature: Signature, graph: GraphModule | None, max_batch: int) -> BatchLayout:
    """Return how requests are joined, judged by the symbolic shapes of inputs and outputs.

    Without a graph the outputs cannot be judged here. Raises OptionError, with the reason, where
    rows of one request could meet those of another.
    """
    if graph is not None and graph.info.signature is not None:
        signature = graph.info.signature  # a loaded graph has symbols of its own
    batch = _batch_of(signature)
    if signature.output.numbers:
        raise OptionError(
            "Requests cannot run as one batch: the model returns a Python number, which would be "
            f"one for all of them. {_ADVICE}"
        )
    leaves = signature.tensors
    batched = tuple(leaf.dtype is not None and batch in leaf.shape[:1] for leaf in leaves)
    for leaf, has_batch in zip(leaves, batched, strict=True):
        others = (*leaf.shape[1:], leaf.symbol) if has_batch else (*leaf.shape, leaf.symbol)
        if any(_depends(size, batch) for size in others):
            raise OptionError(
                f"Requests cannot run as one batch: '{leaf.path}' has the size of the batch "
                f"elsewhere than in dimension 0. {_ADVICE}"
            )
    if graph is not None:
        _check_outputs(graph, batch)
        _check_effects(graph)
    low, high = signature.ranges.get(str(batch), (0, None))
    if high is not None and max_batch > high:
        raise OptionError(
            f"max_batch={max_batch} is more than the model was captured for: the batch is "
            f"{low} to {high}. Give max_batch={high}, or compile with a wider range."
        )
    return BatchLayout(batched, low, high)


def _batch_of(signature: Signature) -> sympy.Symbol:
    """Return the one symbolic size that inputs have in dimension 0."""
    found: dict[Any, TensorLeaf] = {}
    for leaf in signature.tensors:
        if leaf.dtype is not None and leaf.shape and not isinstance(leaf.shape[0], int):
            found.setdefault(leaf.shape[0], leaf)
    if not found:
        raise OptionError(
            "Requests cannot run as one batch: the batch is a fixed number. Compile with "
            "dynamic_shapes={0: 'batch'}, or serve the model without max_batch."
        )
    first, *others = found
    if others or not isinstance(first, sympy.Symbol):
        names = " and ".join(f"'{leaf.path}'" for leaf in found.values())
        raise OptionError(
            f"Requests cannot run as one batch: dimension 0 of {names} is not one size. Give it "
            "one name in dynamic_shapes= where it is the batch, or serve the model without "
            "max_batch."
        )
    return first


def _check_outputs(graph: GraphModule, batch: sympy.Symbol) -> None:
    for number, output in enumerate(graph.output_node.args[0]):  # type: ignore[arg-type]
        value = output.meta.get("val") if isinstance(output, fx.Node) else output
        shape = value.shape if isinstance(value, torch.Tensor) else ()
        sizes = [size if isinstance(size, int) else size.node.expr for size in shape]
        if not sizes or sizes[0] != batch or any(_depends(size, batch) for size in sizes[1:]):
            text = ", ".join(str(size).replace(str(batch), "batch") for size in sizes)
            raise OptionError(
                f"Requests cannot run as one batch: output {number} ({output}) has the shape "
                f"({text}), and each output must have the batch in dimension 0, and only there. "
                f"{_ADVICE}"
            )


def _check_effects(graph: GraphModule) -> None:
    for node in graph.graph.nodes:
        why = effect(node) if node.op == "call_function" else None
        if why is not None and why != "it is an assertion":
            raise OptionError(
                f"Requests cannot run as one batch: the node '{node.name}' may let them meet, for "
                f"{why}. {_ADVICE}"
            )


def _depends(size: Any, batch: sympy.Symbol) -> bool:
    return isinstance(size, sympy.Basic) and batch in size.free_symbols
