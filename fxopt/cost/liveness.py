"""Which activations are alive while each node runs, and the bytes they take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

import sympy
from torch._ops import OpOverload

from fxopt.cost.call import Call, Size, largest, tensors_in
from fxopt.cost.control import bodies
from fxopt.cost.memory import bytes_of, bytes_of_node, is_view

Storage = tuple[str, int]  # the node that made it, and which of its results it is
_CONSTANT: Storage = ("", 0)  # stands for memory that is no activation


def live_bytes(nodes: Iterable[Any], *, symbolic: bool = False) -> list[Size]:
    """Return, for each node in the order of the graph, the bytes of activations while it runs.

    Alive are the graph's inputs (their caller holds them throughout), what a later node still needs
    or the graph returns, and the node's own results. A view keeps what it is a view of. Constants
    and the workspace of a kernel are not counted. In a control-flow operator its body's own
    activations are alive, too.
    """
    records = list(nodes)
    values = _Storages(symbolic)
    for position, node in enumerate(records):
        values.visit(node, position)
    change: list[Size] = [0] * (len(records) + 1)
    for storage, size in values.sizes.items():
        change[values.made[storage]] += size
        change[values.needed[storage] + 1 if storage not in values.held else len(records)] -= size
    live = list(accumulate(change[:-1]))
    return [bytes + _inside(node, symbolic) for bytes, node in zip(live, records, strict=True)]


class _Storages:
    """The storages of a graph's activations: their sizes, and from when to when they are needed."""

    def __init__(self, symbolic: bool) -> None:
        self.symbolic = symbolic
        self.sizes: dict[Storage, Size] = {}
        self.made: dict[Storage, int] = {}
        self.needed: dict[Storage, int] = {}
        self.held: set[Storage] = set()
        self._results: dict[str, list[Storage]] = {}  # of each node; a constant has none

    def visit(self, node: Any, position: int) -> None:
        """Take note of what a node makes and uses; nodes come in graph order."""
        call = Call(node, symbolic=self.symbolic)
        for used in call.inputs:
            for storage in self._results.get(used.name, ()):
                self.needed[storage] = position
                if node.op == "output":
                    self.held.add(storage)
        if node.op in ("placeholder", "call_function"):
            self._results[node.name] = self._made_by(call, position)

    def _made_by(self, call: Call, position: int) -> list[Storage]:
        node = call.node
        if node.op == "call_function" and _shares(call):
            source = self._results.get(call.inputs[0].name, []) if call.inputs else []
            if call.name == "getitem":
                index = node.args[1]
                return source[index : index + 1] if isinstance(index, int) else source
            if isinstance(node.args[0], (list, tuple)):  # each result is a view of one operand
                owners = [self._results.get(one.name, []) for one in node.args[0]]
                return [owner[0] if owner else _CONSTANT for owner in owners]
            return source[:1] * len(call.outputs)
        made: list[Storage] = []
        for index, tensor in enumerate(tensors_in(node.meta.get("val"))):
            storage = (node.name, index)
            self.sizes[storage] = bytes_of(call, tensor)
            self.made[storage] = self.needed[storage] = position
            if node.op == "placeholder":
                self.held.add(storage)
            made.append(storage)
        return made


def _shares(call: Call) -> bool:
    """Whether a call returns memory of its first argument: a view of it, or what it wrote to."""
    writes = isinstance(call.target, OpOverload) and call.target._schema.is_mutable
    return writes or is_view(call)


def _inside(node: Any, symbolic: bool) -> Size:
    """Return the bytes that the bodies of a control-flow operator need beside its results."""
    if node.op != "call_function":
        return 0
    call = Call(node, symbolic=symbolic)
    needed: Size = 0
    for body in bodies(call):
        inputs = sum(bytes_of_node(call, placeholder) for placeholder in body.placeholders)
        needed = largest(needed, peak(live_bytes(body.graph.nodes, symbolic=symbolic)) - inputs)
    if needed == 0 or call.name not in ("cond", "while_loop"):
        return needed  # a body's results are slices of what a map or scan returns
    return largest(needed - sum(bytes_of(call, tensor) for tensor in call.outputs), 0)


def peak(live: Iterable[Size]) -> Size:
    """Return the largest of several sizes.

    Of expressions, those are left out that another one exceeds term by term wherever all symbols
    are at least 1; between the others the symbols' values decide, and the result is a maximum.
    """
    known = list(dict.fromkeys(live))
    if all(isinstance(size, int) for size in known):
        return max(known, default=0)
    terms = [_terms(sympy.sympify(size)) for size in known]
    kept: list[int] = []
    for index, mine in enumerate(terms):
        if not any(_exceeds(terms[other], mine) for other in kept):
            kept = [other for other in kept if not _exceeds(mine, terms[other])] + [index]
    if len(kept) == 1:
        return known[kept[0]]
    return sympy.Max(*(known[index] for index in kept), evaluate=False)


def _terms(size: sympy.Expr) -> Mapping[Any, Any]:
    """Return a size as a sum, in symbols that begin at 0: its terms with their factors."""
    above_one = {symbol: symbol + 1 for symbol in size.free_symbols}
    terms: Mapping[Any, Any] = sympy.expand(size.xreplace(above_one)).as_coefficients_dict()
    return terms


def _exceeds(a: Mapping[Any, Any], b: Mapping[Any, Any]) -> bool:
    """Whether sum a is at least sum b whatever their terms are, none of which is negative."""
    return all(a.get(term, 0) >= b.get(term, 0) for term in {*a, *b})
