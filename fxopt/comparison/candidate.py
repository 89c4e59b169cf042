"""The candidates of a comparison: a model in PyTorch, and what was compiled from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from fxopt.backend import Backend
from fxopt.comparison.arguments import copied, fits, fitted, in_dtype, inputs_text
from fxopt.comparison.race import Call
from fxopt.comparison.untouched import untouched
from fxopt.compiled import CompiledModel, load
from fxopt.errors import OptionError
from fxopt.graph_module import GraphModule
from fxopt.inputs import Inputs, map_tensors
from fxopt.story import Counts, Recorder

KEPT_SHAPES = 4  # for how many other shapes a candidate is kept
MOST_COMPILATIONS = 16  # for other shapes


@dataclass(frozen=True)
class Artefact:
    """A saved candidate, in a folder of its own."""

    path: Path
    bytes: int
    backend: Backend | None = None  # what reads it
    model: torch.nn.Module | None = None  # where the file holds just its weights


class Candidate(Protocol):
    """Something that is compared."""

    def call(self, inputs: Inputs, threads: int | None = None) -> Call:
        """Return a call on a copy of these inputs, for timing.

        `threads` is what it shall use, where that is not torch's own setting. Raises FxoptError
        where it cannot be called like this.
        """
        ...

    def output(self, inputs: Inputs) -> Any:
        """Return the output of one call, from the state that the candidate starts with."""
        ...

    def arguments(self, inputs: Inputs) -> Inputs:
        """Return the inputs in the dtypes that the candidate takes."""
        ...

    @property
    def counts(self) -> Counts | None:
        """The size of its graph; None where nobody knows it."""
        ...

    @property
    def compile_seconds(self) -> float | None:
        """The seconds of capture, passes and lowering; None where it was not compiled."""
        ...

    def save(self, folder: Path) -> Artefact:
        """Save it into an empty folder."""
        ...


@dataclass
class ModelCandidate:
    """A model in PyTorch, called as it is."""

    model: torch.nn.Module
    graph: GraphModule | None = None  # what capture made of it
    dtype: torch.dtype | None = None  # what floating-point inputs are cast to

    def call(self, inputs: Inputs, threads: int | None = None) -> Call:
        """Return a call of the model, which uses as many threads as torch does."""
        own = copied(self.arguments(inputs))
        return lambda: self.model(*own.args, **own.kwargs)

    def output(self, inputs: Inputs) -> Any:
        """Return the output of one call; the model's state stays as it is."""
        own = copied(self.arguments(inputs))
        with untouched(self.model, self.written):
            return map_tensors(self.model(*own.args, **own.kwargs), torch.clone)

    def arguments(self, inputs: Inputs) -> Inputs:
        """Return the inputs in the dtype of the weights, where that differs from the baseline's."""
        return in_dtype(inputs, self.dtype)

    @property
    def written(self) -> frozenset[str]:
        """The names of the state that a call changes, as far as capture saw it."""
        return self.graph.info.mutated if self.graph is not None else frozenset()

    @property
    def counts(self) -> Counts | None:
        """The size of the captured graph."""
        return Recorder().snapshot(self.graph).counts if self.graph is not None else None

    @property
    def compile_seconds(self) -> float | None:
        """None: nothing is compiled."""
        return None

    def save(self, folder: Path) -> Artefact:
        """Save the weights, as PyTorch does."""
        path = folder / "weights.pt"
        torch.save(self.model.state_dict(), path)
        return Artefact(path, path.stat().st_size, model=self.model)


