"""`check_rule`: everything that a test of a rewrite rule should ask, asked at once."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt import dialect
from fxopt.capture import capture
from fxopt.difference import relative_error
from fxopt.errors import CaptureError, FxoptError, OptionError, RuleError
from fxopt.explain import explain
from fxopt.graph_module import GraphModule
from fxopt.replay import replay
from fxopt.rules import Rule, RuleSet, apply_rules
from fxopt.testing.checks import expect, input_gradients
from fxopt.testing.examples import (
    KINDS,
    Example,
    alike,
    broadcasts,
    given_shape,
    is_drawn,
    other_ranks,
    other_shapes,
)
from fxopt.testing.forms import Form, forms, values_by_symbol
from fxopt.text import graph_text

__all__ = ["Example", "RuleCheck", "check_rule"]

SINGLE = 1e-6  # what counts as rounding of float32
ROUNDING = 1e-13  # and of float64
FLOATS = {torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 0.01}  # what each may lose
INTEGERS = (torch.int64, torch.uint8, torch.bool)
SPARED = {
    "zero": "zero", "ties": "zero", "large": "large", "nan": "nan", "inf": "inf", "-inf": "inf",
    "kink": "kink",
}  # fmt: skip


@dataclass
class RuleCheck:
    """What `check_rule` saw."""

    fired: int = 0  # forms and examples in which it fired
    held_back: int = 0
    error: float = 0.0  # the largest, in float64
    dynamic: int = 0  # forms that also fired with a symbolic first dimension
    others: int = 0  # other shapes, ranks, dtypes and numbers in which it fired, too
    inexact_at: set[str] = field(default_factory=set)  # where it differed, and was allowed to
    reasons: set[str] = field(default_factory=set)  # for which forms of the pattern held back
    notes: list[str] = field(default_factory=list)  # what could not be asked, and why

    def __add__(self, other: RuleCheck) -> RuleCheck:
        return RuleCheck(
            self.fired + other.fired, self.held_back + other.held_back,
            max(self.error, other.error), self.dynamic + other.dynamic, self.others + other.others,
            self.inexact_at | other.inexact_at, self.reasons | other.reasons,
            [*self.notes, *other.notes],
        )  # fmt: skip


def check_rule(
    rule: Rule | RuleSet,
    *inputs: Any,
    function: Callable[..., Any] | None = None,
    weights: Mapping[str, Any] | None = None,
    examples: Iterable[Example] = (),
    tolerance: float = 1e-10,
    gradients: bool = True,
    dynamic: bool | None = None,
    inexact_at: Collection[str] = (),
    reasons: Collection[str] = (),
    **named: Any,
) -> RuleCheck:
    """Check a rule on random inputs, in float64 unless said otherwise.

    The pattern itself is run: `inputs` (in the order in which it lists its symbols, or by name)
    give each symbol the shape of a tensor (a tuple), a tensor, a number, a list of numbers, or an
    operator where it is called. A symbol whose condition is `constant`, or that is given a
    `torch.nn.Parameter`, is a weight. Every form of the pattern is tried: each alternative, an
    optional part present and missing, repetitions and lists of several lengths, each of several
    patterns. Of a `RuleSet` each rule is checked so. With `function`, that is run instead, on
    `inputs` and `weights`. `examples` are asked as well.

    The methods of `_Check` say which of these points they ask.

    1. The rule fires, or, in an example with a reason, holds back with that reason. A form of the
       pattern may hold back with one of `reasons`, as long as some form fires.
    2. The graph is legal, and computes the same within `tolerance`, on three draws.
    3. It does so on positive inputs, on zeros, ties and halves, on large inputs, and where one
       input holds a nan or an infinity. On large inputs, what was finite must stay right; what
       overflowed before may be better now. The sign of a zero in the result does not count.
    4. New weights, put through what the rule computed from the old ones, give the new result, or
       are refused, since the rule looked at the numbers of the old ones.
    5. The comparison is tight: a small change of any input or weight is seen, unless the result
       does not depend on it at all.
    6. In float32 it is as precise as before. In half precision, in integers, in mixed dtypes, with
       sizes of 0 and 1 and others, with an axis more and one less, with operands that broadcast,
       with other numbers, and with other values where the pattern says `...`, it may hold back;
       where it fires, it is right, and it never raises.
    7. Where the pattern lets a number vary (`near`), numbers at the edge still compute the same
       within float32's rounding.
    8. Values inside the match that have other users keep their values.
    9. Gradients of the inputs are the same, on zeros and ties, too.
    10. With a symbolic first or last dimension it is right for other sizes, too, whether it fires
        or not; with `dynamic=True` it must fire with a symbolic first one.
    11. A second run changes nothing.

    `inexact_at` names what point 3 does not ask of a rule that is right in the reals alone: "nan",
    "inf", "zero", "large"; and "kink", gradients on zeros and ties, where torch has to choose one.
    Raises AssertionError, with the inputs and the graph, where one of the points fails, and
    OptionError where something cannot be asked as it was given.
    """
    known = {reasons} if isinstance(reasons, str) else set(reasons)
    if weights is not None and function is None:
        raise OptionError("check_rule: `weights` are those of `function`; give that, too.")
    report = _checked(
        rule, inputs, named, function=function, weights=weights, examples=[*examples],
        check=lambda one: _Check(
            one, tolerance, gradients, dynamic, _spared(inexact_at), frozenset(known)
        ),
    )  # fmt: skip
    for reason in sorted(known - report.reasons):
        raise AssertionError(
            f"{rule.name}: no form of the pattern held back with the reason '{reason}'; take it "
            "out of reasons=."
        )
    return report


def _checked(
    rule: Rule | RuleSet, inputs: tuple[Any, ...], named: Mapping[str, Any], *,
    function: Callable[..., Any] | None, weights: Mapping[str, Any] | None,
    examples: list[Example], check: Callable[[Rule], _Check],
) -> RuleCheck:  # fmt: skip
    """Ask about a rule, or each of a set; at least once it must fire, where it may at all."""
    if isinstance(rule, RuleSet):
        if function is not None or examples:
            raise OptionError(
                "check_rule: `function` and `examples` belong to one rule of the set: "
                f"check_rule({rule.name}[0], examples=…)."
            )
        reports = [
            _checked(
                one, inputs, named, function=None, weights=None, examples=[], check=check
            )
            for one in rule
        ]  # fmt: skip
        expect(bool(reports), f"{rule.name} has no rules, so that nothing is proven")
        return sum(reports, RuleCheck())
    if not isinstance(rule, Rule):
        raise OptionError(f"check_rule: {rule!r} is not a rule; make one with @rule(pattern).")
    asked = check(rule)
    if function is not None:
        examples = [*examples, Example(function, *inputs, weights=weights)]
    for one in examples:
        asked.ask(one)
    if function is None and (inputs or named or not examples):
        for form in forms(rule, values_by_symbol(rule, inputs, named)):
            asked.ask(form)
        if asked.report.reasons:
            said = ", ".join(sorted(asked.report.reasons))
            words = f"{rule.name} held back in each form of its pattern: {said}"
            expect(asked.fired_forms > 0, words)
    return asked.report


def _spared(kinds: Collection[str]) -> frozenset[str]:
    known = set(SPARED.values())
    several = {kinds} if isinstance(kinds, str) else set(kinds)
    if several - known:
        raise OptionError(
            f"check_rule: inexact_at takes {', '.join(map(repr, sorted(known)))}, not "
            f"{', '.join(map(repr, sorted(several - known)))}."
        )
    return frozenset(several)


@dataclass
class _Applied:
    """A rewritten graph, and the model that it was captured from."""

    graph: GraphModule
    model: torch.nn.Module  # not the one that was captured: nobody can have written to it
    rewrites: int


@dataclass
class _Check:
    """What is asked of one rule, and what came out so far."""

    rule: Rule
    tolerance: float
    gradients: bool
    dynamic: bool | None
    spared: frozenset[str]
    reasons: frozenset[str]
    report: RuleCheck = field(default_factory=RuleCheck)
    fired_forms: int = 0

    def ask(self, example: Example) -> None:
        """Ask everything of one example."""
        form = example if isinstance(example, Form) else None
        if form is not None and not form.must_fire:
            self._expect_right_if_it_fires(form.words or "in a shorter form", form)
            for words, cube in alike(form):
                self._expect_right_if_it_fires(words, cube)
        elif example.reason is not None:
            self._expect_held_back(example)
            self.report.held_back += 1
        elif form is not None and self._holds_back_with_a_reason(form):
            self.report.held_back += 1
        elif form is not None and form.at_edge:
            self._expect_same(example, SINGLE)
            self._count(example)
        else:
            brief, first = (form.brief, form.first) if form is not None else (False, True)
            self._ask_where_it_fires(example, brief=brief, first=first)
            self._count(example)

    def _count(self, example: Example) -> None:
        self.report.fired += 1
        self.fired_forms += isinstance(example, Form)

    def _holds_back_with_a_reason(self, form: Form) -> bool:
        """Point 1: whether the rule holds back in a form with one of the reasons that it may."""
        if not self.reasons or form.failure is not None or self._applied(form).rewrites:
            return False
        said = str(explain(self.rule, _captured(form, form.model(), torch.float64)))
        found = {reason for reason in self.reasons if reason in said}
        self.report.reasons |= found
        return bool(found)

    def _ask_where_it_fires(self, example: Example, *, brief: bool, first: bool) -> None:
        applied = self._expect_same(example, self.tolerance)
        self._expect_seen(example)
        self._expect_unusual(example, applied)
        self._expect_new_weights(example, applied)
        if brief:
            return
        self._expect_precise(example)
        self._expect_users_kept(example)
        self._expect_other_sizes(example)
        if self.gradients:
            self._expect_gradients(example, applied)
        for words, other in other_shapes(example):
            self._expect_right_if_it_fires(words, other, ask="shape")
        for words, names, other in other_ranks(example):
            self._expect_right_if_it_fires(words, other, ask="ndim", names=names)
        if first:
            for other in broadcasts(example):
                self._expect_right_if_it_fires("with operands that broadcast", other, ask="shape")
            for dtype in (*INTEGERS, *_mixed(example)):
                self._expect_right_if_it_fires("", example, dtype, ask="dtype")

    # -- what is asked -------------------------------------------------------------------------

    def _expect_same(self, example: Example, tolerance: float) -> _Applied:
        """Points 1, 2 and 7: it fires, and computes the same."""
        failure = example.failure if isinstance(example, Form) else None
        if failure is not None:
            raise OptionError(
                f"check_rule({self.rule.name}): the pattern does not run on {example.text()}: "
                f"{str(failure).splitlines()[0]}. Give other values; a tuple is the shape of a "
                "tensor, a list is a list of numbers."
            ) from failure
        applied = self._applied(example)
        if not applied.rewrites:
            fresh = _captured(example, example.model(), torch.float64)
            raise AssertionError(f"{explain(self.rule, fresh)}\n{graph_text(fresh)}")
        for seed in (1, 2, 3):
            inputs = example.draw(seed)
            expected = _ran(applied.model, inputs)
            found = self._found(applied.graph, inputs, "", example)
            error = relative_error(found, expected)
            if error > tolerance:
                words = _difference(found, expected, 0.0)
                raise self._wrong(
                    "", example, f"results differ by {error:.3g} > {tolerance:.3g}: {words}",
                    applied.graph,
                )  # fmt: skip
            self.report.error = max(self.report.error, error)
        return applied

    def _expect_unusual(self, example: Example, applied: _Applied) -> None:
        """Point 3: zeros, large numbers, nan; each input by itself where it would hide others."""
        floats = [i for i, x in enumerate(example.draw(1)) if x.is_floating_point() and x.numel()]
        for kind in list(KINDS)[1:]:
            alone = "{}" in KINDS[kind]
            for at in floats if alone else [None]:
                words = KINDS[kind].format(example.names[at] if at is not None else "")
                inputs = example.draw(5, kind=kind, at=at)
                self._expect_equal(words, example, applied, inputs, kind=kind)

    def _expect_equal(
        self, words: str, example: Example, applied: _Applied, inputs: Sequence[torch.Tensor],
        *, kind: str = "normal", tolerance: float = 0.0, dtype: Any = torch.float64,
    ) -> None:  # fmt: skip
        try:
            expected = _ran(applied.model, inputs)
        except Exception:
            return  # the original does not take these
        found = self._found(applied.graph, inputs, words, example, dtype)
        room = max(tolerance, self.tolerance, 1e-6 if kind == "large" else 1e-9)
        difference = _difference(found, expected, room, only_finite=kind == "large")
        if difference is None:
            return
        name = SPARED.get(kind, "")
        if name in self.spared:
            self.report.inexact_at.add(name)
            return
        hint = _hint(name) if name else ""
        raise self._wrong(words, example, f"{difference}{hint}", applied.graph, dtype)

    def _expect_new_weights(self, example: Example, applied: _Applied) -> None:
        """Point 4: put new weights through what was computed from the old ones."""
        if not example.weights:
            return
        for kind in ("normal", "zero"):
            model = example.model(seed=29, kind=kind)
            words = "with new weights" + (" that hold zeros" if kind == "zero" else "")
            try:
                graph = replay(applied.graph, model.state_dict())
            except FxoptError as error:
                if applied.graph.info.looked_at:  # refused, and so not wrong
                    self.report.notes.append(f"new weights: {error}")
                    return
                raise self._wrong(words, example, str(error), applied.graph) from error
            twin = _Applied(graph, model, 1)
            self._expect_equal(words, example, twin, example.draw(1), kind=kind)

    def _expect_held_back(self, example: Example) -> None:
        """Point 1, of an example with a reason."""
        graph = _captured(example, example.model(), torch.float64)
        before = graph_text(graph)
        result = apply_rules(graph, (self.rule,))
        name = self.rule.name
        expect(not result.modified, f"{name} must hold back, and fired", graph)
        expect(graph_text(graph) == before, f"{name} held back, and changed the graph", graph)
        words, reason = str(explain(self.rule, graph)), example.reason or ""
        expect(reason in words, f"{name}: expected the reason '{reason}'. {words}")

    def _expect_seen(self, example: Example) -> None:
        """Point 5: move each input and weight: a difference that matters must be seen."""
        model, inputs = example.model(), example.draw(1)
        expected, others = _ran(model, inputs), example.draw(17)
        numbers = [x for x in pytree.tree_leaves(expected) if isinstance(x, torch.Tensor)]
        if not any(x.numel() and x.isfinite().any() for x in numbers):
            raise self._wrong("", example, "no result is finite, so that nothing is proven")
        for place, value in enumerate(inputs):
            if value.is_floating_point():
                moved = [(*inputs[:place], v, *inputs[place + 1 :])
                         for v in (_moved(value), others[place])]  # fmt: skip
                results = (_ran(model, several) for several in moved)
                self._expect_one_seen(example, example.names[place], results, expected)
        other = example.model(seed=23).state_dict()
        for name, weight in model.named_parameters():
            for changed in (_moved(weight.detach()), other[name]):
                twin = copy.deepcopy(model)
                twin.get_parameter(name).data.copy_(changed)
                if self._is_seen(example, name, _ran(twin, inputs), expected):
                    break

    def _expect_one_seen(
        self, example: Example, name: str, results: Iterable[Any], expected: Any
    ) -> None:
        if not any(self._is_seen(example, name, found, expected) for found in results):
            self.report.notes.append(f"the result does not depend on {name}")

    def _is_seen(self, example: Example, name: str, found: Any, expected: Any) -> bool:
        error = relative_error(found, expected)
        if ROUNDING < error <= self.tolerance:
            raise self._wrong(
                "", example, f"{name} makes a difference of {error:.3g} only, so that nothing is "
                "proven about it; give other inputs, or a smaller tolerance",
            )  # fmt: skip
        return error > self.tolerance

    def _expect_precise(self, example: Example) -> None:
        """Point 6: in float32 as precise as before; in half precision right where it fires."""
        exact = example.model(torch.float64)
        for dtype, room in FLOATS.items():
            try:
                _ran(example.model(dtype), example.draw(1, dtype))
            except (RuntimeError, NotImplementedError) as error:
                self.report.notes.append(f"{dtype} does not run without the rule either: {error}")
                continue
            applied = self._applied(example, dtype, ask="dtype")
            reference = _same_weights(exact, applied.model)
            if applied.rewrites:
                self._expect_as_precise(example, applied, reference, dtype, room)

    def _expect_as_precise(
        self, example: Example, applied: _Applied, reference: torch.nn.Module,
        dtype: Any, room: float,
    ) -> None:  # fmt: skip
        inputs = example.draw(2, dtype)
        exact = _ran(reference, _wide(inputs))
        original = _ran(applied.model, inputs)
        before = relative_error(_wide(original), exact)
        found = self._found(applied.graph, inputs, "", example, dtype)
        after = relative_error(_wide(found), exact)
        if after > max(4 * before, room):
            words = f"in {_text(dtype)} the error grows from {before:.3g} to {after:.3g}"
            raise self._wrong("", example, words, applied.graph, dtype)
        inputs = example.draw(5, dtype, kind="large")
        original = _ran(applied.model, inputs)
        exact = _ran(reference, _wide(inputs))
        if _difference(_wide(original), exact, room, only_finite=True) is None:
            self._expect_equal(
                KINDS["large"], example, applied, inputs, kind="large", tolerance=2 * room,
                dtype=dtype,
            )  # fmt: skip

    def _expect_right_if_it_fires(
        self, words: str, example: Example, dtype: Any = torch.float64, *, ask: str = "",
        names: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Point 6: where the example runs without the rule, it comes out the same with it.

        `ask` is what a rule that raises has not asked, of the tensors of these names.
        """
        if isinstance(example, Form) and example.failure is not None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on empty means and the like
            try:
                _ran(example.model(_of_weights(dtype)), example.draw(1, dtype))
            except Exception:
                return  # the original does not take these
            self._right_if_it_fires(words, example, dtype, ask, names)

    def _right_if_it_fires(
        self, words: str, example: Example, dtype: Any, ask: str, names: Sequence[str]
    ) -> None:
        applied = self._applied(example, dtype, words=words, ask=ask, names=names)
        if not applied.rewrites:
            return
        self.report.others += 1
        tolerance = 0.0 if dtype == torch.float64 else FLOATS[torch.float32]
        for kind in ("normal", "zero"):
            self._expect_equal(
                words, example, applied, example.draw(3, dtype, kind), kind=kind,
                tolerance=tolerance, dtype=dtype,
            )  # fmt: skip
        if isinstance(dtype, list) and all(one.is_floating_point for one in dtype):
            reference = _same_weights(example.model(), applied.model)
            self._expect_as_precise(example, applied, reference, dtype, 1e-9)
        if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
            inputs = example.draw(5, dtype, kind="large")
            self._expect_equal(
                KINDS["large"], example, applied, inputs, kind="large", tolerance=tolerance,
                dtype=dtype,
            )  # fmt: skip

    def _expect_gradients(self, example: Example, applied: _Applied) -> None:
        """Point 9."""
        for kind, seed in (("normal", 11), ("zero", 11), ("ties", 11), ("ties", 12)):
            self._expect_equal_gradients(example, applied, kind, seed)

    def _expect_equal_gradients(
        self, example: Example, applied: _Applied, kind: str, seed: int
    ) -> None:
        inputs, trained = list(example.draw(seed, kind=kind)), copy.deepcopy(applied.graph)
        zeros = [torch.zeros_like(x) for x in inputs if x.is_floating_point()]
        expected = input_gradients(applied.model, inputs) or zeros
        found = input_gradients(trained, inputs) or zeros
        difference = _difference(found, expected, max(self.tolerance, 1e-9))
        if difference is not None and kind != "normal" and "kink" in self.spared:
            self.report.inexact_at.add("kink")
        elif difference is not None:
            hint = _hint("kink") if kind != "normal" else ""
            words = f"gradients of the inputs differ: {difference}{hint}"
            raise self._wrong(KINDS[kind] if hint else "", example, words, applied.graph)
        for name, parameter in trained.named_parameters() if expected else ():
            used = any(n.target == name for n in trained.graph.find_nodes(op="get_attr"))
            if used and parameter.requires_grad and parameter.grad is None:
                words = f"no gradient reaches the parameter {name}"
                raise self._wrong("", example, words, applied.graph)

    def _expect_users_kept(self, example: Example) -> None:
        """Point 8: make every value inside an output, too: those must come out as before."""
        inputs = example.draw(1)
        graph = _captured(example, example.model(), torch.float64)
        inside = [n for n in graph.graph.nodes if n.op == "call_function" and _is_float(n)]
        output = graph.output_node
        output.args = ((*output.args[0], *(n for n in inside if n not in output.args[0])),)  # type: ignore
        graph.recompile()
        twin = copy.deepcopy(graph)
        apply_rules(graph, (self.rule,))
        with torch.no_grad():
            found, expected = graph.run(*inputs), twin.run(*inputs)
        error = relative_error(found, expected)
        if error > self.tolerance:
            words = f"a value inside the match that is used elsewhere changed by {error:.3g}"
            raise self._wrong("", example, words, graph)

    # -- symbolic sizes ------------------------------------------------------------------------

    def _expect_other_sizes(self, example: Example) -> None:
        """Point 10: symbolic first and last dimensions, of all inputs that have their size."""
        if self.dynamic is False:
            return
        inputs = example.draw(1)
        sized = [x for x in inputs if x.dim() and x.shape[0] > 1]
        if not sized:
            self.report.notes.append("no input has a first dimension to make symbolic")
            return
        try:
            fired = self._with_symbolic(example, 0, sized[0].shape[0])
        except CaptureError as error:
            words = f"the example cannot be captured with a symbolic size: {error}"
            expect(not self.dynamic, words)
            self.report.notes.append(f"no symbolic size: {str(error).splitlines()[0]}")
            return
        name = self.rule.name
        words = f"{name} does not fire with a symbolic first dimension"
        expect(fired or not self.dynamic, words)
        self.report.dynamic += fired
        last = sized[0].shape[-1]
        taken = any(last in given_shape(weight) for weight in example.weights.values())
        if sized[0].dim() == 1 or last == 1 or taken:
            return
        with contextlib.suppress(CaptureError):  # the function needs that size
            self._with_symbolic(example, -1, last)

    def _with_symbolic(self, example: Example, dim: int, size: int) -> bool:
        inputs = example.draw(1)
        chosen = [x.dim() > 0 and x.shape[dim] == size for x in inputs]
        shapes = tuple(
            {dim % x.dim(): "n"} if is_it else {} for x, is_it in zip(inputs, chosen, strict=True)
        )
        graph = _captured(example, example.model(), torch.float64, dynamic_shapes={"args": shapes})
        before = graph.copy()
        applied = self._applied(example, graph=graph, words="with a symbolic size")
        for more in (1, size + 1):
            larger = [
                torch.cat([x, *(x.narrow(dim, i % size, 1) for i in range(more))], dim)
                if is_it else x
                for x, is_it in zip(inputs, chosen, strict=True)
            ]  # fmt: skip
            try:
                _ran(before, larger)
            except Exception:
                continue  # the captured graph is not for this size
            words = f"with a symbolic size, captured at {size} and run at {size + more},"
            self._expect_equal(words, example, applied, larger)
        return applied.rewrites > 0

    # -- how it is asked -----------------------------------------------------------------------

    def _applied(
        self, example: Example, dtype: Any = torch.float64, *, graph: GraphModule | None = None,
        words: str = "", ask: str = "", names: Sequence[str] = (),
    ) -> _Applied:  # fmt: skip
        """Return the example after the rule; point 11: a second run must change nothing."""
        model = example.model(_of_weights(dtype))
        graph = graph or _captured(example, copy.deepcopy(model), dtype)
        try:
            dialect.check(graph)
            rewrites = apply_rules(graph, (self.rule,)).rewrites
            dialect.check(graph)
            again = rewrites and apply_rules(graph, (self.rule,)).modified
        except RuleError as error:
            raise self._raised(error, example, dtype, words, ask, names) from error
        except FxoptError as error:
            words = " ".join(filter(None, (self.rule.name, words)))
            error.args = (f"{error} ({words}, on {example.text(dtype)})",)
            raise
        if again:
            raise self._wrong(words, example, "a second run changed the graph again", graph, dtype)
        return _Applied(graph, model, rewrites)

    def _found(
        self, graph: GraphModule, inputs: Sequence[torch.Tensor], words: str, example: Example,
        dtype: Any = torch.float64,
    ) -> Any:  # fmt: skip
        try:
            return _ran(graph, inputs)
        except Exception as error:
            said = f"the original runs, and the result fails with {type(error).__name__}: {error}"
            raise self._wrong(words, example, said, graph, dtype) from error

    def _raised(
        self, error: RuleError, example: Example, dtype: Any, words: str, ask: str,
        names: Sequence[str],
    ) -> AssertionError:  # fmt: skip
        """Return what to say of a rule that raises, which would end the compilation of a model."""
        cause = error.__cause__ or error
        said = f"{type(cause).__name__}: {str(cause).splitlines()[0]}".rstrip(".")
        symbols = dict.fromkeys(name.split("__")[0] for name in names or example.names)
        asked = " or ".join(f"{name}.{ask}" for name in symbols)
        hint = f" Ask {asked} first, and return in words why not." if ask else ""
        return self._wrong(
            words, example, f"at {example.text(dtype)} the rule raised {said}.{hint}", dtype=dtype
        )

    def _wrong(
        self, words: str, example: Example, difference: str, graph: GraphModule | None = None,
        dtype: Any = torch.float64,
    ) -> AssertionError:  # fmt: skip
        form = example.words if isinstance(example, Form) and example.words != words else ""
        where = " ".join(filter(None, (form, words)))
        text = f"\n{graph_text(graph)}" if graph is not None else ""
        return AssertionError(
            f"{self.rule.name}{f' {where}' if where else ''}: {difference}\n"
            f"The inputs are {example.text(dtype)}.{text}"
        )


