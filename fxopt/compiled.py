"""What compile returns: something that is called like the model, saves, and explains itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt import dialect
from fxopt.backend import Backend, Executable
from fxopt.devices import waiter
from fxopt.errors import ArtefactError, FxoptError, OptionError, ShapeError, VerifyError
from fxopt.graph_module import GraphModule
from fxopt.inputs import Inputs, check_ready, forward_signature
from fxopt.manifest import Manifest, read_manifest, write_manifest
from fxopt.oracle import Oracle, check_captured
from fxopt.pipeline import run_pass
from fxopt.registry import check_available, classes, resolve_backend
from fxopt.replay import replay
from fxopt.report import Report
from fxopt.signature import Signature
from fxopt.story import Story
from fxopt.verify import compare


@dataclass(frozen=True)
class Benchmark:
    """Latencies of one compiled model, in milliseconds."""

    median: float
    spread: float  # between the first and the third quartile
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ms (quartiles {self.spread:.2f} ms apart, {self.rounds} calls)"


class CompiledModel:
    """A lowered model. Call it with the model's own arguments; it returns the model's own outputs.

    `graph` is the portable optimized graph (None where a loaded artefact does not hold it), `story`
    and `report` say what was done to it, `backend` is what lowered it.
    """

    def __init__(
        self,
        executable: Executable,
        signature: Signature,
        backend: Backend,
        graph: GraphModule | None,
        story: Story | None,
        lower_seconds: float = 0.0,
    ) -> None:
        self.executable = executable
        self.signature = signature
        self.backend = backend
        self.graph = graph
        self.story = story
        self.lower_seconds = lower_seconds

    @classmethod
    def lower(cls, graph: GraphModule, backend: Backend) -> CompiledModel:
        """Run the backend's own passes on a copy of `graph`, and lower it."""
        started = time.perf_counter()
        private = graph.copy()
        for one in backend.legalize:
            result = run_pass(one, private)
            dialect.check(private, changed={*result.created, *result.changed})
        executable = backend.lower(private)
        signature = graph.info.signature
        assert signature is not None
        seconds = time.perf_counter() - started
        return cls(executable, signature, backend, graph, graph.info.story, seconds)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; raise ShapeError where the inputs are not what was captured."""
        flat = self.signature.flatten(args, kwargs)
        self.signature.check(flat)
        return self.signature.output.unflatten(self.executable.run(*flat))

    @property
    def report(self) -> Report:
        """What was done, printable."""
        if self.story is None:
            raise FxoptError("This model was loaded from a file, which holds no story.")
        return Report(self.story, self)

    def verify(self, oracle: Oracle) -> None:
        """Compare the lowered model with the oracle's reference; raise VerifyError."""
        name = self.backend.name

        def run(flat: Sequence[Any]) -> Sequence[Any]:
            return self._without_history().run(*flat)

        verdict = compare(
            f"{name} backend", run, oracle.reference, oracle.original, oracle.inputs,
            oracle.tolerance,
        )  # fmt: skip
        if self.story is not None:
            self.story.verifications.append(verdict)
        if not verdict.passed:
            check_captured(oracle.original, replace(oracle, accept=None))
            raise VerifyError(
                f"The backend '{name}' does not compute what the model does: max |Δ| / max "
                f"|reference| is {verdict.error:.3g}, and the bound is {verdict.bound:.3g} "
                f"({verdict.what}). The optimized graph itself was right, so this is an error of "
                "the lowering. Use another backend, or pass tolerance= if it is acceptable."
            )
        if oracle.accept is not None and oracle.accept(self) is False:
            raise VerifyError(f"Your own acceptance refused the model lowered to '{name}'.")

    def _without_history(self) -> Executable:
        """Return what may be run without changing this model's state (a cache, a counter)."""
        if self.graph is not None and self.graph.info.mutated:
            return CompiledModel.lower(self.graph, self.backend).executable
        return self.executable

    def save(self, path: str | Path) -> None:
        """Write one artefact; an existing file is replaced whole or not at all.

        Raises ArtefactError where the path cannot be written.
        """
        target = Path(path)
        if target.is_dir():
            raise ArtefactError(f"Cannot write '{target}': it is a folder. Give a file name.")
        owners = [name for name, cls in classes("backends").items() if cls.suffix == target.suffix]  # type: ignore[attr-defined]
        if owners and target.suffix != self.backend.suffix:
            raise ArtefactError(
                f"Cannot write '{target}': '{target.suffix}' is the suffix of the backend "
                f"'{owners[0]}', and this model is lowered to '{self.backend.name}'. Name the file "
                f"*{self.backend.suffix}, or compile with backend='{owners[0]}'."
            )
        self.executable.save(target, write_manifest(self.signature, self.backend, self.story))

    def update(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Take newly trained weights: replay what the passes computed from them, and lower again.

        `state_dict` is the original model's; nothing is captured again. Raises OptionError where a
        weight is missing or has another shape, and leaves the model as it was.
        """
        if self.graph is None:
            raise FxoptError("A model loaded from a file holds no recipes; compile it again.")
        updated = replay(self.graph, state_dict)
        renewed = CompiledModel.lower(updated, self.backend)
        self.graph, self.executable = updated, renewed.executable

    def benchmark(self, *args: Any, rounds: int = 30, warmup: int = 5, **kwargs: Any) -> Benchmark:
        """Measure the latency of calls, on the example inputs unless others are given.

        The model's state and the inputs stay as they are. Raises OptionError for `rounds` below 1.
        """
        if rounds < 1 or warmup < 0:
            raise OptionError(f"benchmark() needs at least one round, not {rounds}.")
        if args or kwargs:
            flat = self.signature.flatten(args, kwargs)
        elif self.graph is not None:
            flat = list(self.graph.info.example_inputs)
        else:
            raise OptionError("A loaded model holds no example inputs; pass inputs to benchmark().")
        flat = [v.clone() if isinstance(v, torch.Tensor) else v for v in flat]
        executable = self._without_history()
        wait = waiter(flat)
        times = []
        for turn in range(-warmup, rounds):
            started = time.perf_counter()
            executable.run(*flat)
            wait()
            if turn >= 0:
                times.append((time.perf_counter() - started) * 1e3)
        low, middle, high = (
            statistics.quantiles(times, n=4, method="inclusive") if rounds > 1 else times * 3
        )
        return Benchmark(middle, high - low, rounds)

    def visualize(
        self,
        path: str | Path,
        *,
        depth: int | str | None = "auto",
        step: str | int | None = None,
    ) -> None:
        """Write the optimized graph as a picture, or a step of its story; see `fxopt.visualize`."""
        from fxopt.picture import visualize

        visualize(self, path, depth=depth, step=step)

    def _repr_html_(self) -> str:
        """Show the report and the graph in a notebook."""
        from fxopt.picture.notebook import compiled_html

        return compiled_html(self)

    def __repr__(self) -> str:
        name = self.story.model_name if self.story is not None else "loaded model"
        return f"<fxopt.CompiledModel {name} on {self.backend.name}>"


class DeferredModel:
    """A model without example inputs: compiled for those inferred, and again for other shapes.

    At most `cache_size` shapes are kept, the most recently used.
    """

    cache_size = 8

    def __init__(
        self,
        model: torch.nn.Module,
        compile_for: Callable[[Inputs], CompiledModel],
        inferred: Inputs | None = None,
    ) -> None:
        check_ready(model)
        self._model = model
        self._compile_for = compile_for
        self._compiled: dict[Any, CompiledModel] = {}
        if inferred is not None:
            self._compiled[self._key(inferred.args, inferred.kwargs)] = compile_for(inferred)

    def _key(self, args: Any, kwargs: Any) -> Any:
        """Return what calls that one compilation serves have in common."""
        try:
            bound = forward_signature(self._model).bind(*args, **kwargs)
        except TypeError as error:
            raise ShapeError(f"The call does not fit the model: {error}.") from None
        leaves, spec = pytree.tree_flatten((bound.args, bound.kwargs))
        return str(spec), tuple(map(_leaf_key, leaves))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, compiling it for shapes that were not seen yet."""
        key = self._key(args, kwargs)
        compiled = self._compiled.pop(key, None)
        if compiled is None:
            compiled = self._compile_for(Inputs(args, kwargs))
            if len(self._compiled) >= self.cache_size:
                del self._compiled[next(iter(self._compiled))]
        self._compiled[key] = compiled
        return compiled(*args, **kwargs)

    def save(self, path: str | Path) -> None:
        """Write the artefact of the one shape that was compiled."""
        if len(self._compiled) > 1:
            raise FxoptError(
                f"This model was compiled for {len(self._compiled)} input shapes, and a file holds "
                "one. Compile with example_inputs= and dynamic_shapes=."
            )
        self._only().save(path)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(CompiledModel, name) and name not in _ATTRIBUTES:
            raise AttributeError(name)
        return getattr(self._only(), name)

    def _only(self) -> CompiledModel:
        if not self._compiled:
            raise FxoptError(
                "Nothing is compiled yet: the model does not say what inputs it takes. Pass "
                "example_inputs= or call it once."
            )
        return next(reversed(self._compiled.values()))

    def __repr__(self) -> str:
        return f"<fxopt.DeferredModel {type(self._model).__name__}, {len(self._compiled)} shapes>"


_ATTRIBUTES = ("graph", "story", "signature", "backend", "executable", "lower_seconds")


def _leaf_key(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.device
    return repr(value)


def load(path: str | Path, *, backend: Any = None, **options: Any) -> CompiledModel:
    """Read an artefact that `CompiledModel.save` wrote; never runs code from the file.

    The backend is told by the file's suffix, unless it is given. Raises ArtefactError for a file
    that is missing, damaged or foreign.
    """
    source = Path(path)
    if not source.is_file():
        raise ArtefactError(f"There is no file '{source}'.")
    if backend is None:
        names = [n for n, cls in classes("backends").items() if cls.suffix == source.suffix]  # type: ignore[attr-defined]
        if not names:
            known = ", ".join(sorted({cls.suffix for cls in classes("backends").values()}))  # type: ignore[attr-defined]
            raise ArtefactError(f"'{source}' has an unknown suffix. Known: {known}.")
        backend = names[0]
    chosen = resolve_backend(backend, options)
    check_available(chosen)
    executable, text = chosen.load(source)
    manifest: Manifest = read_manifest(text, source)
    graph = getattr(executable, "graph", None)
    return CompiledModel(executable, manifest.signature, chosen, graph, None)