class CompiledCandidate:
    """A compiled model; it is compiled again for inputs of another shape, where it can be."""

    def __init__(
        self,
        compiled: CompiledModel,
        again: Callable[[Inputs], CompiledModel] | None = None,
        saved: Path | None = None,
    ) -> None:
        self.compiled = compiled
        self._again = again
        self._saved = saved  # where a model without a graph can be read again
        self._others: dict[str, CompiledModel] = {}  # for other shapes, the latest last
        self._compilations = 0

    @classmethod
    def of(cls, compiled: CompiledModel, folder: Path) -> CompiledCandidate:
        """Return a candidate for a user's own compiled model, whose state stays as it is.

        Without a graph it is saved into `folder` and read again from there.
        """
        if compiled.graph is None:
            saved = folder / f"own{compiled.backend.suffix}"
            compiled.save(saved)
            return cls(load(saved, backend=compiled.backend), saved=saved)
        if not compiled.graph.info.mutated:
            return cls(compiled)
        twin = CompiledModel.lower(compiled.graph, compiled.backend)
        twin.lower_seconds = compiled.lower_seconds
        return cls(twin)

    def call(self, inputs: Inputs, threads: int | None = None) -> Call:
        """Return a call of the compiled model, with `threads` where its backend has that option."""
        compiled = self._for(inputs)
        if threads is not None:
            backend = with_threads(compiled.backend, threads)
            if backend != compiled.backend:
                compiled = self._on(compiled, backend)
        own = copied(fitted(inputs, compiled.signature))
        return lambda: compiled(*own.args, **own.kwargs)

    def output(self, inputs: Inputs) -> Any:
        """Return the output of one call, by a twin where there is state."""
        compiled = self._for(inputs)
        graph = compiled.graph
        if graph is not None and graph.info.mutated:
            compiled = CompiledModel.lower(graph, compiled.backend)
        reset = getattr(compiled.executable, "reset_state", None)
        if reset is not None:
            reset()
        own = copied(fitted(inputs, compiled.signature))
        return compiled(*own.args, **own.kwargs)

    def arguments(self, inputs: Inputs) -> Inputs:
        """Return the inputs in the dtypes that the compiled model takes."""
        return fitted(inputs, self._for(inputs).signature)

    @property
    def counts(self) -> Counts | None:
        """The size of the optimized graph; None where it was loaded from a file without one."""
        graph = self.compiled.graph  # not the story's end: the user may have changed it since
        return Recorder().snapshot(graph).counts if graph is not None else None

    @property
    def compile_seconds(self) -> float | None:
        """The seconds of capture, passes and lowering; None where it was loaded from a file."""
        story = self.compiled.story
        if story is None:
            return None
        return story.capture_seconds + story.pass_seconds + self.compiled.lower_seconds

    def save(self, folder: Path) -> Artefact:
        """Save the artefact; its size is that of all its files."""
        path = folder / f"model{self.compiled.backend.suffix}"
        self.compiled.save(path)
        size = sum(file.stat().st_size for file in folder.iterdir())
        return Artefact(path, size, backend=self.compiled.backend)

    def _for(self, inputs: Inputs) -> CompiledModel:
        """Return what takes these inputs, compiled again for them if need be.

        Raises ShapeError where that is impossible, OptionError where it was done too often.
        """
        if self._again is None or fits(inputs, self.compiled.signature):
            return self.compiled
        shape = inputs_text(inputs)
        compiled = self._others.pop(shape, None)
        if compiled is None:
            self._compilations += 1
            if self._compilations > MOST_COMPILATIONS:
                raise OptionError(
                    f"The inputs have more than {MOST_COMPILATIONS} different shapes, and each is "
                    "compiled for. Name the dimensions that vary in dynamic_shapes=."
                )
            if len(self._others) >= KEPT_SHAPES:
                del self._others[next(iter(self._others))]
            compiled = self._again(inputs)
        self._others[shape] = compiled
        return compiled

    def _on(self, compiled: CompiledModel, backend: Backend) -> CompiledModel:
        """Return the same model on a backend with other options."""
        if compiled.graph is not None:
            return CompiledModel.lower(compiled.graph, backend)
        assert self._saved is not None
        return load(self._saved, backend=backend)


def with_threads(backend: Backend, threads: int) -> Backend:
    """Return the backend with `threads`, where it has that option."""
    has_option = is_dataclass(backend) and any(f.name == "threads" for f in fields(backend))
    return replace(backend, threads=threads) if has_option else backend  # type: ignore