# -- running ---------------------------------------------------------------------------------------


def _captured(example: Example, model: torch.nn.Module, dtype: Any, **options: Any) -> GraphModule:
    graph = capture(model, example.draw(1, dtype), **options)
    for node in graph.graph.nodes:
        if example.source and node.meta.get("source"):
            node.meta["source"] = example.source  # torch sees no further than forward()
    return graph


def _ran(module: torch.nn.Module, inputs: Sequence[Any]) -> Any:
    """Run a module; one with buffers, which it may write to, as a copy."""
    if any(True for _ in module.buffers()):
        module = copy.deepcopy(module)
    with torch.no_grad():
        return module(*(x.clone() for x in inputs))


def _hint(kind: str) -> str:
    return f". If it is right everywhere else, say so: inexact_at={{'{kind}'}}"


def _text(dtype: Any) -> str:
    return " and ".join(map(str, dtype if isinstance(dtype, list) else [dtype]))


def _of_weights(dtype: Any) -> torch.dtype:
    return dtype if isinstance(dtype, torch.dtype) else dtype[-1]


def _mixed(example: Example) -> list[list[torch.dtype]]:
    """Return dtypes for each input that are not all the same."""
    count = len(example.inputs)
    if sum(map(is_drawn, (*example.inputs, *example.weights.values()))) < 2 or not count:
        return []
    others = max(count - 1, 1)
    return [
        [first, *[rest] * others]
        for first, rest in ((torch.float32, torch.float64), (torch.float64, torch.float32),
                            (torch.int64, torch.float32))
    ]  # fmt: skip


