"""`check_rule`: everything that a test of a rewrite rule should ask, asked at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fxopt import dialect
from fxopt.capture import capture
from fxopt.conditions import constant
from fxopt.difference import relative_error
from fxopt.errors import CaptureError, FxoptError
from fxopt.explain import explain
from fxopt.graph_module import GraphModule
from fxopt.pattern import (
    AnyCall,
    AnyOf,
    CallPattern,
    Each,
    Named,
    Near,
    Outputs,
    Repeated,
    Rest,
    Var,
    everything_in,
    pattern_text,
)
from fxopt.rules import Rule, apply_rules
from fxopt.spelling import ANY
from fxopt.testing.checks import _expect_gradients
from fxopt.text import graph_text

SINGLE = 1e-6  # what counts as rounding of float32


class Example:
    """A function, and inputs to capture it with, in which a rule fires, or must not.

    An input is a tensor, or the shape of one: a tuple of integers. `weights` become parameters of
    the model, and arrive as keyword arguments. With a `reason` the rule must hold back, and what it
    says must contain that text.
    """

    def __init__(
        self, function: Callable[..., Any], *inputs: Any,
        weights: Mapping[str, Any] | None = None, reason: str | None = None,
    ) -> None:  # fmt: skip
        self.function, self.inputs, self.reason = function, inputs, reason
        self.weights = dict(weights or {})

    def model(self, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
        """Return the function as a module, with random weights of this dtype."""
        weights = {name: _drawn(value, dtype, 7) for name, value in self.weights.items()}
        return _Function(self.function, weights).eval()

    def draw(self, seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
        """Return random inputs; floats in this dtype, integers as they are."""
        return tuple(_drawn(value, dtype, seed + i) for i, value in enumerate(self.inputs))


class _Function(torch.nn.Module):
    def __init__(self, function: Callable[..., Any], weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        for name, weight in weights.items():
            self.register_parameter(name, torch.nn.Parameter(weight))

    def forward(self, *args: Any) -> Any:
        return self.function(*args, **dict(self.named_parameters()))


def _drawn(value: Any, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point():
            return value
        value = tuple(value.shape)
    return torch.randn(value, generator=generator, dtype=torch.float64).to(dtype)


@dataclass
class RuleCheck:
    """What `check_rule` saw: how many forms fired, how many held back, the largest error."""

    fired: int = 0
    held_back: int = 0
    error: float = 0.0
    dynamic: int = 0  # forms that also fired with a symbolic first dimension
    notes: list[str] = field(default_factory=list)  # what could not be asked, and why


def check_rule(
    rule: Rule,
    *inputs: Any,
    function: Callable[..., Any] | None = None,
    weights: Mapping[str, Any] | None = None,
    examples: Iterable[Example] = (),
    tolerance: float = 1e-10,
    gradients: bool = True,
    dynamic: bool | None = None,
    **named: Any,
) -> RuleCheck:
    """Check a rule on random inputs, in float64 unless said otherwise.

    Without `function` and `examples` the pattern itself is run: `inputs` (or `named`) give each
    symbol of the pattern a shape (a tuple), a tensor, or a number; a `torch.nn.Parameter`, or a
    symbol whose condition is `constant`, is a weight. Every form of the pattern is tried: each
    alternative, an optional part present and missing, repetitions, each of several patterns.

    1. The rule fires, or, in an example with a reason, holds back with that reason.
    2. The graph is legal, and computes the same within `tolerance`, on three draws.
    3. So it does in float32, as precisely as before; in float16 and in integers it may hold back.
    4. The comparison is tight: each input matters to the result, so that a wrong replacement shows.
    5. Where the pattern lets a number vary (`near`), numbers at the edge still compute the same
       within float32's rounding.
    6. Values inside the match that have other users keep their values.
    7. Gradients of the inputs are the same.
    8. With a symbolic first dimension it is right for another size, too, whether it fires or not;
       with `dynamic=True` it must fire.
    9. A second run changes nothing.

    Raises AssertionError, with the graph and the explanation, where one of these fails.
    """
    several = [*examples]
    if function is not None:
        several.append(Example(function, *inputs, weights=weights))
    report = RuleCheck()
    if not several:
        several = list(_forms(rule, _by_symbol(rule, inputs, named), report))
    for example in several:
        if example.reason is not None:
            _expect_held_back(rule, example)
            report.held_back += 1
            continue
        bound = getattr(example, "bound", tolerance)
        report.error = max(report.error, _expect_same(rule, example, bound))
        report.fired += 1
        if bound != tolerance:
            continue  # a number at the edge of its tolerance: equal up to rounding, no more
        _expect_tight(example, bound)
        _expect_other_dtypes(rule, example, report)
        _expect_users_kept(rule, example, tolerance)
        _expect_dynamic(rule, example, tolerance, dynamic, report)
        if gradients:
            graph = _applied(rule, example)[0]
            _expect_gradients(example.model(), graph, example.draw(11), max(tolerance, 1e-9))
    return report


# -- what is asked ---------------------------------------------------------------------------------


def _applied(
    rule: Rule, example: Example, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[GraphModule, int, torch.nn.Module]:
    """Return the rewritten graph, the number of rewrites, and the model."""
    model = example.model(dtype)
    graph = capture(model, example.draw(1, dtype), **options)
    dialect.check(graph)
    result = apply_rules(graph, (rule,))
    dialect.check(graph)
    assert not apply_rules(graph, (rule,)).modified, (
        f"{rule.name}: a second run changed the graph again\n{graph_text(graph)}"
    )
    return graph, result.rewrites, model


def _expect_same(rule: Rule, example: Example, tolerance: float) -> float:
    graph, rewrites, model = _applied(rule, example)
    if not rewrites:
        fresh = capture(model, example.draw(1))
        raise AssertionError(f"{explain(rule, fresh)}\n{graph_text(fresh)}")
    worst = 0.0
    for seed in (1, 2, 3):
        error = _error(graph, model, example.draw(seed))
        assert error <= tolerance, (
            f"{rule.name}: results differ by {error:.3g} > {tolerance:.3g}\n{graph_text(graph)}"
        )
        worst = max(worst, error)
    return worst


def _error(graph: GraphModule, model: torch.nn.Module, inputs: Sequence[Any]) -> float:
    with torch.no_grad():
        return relative_error(copy.deepcopy(graph)(*inputs), model(*inputs))


def _expect_held_back(rule: Rule, example: Example) -> None:
    model = example.model()
    graph = capture(model, example.draw(1))
    before = graph_text(graph)
    result = apply_rules(graph, (rule,))
    assert not result.modified, f"{rule.name} must hold back, and fired\n{graph_text(graph)}"
    assert graph_text(graph) == before, f"{rule.name} held back, and changed the graph"
    words = str(explain(rule, graph))
    assert example.reason is not None and example.reason in words, (
        f"{rule.name}: expected the reason '{example.reason}'. {words}"
    )


def _expect_tight(example: Example, tolerance: float) -> None:
    """Move each input and weight a little: a difference that matters must be seen as one."""
    model, inputs = example.model(), example.draw(1)
    with torch.no_grad():
        expected = model(*inputs)
        for place, value in enumerate(inputs):
            if value.is_floating_point():
                moved = [*inputs]
                moved[place] = _moved(value)
                found = relative_error(model(*moved), expected)
                assert found > tolerance, (
                    f"Input {place} makes no difference to the result, so that nothing is proven "
                    "about it; give other inputs."
                )


def _moved(value: torch.Tensor) -> torch.Tensor:
    ramp = torch.linspace(1, 2, max(value.numel(), 1), dtype=value.dtype)
    return value + 1e-3 * ramp[: value.numel()].reshape(value.shape)


def _expect_other_dtypes(rule: Rule, example: Example, report: RuleCheck) -> None:
    """In float32 it is as precise as before; in half precision right where it fires."""
    exact = example.model(torch.float64)
    for dtype, room in ((torch.float32, 1e-5), (torch.bfloat16, 0.06)):
        try:
            with torch.no_grad():
                example.model(dtype)(*example.draw(1, dtype))
        except (RuntimeError, NotImplementedError) as error:
            report.notes.append(f"{dtype} does not run without the rule either: {error}")
            continue
        graph, _, model = _applied(rule, example, dtype)
        inputs = example.draw(2, dtype)
        reference = _same_weights(exact, model)
        with torch.no_grad():
            expected = reference(*_wide(list(inputs)))
            before = relative_error(_wide(model(*inputs)), expected)
            after = relative_error(_wide(copy.deepcopy(graph)(*inputs)), expected)
        assert after <= max(4 * before, room), (
            f"{rule.name}: in {dtype} the error grows from {before:.3g} to {after:.3g}"
        )


def _wide(nested: Any) -> Any:
    return pytree.tree_map_only(
        torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, nested
    )


def _same_weights(exact: torch.nn.Module, model: torch.nn.Module) -> torch.nn.Module:
    twin = copy.deepcopy(exact)
    twin.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    return twin


def _expect_users_kept(rule: Rule, example: Example, tolerance: float) -> None:
    """Make every value inside an output, too: those must come out as before."""
    model, inputs = example.model(), example.draw(1)
    graph = capture(model, inputs)
    inside = [n for n in graph.graph.nodes if n.op == "call_function" and _is_float(n)]
    output = graph.output_node
    output.args = ((*output.args[0], *(n for n in inside if n not in output.args[0])),)  # type: ignore
    graph.recompile()
    twin = copy.deepcopy(graph)
    apply_rules(graph, (rule,))
    with torch.no_grad():
        found, expected = graph.run(*inputs), twin.run(*inputs)
    error = relative_error(found, expected)
    assert error <= tolerance, (
        f"{rule.name}: a value inside the match that is used elsewhere changed by {error:.3g}\n"
        f"{graph_text(graph)}"
    )


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def _expect_dynamic(
    rule: Rule, example: Example, tolerance: float, dynamic: bool | None, report: RuleCheck
) -> None:
    """Check another size of the first dimension; it is shared by all inputs that have its size."""
    if dynamic is False:
        return
    inputs = example.draw(1)
    sized = [x for x in inputs if x.dim() and x.shape[0] > 1]
    if not sized:
        report.notes.append("no input has a first dimension to make symbolic")
        return
    size = sized[0].shape[0]
    shapes = tuple({0: "n"} if x.dim() and x.shape[0] == size else {} for x in inputs)
    try:
        graph, rewrites, model = _applied(rule, example, dynamic_shapes={"args": shapes})
    except CaptureError as error:
        assert not dynamic, f"the example cannot be captured with a symbolic size: {error}"
        report.notes.append(f"no symbolic size: {str(error).splitlines()[0]}")
        return
    assert rewrites or not dynamic, f"{rule.name} does not fire with a symbolic first dimension"
    report.dynamic += bool(rewrites)
    larger = [
        torch.cat([x, x[:1]]) if shape else x
        for x, shape in zip(inputs, shapes, strict=True)
    ]
    found = _error(graph, model, larger)
    assert found <= tolerance, (
        f"{rule.name}: with a symbolic size, results differ by {found:.3g}\n{graph_text(graph)}"
    )


# -- every form of a pattern -----------------------------------------------------------------------


def _by_symbol(rule: Rule, inputs: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    if len(inputs) > len(rule.symbols) or any(name not in rule.symbols for name in named):
        raise FxoptError(f"{rule.name} has the symbols {', '.join(rule.symbols)}, and no others.")
    return {**dict(zip(rule.symbols, inputs, strict=False)), **named}


class _Form(Example):
    """One form of a pattern as an example; `bound` is looser where a number lies at its edge."""

    bound: float


def _forms(rule: Rule, values: dict[str, Any], report: RuleCheck) -> Iterator[Example]:
    """Yield an example for each form: the first choices, and then each other choice by itself."""
    for pattern in rule.patterns:
        yield _form(rule, pattern, values, {})
        for one in everything_in(pattern):
            for choice in range(1, _choices(one)):
                yield _form(rule, pattern, values, {id(one): choice})
            if isinstance(one, Near):
                for choice in (1, 2):
                    edge = _form(rule, pattern, values, {id(one): choice})
                    edge.bound = SINGLE
                    yield edge


def _choices(pattern: Any) -> int:
    if isinstance(pattern, AnyOf):
        return len(pattern.choices)
    return 3 if isinstance(pattern, (Repeated, Each)) else 1


def _form(rule: Rule, pattern: Any, values: dict[str, Any], chosen: dict[int, int]) -> _Form:
    missing = [name for name in rule.symbols if name not in values and _needs(pattern, name)]
    if missing:
        raise FxoptError(
            f"check_rule({rule.name}): give '{missing[0]}' a shape, a tensor or a number, or give "
            f"function=. The pattern is {pattern_text(pattern)}."
        )
    present = {name: value for name, value in values.items() if _needs(pattern, name)}
    weights = {k: v for k, v in present.items() if _is_weight(rule, k, v)}
    tensors = {k: v for k, v in present.items() if k not in weights and _is_input(v)}
    plain = {k: v for k, v in present.items() if k not in weights and k not in tensors}

    def function(*args: Any, **parameters: Any) -> Any:
        known = {**plain, **dict(zip(tensors, args, strict=True)), **parameters}
        return _Run(known, chosen).value(pattern)

    form = _Form(function, *tensors.values(), weights=weights)
    if any(chosen.values()):
        form = _used_only(form, tensors, weights, pattern, plain, chosen)
    return form


def _used_only(
    form: _Form, tensors: dict[str, Any], weights: dict[str, Any], pattern: Any,
    plain: dict[str, Any], chosen: dict[int, int],
) -> _Form:  # fmt: skip
    """Return the form without the inputs that only other choices need."""
    given = {k: _drawn(v, torch.float64, 1) for k, v in {**tensors, **weights}.items()}
    run = _Run({**plain, **given}, chosen)
    run.value(pattern)
    used = {k: v for k, v in tensors.items() if k in run.used}
    kept = {k: v for k, v in weights.items() if k in run.used}

    def function(*args: Any, **parameters: Any) -> Any:
        known = {**plain, **dict(zip(used, args, strict=True)), **parameters}
        return _Run(known, chosen).value(pattern)

    return _Form(function, *used.values(), weights=kept)


def _needs(pattern: Any, name: str) -> bool:
    return any(isinstance(p, (Var, Rest)) and p.name == name for p in everything_in(pattern))


def _is_input(value: Any) -> bool:
    """Whether a value is a tensor or the shape of one."""
    shape = isinstance(value, tuple) and all(isinstance(size, int) for size in value)
    return isinstance(value, torch.Tensor) or shape


def _is_weight(rule: Rule, name: str, value: Any) -> bool:
    asked = getattr(rule.conditions.get(name), "__wrapped__", None)
    return isinstance(value, torch.nn.Parameter) or (asked is constant and _is_input(value))


class _Run:
    """Runs one form of a pattern on tensors."""

    def __init__(self, values: Mapping[str, Any], chosen: Mapping[int, int]) -> None:
        self.values, self.chosen = values, chosen
        self.used: set[str] = set()
        self._done: dict[int, Any] = {}

    def value(self, pattern: Any) -> Any:
        """Return the value of a pattern; a call that stands in several places runs once."""
        if isinstance(pattern, (CallPattern, Named)):
            if id(pattern) not in self._done:
                self._done[id(pattern)] = self._computed(pattern)
            return self._done[id(pattern)]
        return self._computed(pattern)

    def _computed(self, pattern: Any) -> Any:
        choice = self.chosen.get(id(pattern), 0)
        if isinstance(pattern, (Var, Rest)):
            return self._symbol(pattern)
        if isinstance(pattern, CallPattern):
            return self._call(pattern)
        if isinstance(pattern, AnyOf):
            return self.value(pattern.choices[choice])
        if isinstance(pattern, Named):
            return self.value(pattern.pattern)
        if isinstance(pattern, Outputs):
            return tuple(map(self.value, pattern.patterns))
        if isinstance(pattern, Near):
            return pattern.value * (1 + (0, 0.99, -0.99)[choice] * pattern.tolerance)
        if isinstance(pattern, Repeated):
            return self._repeated(pattern, pattern.least + (1, 0, 2)[choice])
        if isinstance(pattern, Each):
            return [_Run(self.values, self.chosen)._noted(pattern.item, self) for _ in
                    range(choice + 1)]  # fmt: skip
        if isinstance(pattern, AnyCall):
            return self.values[pattern.symbol.name](*self._args(pattern.args))
        if isinstance(pattern, list):
            return self._items(pattern)
        return pattern

    def _noted(self, pattern: Any, owner: _Run) -> Any:
        value = self.value(pattern)
        owner.used |= self.used
        return value

    def _symbol(self, pattern: Var | Rest) -> Any:
        self.used.add(pattern.name)
        value = self.values[pattern.name]
        return list(value) if isinstance(pattern, Rest) and isinstance(value, tuple) else value

    def _items(self, patterns: list[Any]) -> list[Any]:
        found: list[Any] = []
        for one in patterns:
            if isinstance(one, Rest):
                value = self._symbol(one)
                found.extend(value if isinstance(value, list) else [value])
            elif one is not ANY:
                found.append(self.value(one))
        return found

    def _repeated(self, pattern: Repeated, times: int) -> Any:
        value = self.value(pattern.start)
        for _ in range(times):
            inner = _Run({**self.values, pattern.hole.name: value}, self.chosen)
            value = inner._noted(pattern.part, self)
        return value

    def _args(self, args: Iterable[Any]) -> list[Any]:
        return [self.value(arg) for arg in args if arg is not ANY]

    def _call(self, pattern: CallPattern) -> Any:
        if not isinstance(pattern.target, OpOverload):
            return pattern.target(*self._args(pattern.args))
        schema = pattern.target._schema.arguments
        positional = [a for a in schema if not a.kwarg_only]
        args = [
            self.value(arg) if arg is not ANY else _default(pattern, place)
            for arg, place in zip(pattern.args, positional, strict=False)
        ]
        named = {k: self.value(v) for k, v in pattern.kwargs.items() if v is not ANY}
        return pattern.target(*args, **named)


def _default(pattern: CallPattern, argument: Any) -> Any:
    if not argument.has_default_value():
        raise FxoptError(
            f"check_rule: '{argument.name}' of {pattern.target} is left open in the pattern and "
            "has no default; give function=."
        )
    return argument.default_value


