"""Symbolic sizes inside a rule: what may be asked of them, and how they become nodes of the graph.

A symbolic size has a number while the graph is built, that of the example. PyTorch answers a
question about it with that number and writes down a guard: from then on the graph is right for such
sizes only. So a question that has no one answer for all sizes raises `SizeAsked` here, and the rule
holds back.
"""

from __future__ import annotations

import contextlib
import contextvars
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import fx

from fxopt.dynamic import is_about_small_sizes
from fxopt.shapes import is_tensor

aten = torch.ops.aten

_RELATIONS = {sympy.Eq: "==", sympy.Ne: "!=", sympy.Lt: "<", sympy.Le: "<=", sympy.Gt: ">",
              sympy.Ge: ">="}  # fmt: skip


class SizeAsked(Exception):
    """A question about a size that has no one answer for every size; the text says which."""

    def __init__(self, question: Any, names: Mapping[str, str]) -> None:
        known = {s: sympy.Symbol(names.get(str(s), str(s))) for s in question.free_symbols}
        text = _text(question.xreplace(known))
        what = f"whether {text}" if _is_yes_or_no(question) else f"for the number {text}"
        super().__init__(f"it asks {what}, which depends on the size of an input")


def _is_yes_or_no(question: Any) -> bool:
    kinds = (sympy.core.relational.Relational, sympy.logic.boolalg.BooleanFunction)
    return isinstance(question, kinds)


def _text(question: Any) -> str:
    sign = _RELATIONS.get(type(question))
    if sign is None:
        return str(question)
    left, right = question.args
    return f"{left} {sign} {right}"


def environment_at(value: Any) -> Any:
    """Return the environment of the symbolic sizes where a node's value has any; None without."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    fake = value.meta.get("val") if isinstance(value, fx.Node) else None
    first = fake[0] if isinstance(fake, (list, tuple)) and fake else fake
    return environment_of(getattr(first, "fake_mode", None))


def environment_of(mode: Any) -> Any:
    """Return the environment of symbolic sizes of a fake mode; None where there are none."""
    env = getattr(mode, "shape_env", None)
    return env if env is not None and env.var_to_range else None


def names_of_sizes(node: Any) -> Mapping[str, str]:
    """Return the names that the graph of a node has for its symbolic sizes."""
    if isinstance(node, (list, tuple)):
        return names_of_sizes(node[0])
    meta = getattr(node.graph.owning_module, "meta", {})
    return getattr(meta.get("fxopt"), "dimensions", {})


@contextlib.contextmanager
def undecided(env: Any, names: Mapping[str, str] | None = None) -> Iterator[None]:
    """Raise SizeAsked for a question that not all sizes answer alike; None: there are no symbols.

    Nothing is written down in the environment meanwhile. PyTorch has no hook for this, so two
    methods of its ShapeEnv are shadowed by attributes of this one object: `evaluate_expr`, which
    answers by the example, and `guard_or_defer_runtime_assert`, by which `torch._check` asks.
    """
    if env is None or "evaluate_expr" in vars(env):
        yield
        return

    def known(question: Any) -> Any:
        return env._maybe_evaluate_static(question)

    def evaluate(
        question: Any, hint: Any = None, fx_node: Any = None, size_oblivious: bool = False,
        fallback_value: bool | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        answer = question if question.is_number or question.is_Atom and question in _SURE else None
        answer = known(question) if answer is None else answer
        if answer is not None:
            return answer
        if fallback_value is not None:
            return sympy.sympify(fallback_value)
        if _operators_ask.get():
            example = env._maybe_evaluate_static(question, compute_hint=True)
            holds = sympy.Not(question) if example == sympy.false else question
            if example is not None and _is_yes_or_no(question) and is_about_small_sizes(holds):
                return example
        raise SizeAsked(question, names or {})

    def assert_(question: Any, *arguments: Any, **options: Any) -> bool:
        return bool(evaluate(question))

    env.evaluate_expr, env.guard_or_defer_runtime_assert = evaluate, assert_
    try:
        yield
    finally:
        del env.evaluate_expr, env.guard_or_defer_runtime_assert


_SURE = (sympy.true, sympy.false)
_operators_ask: contextvars.ContextVar[bool] = contextvars.ContextVar("asks", default=False)


@contextlib.contextmanager
def operators_ask() -> Iterator[None]:
    """Let PyTorch's own shape functions tell 0 and 1 from larger sizes by the example.

    An operator looks at the sizes again when it runs.
    """
    token = _operators_ask.set(True)
    try:
        yield
    finally:
        _operators_ask.reset(token)


# -- sizes as nodes --------------------------------------------------------------------------------

Insert = Callable[..., fx.Node]

_ARITHMETIC: dict[str, Callable[..., Any]] = {  # by the name of sympy's class
    "Add": operator.add, "Mul": operator.mul, "Max": torch.sym_max, "Min": torch.sym_min,
    "FloorDiv": operator.floordiv, "CleanDiv": operator.floordiv, "Mod": operator.mod,
    "PythonMod": operator.mod, "Pow": operator.pow,
}  # fmt: skip


def node_of_size(
    size: Any, around: Iterable[fx.Node], before: fx.Node, insert: Insert
) -> fx.Node | int:
    """Return a node in front of `before` that computes a symbolic size.

    `around` are tensors that may have it. A node that is there already is used again. Raises
    SizeAsked for a size that none of them has, and that is no arithmetic on those they have.
    """
    sources = [n for n in dict.fromkeys(around) if is_tensor(n) and n < before]

    def node(wanted: Any) -> fx.Node | int:
        if wanted.is_Integer:
            return int(wanted)
        having = [
            (source, axis) for source in sources
            for axis, have in enumerate(source.meta["val"].shape)
            if not isinstance(have, int) and have.node.expr == wanted
        ]  # fmt: skip
        for source, axis in having:
            asked = _known(source, (aten.sym_size.int, (source, axis)), before)
            if asked is not None:
                return asked
        if having:
            return insert(aten.sym_size.int, *having[0])
        function = _ARITHMETIC.get(type(wanted).__name__)
        if function is None or not all(part.is_integer for part in wanted.args):
            raise SizeAsked(wanted, {})
        first, *others = map(node, wanted.args)
        for other in others:
            call = (function, (first, other))
            first = _known(first, call, before) or _known(other, call, before) or insert(
                function, first, other
            )
        return first

    return node(size.node.expr)


def _known(argument: Any, call: tuple[Any, Any], before: fx.Node) -> fx.Node | None:
    """Return the node in front of another that makes a call already."""
    users = argument.users if isinstance(argument, fx.Node) else ()
    return next((u for u in users if (u.target, u.args) == call and u < before), None)
