"""What compile returns: something that is called like the model, saves, and explains itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.backend import Backend, Executable
from fxopt.devices import waiter
from fxopt.errors import ArtefactError, FxoptError, OptionError, ShapeError, VerifyError
from fxopt.graph_module import GraphModule
from fxopt.inputs import Inputs, check_ready, forward_signature
from fxopt.manifest import Manifest, read_manifest, write_manifest
from fxopt.oracle import Oracle, check_captured
from fxopt.pipeline import legalize
from fxopt.registry import backends_by_suffix, check_available, resolve_backend
from fxopt.replay import replay
from fxopt.report import Report
from fxopt.serving.benchmark import Benchmark, WarmUp, measure, timed
from fxopt.serving.server import Server, serve
from fxopt.serving.settings import ServerSettings
from fxopt.signature import Signature
from fxopt.story import Story
from fxopt.verify import compare


class CompiledModel:
    """A lowered model. Call it with the model's own arguments; it returns the model's own outputs.

    `graph` is the portable optimized graph (None where a loaded artefact does not hold it), `story`
    and `report` say what was done to it, `backend` is what lowered it. Several threads may call it
    at once; where it `has_state` (a cache, a counter: what each call writes) they take turns.
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
        self.has_state = _keeps_state(executable, graph)
        self._free: Executable | None = None  # what may run in several threads at once
        self._turn = threading.RLock()
        self._server: Server | None = None

    @classmethod
    def lower(cls, graph: GraphModule, backend: Backend) -> CompiledModel:
        """Run the backend's own passes on a copy of `graph`, and lower it."""
        started = time.perf_counter()
        private = graph.copy()
        legalize(private, backend.legalize)
        executable = backend.lower(private)
        # a backend that chooses another, or a graph in another precision, tells it
        backend = getattr(executable, "lowered_by", backend)
        chosen: GraphModule = getattr(executable, "lowered_from", graph)
        signature = graph.info.signature
        assert signature is not None
        seconds = time.perf_counter() - started
        return cls(executable, signature, backend, chosen, graph.info.story, seconds)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; raise ShapeError where the inputs are not what was captured."""
        flat = self.signature.flatten(args, kwargs)
        self.signature.check(flat)
        return self.signature.output.unflatten(self.run_flat(flat))

    def run_flat(self, flat: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """Run on flat inputs that the signature has checked, and return flat outputs.

        The first run is one thread's alone, for it makes what later ones share: the graph's code,
        an engine's session. Where the model has state, every run is.
        """
        executable = self.executable
        if executable is self._free:
            return executable.run(*flat)
        with self._turn:
            outputs = executable.run(*flat)
            if not self.has_state:
                self._free = executable
            return outputs

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
        owner = backends_by_suffix().get(target.suffix)
        if owner is not None and target.suffix != self.backend.suffix:
            raise ArtefactError(
                f"Cannot write '{target}': '{target.suffix}' is the suffix of the backend "
                f"'{owner}', and this model is lowered to '{self.backend.name}'. Name the file "
                f"*{self.backend.suffix}, or compile with backend='{owner}'."
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

    # -- serving --------------------------------------------------------------------------------

    def warmup(self, *args: Any, calls: int = 3, **kwargs: Any) -> WarmUp:
        """Call the model before anybody waits, on the example inputs unless others are given.

        The first calls make an engine's session, optimize (TorchScript at the second) and get
        memory from the system. The model's state and the inputs stay as they are; a model with
        state warms up a twin, so its own session is still to be made. Raises OptionError for
        `calls` below 1.
        """
        if not (type(calls) is int and calls >= 1):
            raise OptionError(f"warmup() needs at least one call, not {calls!r}.")
        return WarmUp(timed(self._rehearsal(args, kwargs), calls))

    def benchmark(
        self, *args: Any, rounds: int = 30, warmup: int = 5, callers: int = 1, **kwargs: Any
    ) -> Benchmark:
        """Measure the latency of calls, on the example inputs unless others are given.

        With `callers`, so many threads call at once, `rounds` times each. The model's state and the
        inputs stay as they are. Raises OptionError for `rounds` or `callers` below 1, and for
        several callers of a model with state, which takes them one by one.
        """
        if self.has_state and callers != 1:
            raise OptionError(
                f"callers={callers!r} cannot call a model with state at once: it is changed by one "
                "call at a time. Leave callers out."
            )
        return measure(self._rehearsal(args, kwargs), rounds, warmup, callers)

    def _rehearsal(self, args: Any, kwargs: Any) -> Callable[[], None]:
        """Return a call that leaves state and inputs alone, and returns once devices are done."""
        if args or kwargs:
            flat = self.signature.flatten(args, kwargs)
            self.signature.check(flat)
        elif self.graph is not None:
            flat = list(self.graph.info.example_inputs)
        else:
            raise OptionError("A loaded model holds no example inputs; pass inputs to the call.")
        if self.has_state and self.graph is None:
            raise OptionError(
                "A loaded model with state cannot be called without changing that. Measure it "
                "where it is compiled, or load the file once more and time calls of that one."
            )
        flat = [v.clone() if isinstance(v, torch.Tensor) else v for v in flat]
        wait = waiter(flat)
        twin = self._without_history() if self.has_state else None

        def call() -> None:
            if twin is None:
                self.run_flat(flat)
            else:
                twin.run(*flat)
            wait()

        return call

    def serve(
        self,
        *,
        workers: int = 1,
        queue_size: int = 64,
        queue_timeout: float | None = None,
        max_batch: int = 1,
        max_wait_ms: float = 0.0,
        example_inputs: Any = None,
    ) -> Server:
        """Return a server: a queue and threads that run the model; see `ServerSettings`.

        With `max_batch` requests that wait are run as one batch, up to so many rows. The batch must
        be dynamic, dimension 0 of every output, and rows must not meet: that is judged by symbolic
        shapes, and tried on the example inputs, or on `example_inputs`. A model with state has one
        worker, and no batches. Raises OptionError, with the reason, for what the model does not
        allow.
        """
        settings = ServerSettings(workers, queue_size, queue_timeout, max_batch, max_wait_ms)
        return serve(self, settings, example_inputs)

    def submit(self, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue a call on a server of the model's own, made at the first use; see `Server.submit`.

        It has one worker, and lives as long as this model.
        """
        if self._server is None:
            with self._turn:
                self._server = self._server or self.serve()
        return self._server.submit(*args, **kwargs)

    def for_call(self, args: Any, kwargs: Any) -> CompiledModel:
        """Return what takes a call: this model takes all that it takes."""
        return self

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
        self._turn = threading.RLock()
        self._server: Server | None = None
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
        return self.for_call(args, kwargs)(*args, **kwargs)

    def for_call(self, args: Any, kwargs: Any) -> CompiledModel:
        """Return what was compiled for such a call; compile it, once, where nothing was yet."""
        key = self._key(args, kwargs)
        with self._turn:
            compiled = self._compiled.pop(key, None)
            if compiled is None:
                compiled = self._compile_for(Inputs(args, kwargs))
                if len(self._compiled) >= self.cache_size:
                    del self._compiled[next(iter(self._compiled))]
            self._compiled[key] = compiled
        return compiled

    def warmup(self, *args: Any, calls: int = 3, **kwargs: Any) -> WarmUp:
        """Compile for these inputs, or take what was last used; see `CompiledModel.warmup`."""
        chosen = self.for_call(args, kwargs) if args or kwargs else self._only()
        return chosen.warmup(*args, calls=calls, **kwargs)

    def benchmark(
        self, *args: Any, rounds: int = 30, warmup: int = 5, callers: int = 1, **kwargs: Any
    ) -> Benchmark:
        """Compile for these inputs, or take what was last used; see `CompiledModel.benchmark`."""
        chosen = self.for_call(args, kwargs) if args or kwargs else self._only()
        return chosen.benchmark(*args, rounds=rounds, warmup=warmup, callers=callers, **kwargs)

    def serve(
        self,
        *,
        workers: int = 1,
        queue_size: int = 64,
        queue_timeout: float | None = None,
        max_batch: int = 1,
    ) -> Server:
        """Return a server of all shapes; see `CompiledModel.serve`.

        A shape that was not seen yet is compiled by `submit`, before it returns. Raises OptionError
        for batches: each shape is a model of its own.
        """
        if max_batch != 1:
            raise OptionError(
                "Requests cannot run as one batch: each shape of this model is compiled by itself. "
                "Compile with example_inputs= and dynamic_shapes={0: 'batch'}."
            )
        return Server(self, ServerSettings(workers, queue_size, queue_timeout))

    def submit(self, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue a call on a server of the model's own; see `CompiledModel.submit`."""
        if self._server is None:
            with self._turn:
                self._server = self._server or self.serve()
        return self._server.submit(*args, **kwargs)

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
        with self._turn:
            return next(reversed(self._compiled.values()))

    def __repr__(self) -> str:
        return f"<fxopt.DeferredModel {type(self._model).__name__}, {len(self._compiled)} shapes>"


_ATTRIBUTES = (
    "graph", "story", "signature", "backend", "executable", "lower_seconds", "has_state",
)  # fmt: skip


def _keeps_state(executable: Executable, graph: GraphModule | None) -> bool:
    """Whether a call changes what the next one sees; without a graph the executable says so."""
    held = graph.info.mutated if graph is not None else getattr(executable, "state", ())
    return bool(held)


def _leaf_key(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.device
    return repr(value)


def load(path: str | Path, *, backend: Any = None, **options: Any) -> CompiledModel:
    """Read an artefact that `CompiledModel.save` wrote; never runs code from the file.

    Inductor's files are machine code, so those ask for `trust=True`.

    The backend is told by the file's suffix, unless it is given. Raises ArtefactError for a file
    that is missing, damaged or foreign.
    """
    source = Path(path)
    if not source.is_file():
        raise ArtefactError(f"There is no file '{source}'.")
    if backend is None:
        owners = backends_by_suffix()
        if source.suffix not in owners:
            known = ", ".join(sorted(owners))
            raise ArtefactError(f"'{source}' has an unknown suffix. Known: {known}.")
        backend = owners[source.suffix]
    chosen = resolve_backend(backend, options)
    check_available(chosen)
    executable, text = chosen.load(source)
    manifest: Manifest = read_manifest(text, source)
    graph = getattr(executable, "graph", None)
    return CompiledModel(executable, manifest.signature, chosen, graph, None)
