"""fxopt as a backend of torch.compile, which brings graph breaks and dynamic shapes.

    torch.compile(model, backend="fxopt", options={"backend": "onnx"})

torch.compile cuts a program into graphs and gives each one here, with the weights as inputs. A
graph is compiled with its weights fixed, for passes fold them; so every call compares them with
those that it was compiled for (the same tensors, unchanged), and compiles again where they differ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.dynamo.compiled_graph import CompiledGraph
from fxopt.dynamo.inputs import example_of
from fxopt.dynamo.options import Options
from fxopt.errors import OptionError

log = logging.getLogger("fxopt")


def torch_compile_backend(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one graph of torch.compile: `torch.compile(model, backend="fxopt", options={…})`.

    `options` are those of `fxopt.compile` (backend, passes, verify, tolerance, on_error) and of the
    backend, and three more. `training`: a graph whose outputs need gradients is left to PyTorch,
    with a warning ("run"), or is an error ("refuse"). `fallback`: whether a graph that cannot be
    compiled is left to PyTorch, with a warning, too; else that is an error. `variants`: how often
    one graph is compiled, for other weights or sizes, until it is left to PyTorch with a warning.

    Raises OptionError, BackendUnavailable, CaptureError, VerifyError and LoweringError, which
    torch.compile wraps.
    """
    chosen = Options.of(options, mode)
    if torch.is_grad_enabled() and _needs_gradients(graph):
        message = (
            "a graph of torch.compile needs gradients, and fxopt compiles for inference: call the "
            "model under torch.no_grad()"
        )
        if chosen.training == "refuse":
            raise OptionError(f"{message}, or leave training='run'.")
        log.warning("%s. PyTorch runs it as it is.", message)
        return graph.forward
    compiled = CompiledGraph(graph, chosen, example_inputs)
    compiled.prepare([example_of(value) for value in example_inputs])
    return compiled


def _needs_gradients(graph: fx.GraphModule) -> bool:
    """Whether an output needs gradients."""
    outputs = graph.graph.output_node().all_input_nodes
    values = [node.meta.get("example_value") for node in outputs]
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)
