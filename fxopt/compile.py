"""fxopt.compile: capture, optimize, lower; each of the three is public, too."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

from fxopt.backend import Backend
from fxopt.capture import bind_inputs, capture
from fxopt.compiled import CompiledModel, DeferredModel
from fxopt.contract import Pass
from fxopt.errors import BackendUnavailable, OptionError
from fxopt.graph_module import GraphModule
from fxopt.inputs import infer_inputs
from fxopt.pipeline import ON_ERROR, VERIFY, Oracle, check_choice, run_passes
from fxopt.registry import resolve_backend, resolve_pass
from fxopt.report import Recipe
from fxopt.submodules import compile_submodules
from fxopt.verify import flat_inputs, model_runner, runner

log = logging.getLogger("fxopt")
Verify = str | Callable[[Any], Any]
PRECISIONS = ("fp32", "fp16", "bf16", "fp64")


def compile(
    model: Any,
    example_inputs: Any = None,
    *,
    backend: str | Backend = "eager",
    passes: Sequence[str | Pass] | None = None,
    dynamic_shapes: Any = None,
    precision: str | None = None,
    calibration: Any = None,
    verify: Verify = "final",
    verify_inputs: Any = None,
    tolerance: float | None = None,
    on_error: str = "raise",
    submodules: Sequence[str] | None = None,
    progress: Callable[[str], None] | None = None,
    **backend_options: Any,
) -> Any:
    """Compile a model: capture it, run the passes, prove that nothing changed, lower it.

    Returns a `CompiledModel`, called like the model itself. Without `example_inputs` they are
    inferred from the model; where that is impossible, the first call compiles. With `submodules`,
    those parts are compiled and a copy of the model that uses them is returned.

    `passes`: pass objects or names; None for `fxopt.default_passes()`. `verify`: "final", "each",
    "off", or a function that gets the result and returns False to refuse it. `tolerance`: the bound
    on max |Δ| / max |reference|. `on_error`: "raise", or "skip" to go on without a failing pass.
    `precision`: "fp32", "bf16", "fp16" or "fp64" computes in that dtype throughout.

    Raises CaptureError, VerifyError, LoweringError, BackendUnavailable and OptionError.
    """
    chosen = resolve_backend(backend, backend_options)
    _check_available(chosen)
    settings: dict[str, Any] = {
        "backend": chosen,
        "passes": _resolve(passes),
        "dynamic_shapes": dynamic_shapes,
        "precision": precision,
        "calibration": calibration,
        "verify": verify,
        "verify_inputs": verify_inputs,
        "tolerance": tolerance,
        "on_error": on_error,
        "progress": progress,
    }
    _check_settings(verify, on_error, precision, calibration)
    if submodules is not None:
        return compile_submodules(
            model, example_inputs, submodules, lambda part, inputs: compile(part, inputs, **settings)
        )
    if example_inputs is None and isinstance(model, torch.nn.Module):
        if not isinstance(model, GraphModule):
            example_inputs = infer_inputs(model)
            if example_inputs is None:
                log.info("no example inputs can be inferred: the first call compiles")
                return DeferredModel(model, lambda inputs: compile(model, inputs, **settings))
    return _compile_now(model, example_inputs, settings)


def optimize(
    model_or_graph: Any,
    example_inputs: Any = None,
    *,
    passes: Sequence[str | Pass] | None = None,
    dynamic_shapes: Any = None,
    precision: str | None = None,
    verify: Verify = "final",
    verify_inputs: Any = None,
    tolerance: float | None = None,
    on_error: str = "raise",
    progress: Callable[[str], None] | None = None,
) -> GraphModule:
    """Return an optimized graph of a model or of a captured graph; both stay as they are.

    The result is a trainable `nn.Module`, with the record of what was done in `.story`. See
    `compile` for the arguments and errors.
    """
    _check_settings(verify, on_error, precision, None)
    graph, _ = _optimize(
        model_or_graph, example_inputs, _resolve(passes), dynamic_shapes, precision, verify,
        verify_inputs, tolerance, on_error, progress,
    )  # fmt: skip
    return graph


def lower(graph: GraphModule, *, backend: str | Backend = "eager", **options: Any) -> CompiledModel:
    """Lower a captured or optimized graph with one backend.

    Raises LoweringError for what the backend cannot express, BackendUnavailable without its engine.
    """
    if not isinstance(graph, GraphModule):
        raise OptionError(
            f"lower() takes the graph that capture() or optimize() returned, not a "
            f"{type(graph).__name__}. For a model use fxopt.compile(model, ...)."
        )
    chosen = resolve_backend(backend, options)
    _check_available(chosen)
    return CompiledModel.lower(graph, chosen)


def default_passes() -> list[Pass]:
    """Return the exact passes of the default pipeline, in order."""
    from fxopt.passes import DEFAULT

    return list(DEFAULT)


def _compile_now(model: Any, example_inputs: Any, settings: dict[str, Any]) -> CompiledModel:
    chosen, progress = settings["backend"], settings["progress"] or (lambda text: None)
    verify = settings["verify"]
    graph, oracle = _optimize(
        model, example_inputs, settings["passes"], settings["dynamic_shapes"],
        settings["precision"], verify, settings["verify_inputs"], settings["tolerance"],
        settings["on_error"], progress,
    )  # fmt: skip
    progress(f"lower to {chosen.name}")
    compiled = CompiledModel.lower(graph, chosen)
    if oracle.mode != "off":
        progress(f"verify {chosen.name}")
        compiled.verify(oracle)
    return compiled


def _optimize(
    model: Any,
    example_inputs: Any,
    passes: list[Pass],
    dynamic_shapes: Any,
    precision: str | None,
    verify: Verify,
    verify_inputs: Any,
    tolerance: float | None,
    on_error: str,
    progress: Callable[[str], None] | None,
) -> tuple[GraphModule, Oracle]:
    """Capture (or copy), convert the precision, and run the passes under an oracle."""
    if progress is not None:
        progress("capture")
    graph = capture(model, example_inputs, dynamic_shapes=dynamic_shapes)
    reference = runner(graph)
    is_model = isinstance(model, torch.nn.Module) and not isinstance(model, (GraphModule, ExportedProgram))
    if is_model:
        reference = model_runner(model, graph, bind_inputs(model, example_inputs))
    original = graph.copy()
    if precision is not None:
        graph = _convert(graph, precision)
        original, reference = graph.copy(), runner(graph.copy())
    elif not is_model:
        reference = runner(original)
    oracle = Oracle(
        mode=verify if isinstance(verify, str) else "final",
        reference=reference,
        original=original,
        inputs=flat_inputs(graph, verify_inputs) if verify != "off" else [],
        tolerance=tolerance,
        accept=verify if callable(verify) else None,
    )
    story = run_passes(graph, passes, oracle, on_error=on_error, progress=progress)
    story.recipe = Recipe.of(
        passes=passes, precision=precision, verify=verify, tolerance=tolerance,
        on_error=on_error, dynamic_shapes=dynamic_shapes,
    ).settings  # fmt: skip
    return graph, oracle


def _convert(graph: GraphModule, precision: str) -> GraphModule:
    from fxopt.dialect import retarget

    dtypes = {
        "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64,
    }  # fmt: skip
    return retarget(graph, dtype=dtypes[precision])


def _resolve(passes: Sequence[str | Pass] | None) -> list[Pass]:
    if isinstance(passes, str):
        raise OptionError(f"passes= takes a list; write passes=[{passes!r}].")
    return [resolve_pass(one) for one in passes] if passes is not None else default_passes()


def _check_settings(
    verify: Verify, on_error: str, precision: str | None, calibration: Any
) -> None:
    if isinstance(verify, str):
        check_choice("verify", verify, VERIFY)
    elif not callable(verify):
        raise OptionError(f"verify must be one of {VERIFY}, or a function, not {verify!r}.")
    check_choice("on_error", on_error, ON_ERROR)
    if precision is not None:
        check_choice("precision", precision, PRECISIONS)
    if calibration is not None:
        raise OptionError(
            "calibration= goes with precision='int8', which this version does not have yet."
        )


def _check_available(chosen: Backend) -> None:
    missing = chosen.missing()
    if missing is not None:
        raise BackendUnavailable(f"The backend '{chosen.name}' is not installed. {missing}")


