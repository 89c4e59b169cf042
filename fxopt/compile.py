"""fxopt.compile: capture, optimize, lower; each of the three is public, too."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxopt.backend import Backend
from fxopt.capture import bind_inputs, capture
from fxopt.compiled import CompiledModel, DeferredModel
from fxopt.contract import Effect, Pass
from fxopt.dialect import retarget
from fxopt.errors import OptionError, check_choice
from fxopt.graph_module import GraphModule
from fxopt.inputs import infer_inputs
from fxopt.oracle import Oracle
from fxopt.pipeline import ON_ERROR, VERIFY, run_passes
from fxopt.quantization.policy import policy_of
from fxopt.registry import check_available, resolve_backend, resolve_pass
from fxopt.report import Recipe
from fxopt.submodules import compile_submodules
from fxopt.verify import Run, flat_inputs, model_runner, runner

log = logging.getLogger("fxopt")
Verify = str | Callable[[Any], Any]
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "fp64")
THROUGHOUT = {"fp32": torch.float32, "fp64": torch.float64}  # inputs and outputs, too


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
    inferred from the model, or taken from the first call where that is impossible, and a call with
    other shapes compiles again (a `DeferredModel` keeps the last few). With `submodules`,
    those parts are compiled and a copy of the model that uses them is returned.

    `passes`: pass objects or names, "default" for the default list; None for that list alone.
    `verify`: "final", "each", "off", or a function that returns False to refuse; it gets the
    optimized graph, then the compiled model, both called like the model. `tolerance`: the bound on
    max |Δ| / max |reference|. `on_error`: "raise", or "skip" to go on without a failing pass.
    `precision`: "bf16" and "fp16" compute in that dtype where it is safe, after all other passes;
    what goes in and out stays as it is (see `fxopt.passes.LowerPrecision`). "fp32" and "fp64"
    compute in that dtype throughout, from inputs of that dtype. "int8" rounds weights and
    activations where the backend has kernels for integers, with ranges from `calibration`: batches
    of what the model will see, as for `fxopt.passes.InsertFakeQuant`, which has more options.

    Raises CaptureError, VerifyError, LoweringError, BackendUnavailable and OptionError.
    """
    chosen = resolve_backend(backend, backend_options)
    check_available(chosen)
    settings = Settings.of(
        passes, dynamic_shapes=dynamic_shapes, precision=precision, calibration=calibration,
        engine=getattr(chosen, "quantization", "eager"), verify=verify,
        verify_inputs=verify_inputs, tolerance=tolerance, on_error=on_error, progress=progress,
    )  # fmt: skip
    model = unwrapped(model)

    def compile_for(part: Any, inputs: Any) -> CompiledModel:
        return _compile(part, inputs, chosen, settings)

    if submodules is not None:
        if precision == "int8":
            raise OptionError(
                "precision='int8' cannot be calibrated with submodules=: data for the model are "
                "not what its parts read. Compile each part by itself, with data of its own."
            )
        return compile_submodules(model, example_inputs, submodules, compile_for)
    if example_inputs is None and _is_user_model(model):
        inferred = infer_inputs(model)
        if inferred is None:
            log.info("no example inputs can be inferred: the first call compiles")
        return DeferredModel(model, lambda inputs: compile_for(model, inputs), inferred)
    return compile_for(model, example_inputs)


def optimize(
    model_or_graph: Any,
    example_inputs: Any = None,
    *,
    passes: Sequence[str | Pass] | None = None,
    dynamic_shapes: Any = None,
    precision: str | None = None,
    calibration: Any = None,
    verify: Verify = "final",
    verify_inputs: Any = None,
    tolerance: float | None = None,
    on_error: str = "raise",
    progress: Callable[[str], None] | None = None,
) -> GraphModule:
    """Return an optimized graph of a model or of a captured graph; both stay as they are.

    The result is a trainable `nn.Module`, with the record of what was done in `.story`. See
    `compile` for the arguments and errors; precision="int8" is for the eager backend's kernels.
    """
    settings = Settings.of(
        passes, dynamic_shapes=dynamic_shapes, precision=precision, calibration=calibration,
        verify=verify, verify_inputs=verify_inputs, tolerance=tolerance, on_error=on_error,
        progress=progress,
    )  # fmt: skip
    graph, _ = _optimize(unwrapped(model_or_graph), example_inputs, settings)
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
    check_available(chosen)
    return CompiledModel.lower(graph, chosen)


def default_passes() -> list[Pass]:
    """Return the exact passes of the default pipeline, in order."""
    from fxopt.passes import DEFAULT

    return list(DEFAULT)


def resolve_passes(passes: Sequence[str | Pass]) -> list[Pass]:
    """Return the passes that are named, the default list in the place of the word "default"."""
    chosen: list[Pass] = []
    for one in passes:
        chosen += default_passes() if one == "default" else [resolve_pass(one)]
    return chosen