def _moved(value: torch.Tensor) -> torch.Tensor:
    ramp = torch.linspace(1, 2, max(value.numel(), 1), dtype=value.dtype)
    return value + 1e-3 * ramp[: value.numel()].reshape(value.shape)


def _wide(nested: Any) -> Any:
    return pytree.tree_map_only(
        torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, nested
    )


def _same_weights(exact: torch.nn.Module, model: torch.nn.Module) -> torch.nn.Module:
    twin = copy.deepcopy(exact)
    twin.load_state_dict({k: _wide(v) for k, v in model.state_dict().items()})
    return twin


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


# -- comparing -------------------------------------------------------------------------------------


def _difference(
    found: Any, expected: Any, tolerance: float, *, only_finite: bool = False
) -> str | None:
    """Say where two results differ, relative to the largest number; None where they do not.

    With `only_finite`, only where the expected one is finite.
    """
    ours, our_spec = pytree.tree_flatten(found)
    theirs, their_spec = pytree.tree_flatten(expected)
    if our_spec != their_spec:
        return "the result has another structure"
    several = (
        _leaf_difference(a, b, tolerance, only_finite) for a, b in zip(ours, theirs, strict=True)
    )
    return next((words for words in several if words is not None), None)


def _leaf_difference(found: Any, expected: Any, tolerance: float, only_finite: bool) -> str | None:
    if not isinstance(expected, torch.Tensor) or not isinstance(found, torch.Tensor):
        return None if found == expected else f"the result is {found!r}, and was {expected!r}"
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return (
            f"the result is {found.dtype} of shape {list(found.shape)}, and was {expected.dtype} "
            f"of shape {list(expected.shape)}"
        )
    if not (expected.is_floating_point() or expected.is_complex()):
        wrong = (found != expected).double()
    else:
        wrong = _wrongness(found, expected, tolerance, only_finite)
    if not wrong.any():
        return None
    place = tuple(int(i) for i in torch.unravel_index(wrong.argmax(), wrong.shape))
    index = f"at {list(place)} " if place else ""
    return f"{index}the result is {found[place].item()}, and was {expected[place].item()}"


def _wrongness(
    found: torch.Tensor, expected: torch.Tensor, tolerance: float, only_finite: bool
) -> torch.Tensor:
    """Return how wrong each element is; 0 where it is right."""
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = found.detach().to(wide), expected.detach().to(wide)
    finite = b.isfinite()
    largest = float(b[finite].abs().max()) if finite.any() else 0.0
    distance = (a - b).abs()
    right = (distance <= tolerance * max(largest, 1.0)) | (a == b) | (a.isnan() & b.isnan())
    if only_finite:
        right |= ~finite
    return distance.nan_to_num(nan=torch.inf).masked_fill(right, 0.0)
