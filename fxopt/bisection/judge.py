"""Who says whether a graph is right: the model itself, a backend's result, or a user's function."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch

from fxopt.backend import Backend
from fxopt.bisection.attempt import Verdict
from fxopt.compiled import CompiledModel
from fxopt.errors import OptionError
from fxopt.graph_module import GraphModule
from fxopt.oracle import Oracle
from fxopt.provenance import user_frame
from fxopt.verify import Run, compare, runner, seeded


@dataclass
class Judge:
    """Judges graphs by a user's function or, without one, by comparison with the model.

    With a backend, what is judged is the graph as that backend runs it. `function` returns True
    for right and False for wrong, or a metric that is right from `threshold` on.
    """

    oracle: Oracle
    backend: Backend | None = None
    function: Callable[[Any], Any] | None = None
    threshold: float | None = None
    _expected: list[Sequence[Any]] = field(default_factory=list)
    _bounds: dict[int, float] = field(default_factory=dict)

    @property
    def follows_lossy(self) -> bool:
        """A comparison starts anew behind a lossy pass; a user's function judges that, too."""
        return self.function is None

    def since(self, graph: GraphModule) -> Judge:
        """Return a judge of what comes after a lossy pass: it must compute what that pass made."""
        return Judge(self.oracle.since(graph), self.backend, self.function, self.threshold)

    def __call__(self, graph: GraphModule) -> Verdict:
        """Judge a graph; leave it as it is."""
        if self.backend is None:
            return self._ask(graph.copy()) if self.function else self.compare(graph)
        if self.function is None:
            return self.compare_lowered(graph)
        lowered = self._lowered(graph)
        return lowered if isinstance(lowered, Verdict) else self._ask(lowered)

    def compare(self, graph: GraphModule) -> Verdict:
        """Compare a graph, run in PyTorch, with the reference."""
        verdict = self._compare("graph", runner(graph))
        accept = self.oracle.accept
        if verdict.right and accept is not None and accept(graph.copy()) is False:
            return Verdict(False, "your own acceptance refuses it", "refused")
        return verdict

    def compare_lowered(self, graph: GraphModule) -> Verdict:
        """Compare a graph, run by the backend, with the reference."""
        assert self.backend is not None
        lowered = self._lowered(graph)
        if isinstance(lowered, Verdict):
            return lowered
        return self._compare(f"{self.backend.name} backend", run_lowered(lowered))

    # -- comparing ----------------------------------------------------------------------------

    def _compare(self, what: str, found: Run) -> Verdict:
        """Compare on every input; the reference runs once per search, and so does its error."""
        if not self._expected:
            self._expected = [seeded(self.oracle.reference, flat) for flat in self.oracle.inputs]
        worst = Verdict(True, "there was nothing to compare", "differs", 0.0, 0.0)
        for index, flat in enumerate(self.oracle.inputs):
            try:
                result = seeded(found, flat)
            except Exception as error:
                raised = type(error).__name__
                words = f"the {what} fails with {raised}: {error}"
                return Verdict(False, words, "differs", math.inf, raised=raised)
            done = self._judged(what, index, result)
            if not done.right:
                return done
            if (done.error or 0.0) >= (worst.error or 0.0):
                worst = done
        return worst

    def _judged(self, what: str, index: int, result: Sequence[Any]) -> Verdict:
        """Compare one result with what was expected for the input at `index`."""
        expected = self._expected[index]
        done = compare(
            what, lambda _: result, lambda _: expected, self.oracle.original,
            [self.oracle.inputs[index]], self._bounds.get(index, self.oracle.tolerance),
        )  # fmt: skip
        if done.passed:
            words = f"max |Δ| / max |reference| is {done.error:.3g}, within {done.bound:.3g}"
        elif math.isinf(done.error):
            words = difference_text(result, expected)
        else:
            words = (
                f"max |Δ| / max |reference| is {done.error:.3g}, and the bound is {done.bound:.3g}"
            )
        if not done.passed:
            self._bounds[index] = done.bound
        return Verdict(done.passed, words, "differs", done.error, done.bound)

    # -- lowering and asking -------------------------------------------------------------------

    def _lowered(self, graph: GraphModule) -> CompiledModel | Verdict:
        assert self.backend is not None
        try:
            return CompiledModel.lower(graph.copy(), self.backend)
        except Exception as error:
            name = self.backend.name
            raised = type(error).__name__
            words = f"the backend '{name}' cannot lower it: {raised}: {error}"
            return Verdict(False, words, "not lowered", raised=raised)

    def _ask(self, subject: Any) -> Verdict:
        """Ask the user's function; what it raises counts as wrong."""
        function = self.function
        assert function is not None
        try:
            answer = seeded(lambda _: function(subject), ())
        except Exception as error:
            where = user_frame(error.__traceback__)
            at = f", at {where}" if where else ""
            words = f"the oracle fails with {type(error).__name__}: {error}{at}"
            return Verdict(False, words, "refused")
        return self._verdict_of(answer)

    def _verdict_of(self, answer: Any) -> Verdict:
        single = getattr(answer, "size", None) == 1 or getattr(answer, "numel", int)() == 1
        value = answer.item() if single else answer  # a tensor or an array of one number
        if isinstance(value, bool) and self.threshold is None:
            return Verdict(value, f"the oracle says {'right' if value else 'wrong'}", "refused")
        if isinstance(value, Real) and not isinstance(value, bool) and self.threshold is not None:
            words = f"the metric is {float(value):.6g}, and the threshold is {self.threshold:.6g}"
            return Verdict(float(value) >= self.threshold, words, "refused")
        if isinstance(value, Real) and self.threshold is None:
            raise OptionError(
                f"The oracle returned {value!r}. Say from which value on that is right: threshold=."
            )
        wanted = "True or False" if self.threshold is None else "a number, because of threshold="
        raise OptionError(f"The oracle returned {answer!r}; it must return {wanted}.")


def run_lowered(lowered: CompiledModel) -> Run:
    """Return a function that runs a compiled model on flat inputs and leaves its state alone."""
    return lambda flat: lowered._without_history().run(*flat)


def difference_text(found: Sequence[Any], expected: Sequence[Any]) -> str:
    """Say, in words, why the difference of two flat results is no number."""
    if len(found) != len(expected):
        return f"it returns {len(found)} values instead of {len(expected)}"
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        words = _leaf_text(ours, theirs)
        if words:
            return f"output {index} {words}"
    return "the outputs differ"


def _leaf_text(ours: Any, theirs: Any) -> str:
    if not (isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor)):
        same = type(ours) is type(theirs) and ours == theirs
        return "" if same else f"is {ours!r} instead of {theirs!r}"
    if ours.shape != theirs.shape:
        return f"has the shape {list(ours.shape)} instead of {list(theirs.shape)}"
    if ours.dtype != theirs.dtype:
        return f"is {ours.dtype} instead of {theirs.dtype}"
    if not (ours.is_floating_point() or ours.is_complex()):
        wrong = int((ours != theirs).sum())
        return f"differs in {wrong} of {ours.numel()} elements" if wrong else ""
    for word, test in (("NaN", torch.isnan), ("infinite", torch.isinf)):
        found, expected = test(ours), test(theirs)
        if not torch.equal(found, expected):
            return (
                f"is {word} in {int(found.sum())} of {ours.numel()} elements, and the reference in "
                f"{int(expected.sum())}"
            )
    return ""