@dataclass(frozen=True)
class Settings:
    """How to optimize: what `compile` and `optimize` were told, checked."""

    asked_for: tuple[Pass, ...]
    added: tuple[Pass, ...]  # which lower the precision, after all others
    dynamic_shapes: Any
    precision: str | None
    verify: Verify
    verify_inputs: Any
    tolerance: float | None
    on_error: str
    progress: Callable[[str], None]

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The passes to run."""
        return (*self.asked_for, *self.added)

    @classmethod
    def of(
        cls,
        passes: Sequence[str | Pass] | None = None,
        *,
        dynamic_shapes: Any = None,
        precision: str | None = None,
        calibration: Any = None,
        engine: Any = "eager",
        verify: Verify = "final",
        verify_inputs: Any = None,
        tolerance: float | None = None,
        on_error: str = "raise",
        progress: Callable[[str], None] | None = None,
    ) -> Settings:
        """Check the settings, and find the passes; raise OptionError for what is wrong.

        `engine` is whose kernels "int8" is for: the name of a policy, or a policy.
        """
        if passes is not None and not isinstance(passes, (list, tuple)):
            raise OptionError(f"passes= takes a list; write passes=[{passes!r}].")
        if tolerance is not None and not (isinstance(tolerance, (int, float)) and tolerance >= 0):
            raise OptionError(
                f"tolerance must be a number, at least 0, not {tolerance!r}: the bound on "
                "max |Δ| / max |reference|."
            )
        if isinstance(verify, str):
            check_choice("verify", verify, VERIFY)
        elif not callable(verify):
            raise OptionError(f"verify must be one of {VERIFY}, or a function, not {verify!r}.")
        check_choice("on_error", on_error, ON_ERROR)
        if precision is not None:
            check_choice("precision", precision, PRECISIONS)
        chosen = default_passes() if passes is None else resolve_passes(passes)
        added = _lowering(precision, calibration, engine, tolerance)
        return cls(
            tuple(chosen), added, dynamic_shapes, precision, verify, verify_inputs, tolerance,
            on_error, progress or (lambda text: None),
        )  # fmt: skip


def _lowering(
    precision: str | None, calibration: Any, engine: Any, tolerance: float | None
) -> tuple[Pass, ...]:
    """Return the passes that lower the precision, after all others."""
    from fxopt.passes.expand_attention import ExpandAttention
    from fxopt.passes.insert_fake_quant import InsertFakeQuant
    from fxopt.passes.lower_precision import HALF_DTYPES, LowerPrecision

    if precision != "int8":
        if calibration is not None:
            raise OptionError("calibration= goes with precision='int8'.")
        if precision not in HALF_DTYPES:
            return ()
        if tolerance is None:
            return (LowerPrecision(precision),)
        return (LowerPrecision(precision, max_error=tolerance),)
    if calibration is None:
        raise OptionError(
            "precision='int8' needs calibration=: some batches of what the model will see, such as "
            "a DataLoader; or calibration='random', which says nothing about accuracy."
        )
    if engine is None:
        raise OptionError(
            "precision='int8' rounds where one engine computes on integers: name it, "
            "backend='openvino', 'onnx' or 'eager'."
        )
    # products inside of attention can be rounded only where they are nodes
    attention = (ExpandAttention(),) if policy_of(engine).products else ()
    return (*attention, InsertFakeQuant(calibration, target=engine))


def _compile(
    model: Any, example_inputs: Any, backend: Backend, settings: Settings
) -> CompiledModel:
    graph, oracle = _optimize(model, example_inputs, settings)
    settings.progress(f"lower to {backend.name}")
    compiled = CompiledModel.lower(graph, backend)
    if oracle.mode != "off":
        lowered_from = compiled.graph
        assert lowered_from is not None
        lossy = any(one.effect is Effect.LOSSY for one in settings.passes)
        if lossy or lowered_from is not graph:
            # lowering must compute what the lossy passes, or a backend with leave to, made
            oracle = oracle.since(lowered_from)
        settings.progress(f"verify {backend.name}")
        compiled.verify(oracle)
    return compiled


def _optimize(
    model: Any, example_inputs: Any, settings: Settings
) -> tuple[GraphModule, Oracle]:
    """Capture (or copy), convert the precision, and run the passes under an oracle."""
    graph, oracle = prepare(model, example_inputs, settings)
    story = run_passes(
        graph, settings.passes, oracle, on_error=settings.on_error, progress=settings.progress
    )
    story.recipe = Recipe.of(
        passes=settings.asked_for,
        precision=settings.precision,
        verify=settings.verify,
        tolerance=settings.tolerance,
        on_error=settings.on_error,
        dynamic_shapes=settings.dynamic_shapes,
    ).settings
    return graph, oracle


def prepare(
    model: Any, example_inputs: Any, settings: Settings
) -> tuple[GraphModule, Oracle]:
    """Return the graph that the passes start from, and what judges what they make of it."""
    settings.progress("capture")
    inputs = bind_inputs(model, example_inputs) if _is_user_model(model) else example_inputs
    graph = capture(model, inputs, dynamic_shapes=settings.dynamic_shapes)
    if settings.precision in THROUGHOUT:
        graph = retarget(graph, dtype=THROUGHOUT[settings.precision])
    original = graph.copy()
    verify = settings.verify
    return graph, Oracle(
        mode=verify if isinstance(verify, str) else "final",
        reference=_reference(model, inputs, original, settings),
        original=original,
        inputs=flat_inputs(graph, settings.verify_inputs) if verify != "off" else [],
        tolerance=settings.tolerance,
        accept=verify if callable(verify) else None,
    )


def _reference(model: Any, inputs: Any, original: GraphModule, settings: Settings) -> Run:
    """Return what results are compared with: the user's own model, where it can be run."""
    if _is_user_model(model) and settings.precision not in THROUGHOUT:
        return model_runner(model, original, inputs)
    return runner(original)


def _is_user_model(model: Any) -> bool:
    return isinstance(model, torch.nn.Module) and not isinstance(model, GraphModule)


def unwrapped(model: Any) -> Any:
    """Return the model that torch.compile wrapped, or the model itself."""
    return getattr(model, "_orig_mod", model)
