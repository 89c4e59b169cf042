"""The lines of a profile: one per call of the graph, and the tree of the modules around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import fx

from fxopt.cost import Cost, cost_of, is_counted, parameters_of, peak, total
from fxopt.cost.call import Call
from fxopt.families import family_of
from fxopt.profiling.dimensions import Dimensions
from fxopt.profiling.measure import Timing
from fxopt.text import dtype_text, target_text

Shape = tuple[Any, ...]


@dataclass(frozen=True)
class Row:
    """One call of the graph. Sizes and figures are ints, or sympy expressions where symbolic."""

    name: str
    op: str
    family: str
    path: str  # of the module
    shapes: tuple[Shape, ...]  # of what it returns
    dtype: str
    cost: Cost
    parameters: Mapping[str, Any]  # the elements of each that it uses, by name
    live: Any  # bytes of activations alive while it runs
    counted: bool  # whether a formula is known for the operator
    timing: Timing | None = None

    @property
    def ms(self) -> float | None:
        """The median of the measured milliseconds."""
        return self.timing.median if self.timing is not None else None

    def at(self, evaluated: Callable[[Any], Any], *, timed: bool) -> Row:
        """Return the row with every size and figure evaluated; without its times, if these differ.
        """
        shapes = tuple(tuple(map(evaluated, shape)) for shape in self.shapes)
        return replace(
            self, shapes=shapes, cost=self.cost.map(evaluated), live=evaluated(self.live),
            parameters={name: evaluated(n) for name, n in self.parameters.items()},
            timing=self.timing if timed else None,
        )  # fmt: skip


@dataclass(frozen=True)
class Module:
    """One module of the model, with all that runs inside it; "" is the model itself."""

    path: str
    kind: str  # its class
    depth: int
    rows: tuple[Row, ...]
    children: tuple[Module, ...]

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition(".")[2]

    @cached_property
    def cost(self) -> Cost:
        """The sum over its calls; a parameter that several of them use counts once."""
        return total_of(self.rows)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """What its last call returns."""
        return self.rows[-1].shapes if self.rows else ()

    @property
    def live(self) -> Any:
        """The most bytes of activations alive while one of its calls runs."""
        return peak(row.live for row in self.rows)

    @property
    def ms(self) -> float | None:
        """The sum of the measured milliseconds of its calls."""
        return milliseconds(self.rows)

    def walk(self) -> Iterator[Module]:
        """Yield this module and all below it."""
        yield self
        for child in self.children:
            yield from child.walk()


def total_of(rows: Sequence[Row]) -> Cost:
    """Return the cost of several calls together; shared parameters count once."""
    params = {name: count for row in rows for name, count in row.parameters.items()}
    return replace(total(row.cost for row in rows), params=sum(params.values()))


def milliseconds(rows: Sequence[Row]) -> float | None:
    """Return the measured milliseconds of several calls together, where they were measured."""
    taken = [row.ms for row in rows if row.ms is not None]
    return sum(taken) if taken else None


def row_of(node: fx.Node, live: Any, dimensions: Dimensions, timing: Timing | None) -> Row:
    """Return the row of a call; `live` are the bytes alive while it runs."""
    call = Call(node, symbolic=True)
    outputs = call.outputs
    shapes = (tuple(map(dimensions.named, call.sizes(tensor))) for tensor in outputs)
    return Row(
        name=node.name,
        op=target_text(node.target),
        family=family_of(node),
        path=node.meta.get("path") or "",
        shapes=tuple(shapes),
        dtype=dtype_text(outputs[0].dtype) if outputs else "",
        cost=cost_of(node, symbolic=True).map(dimensions.named),
        parameters=parameters_of(node),
        live=live,
        counted=is_counted(node),
        timing=timing,
    )


def module_tree(path: str, rows: Sequence[Row], kinds: Mapping[str, str], depth: int = 0) -> Module:
    """Return the module at `path` with those below it; `rows` are the calls inside it."""
    inside: dict[str, list[Row]] = {}
    prefix = f"{path}." if path else ""
    for row in rows:
        if row.path != path:
            head = row.path.removeprefix(prefix).partition(".")[0]
            inside.setdefault(prefix + head, []).append(row)
    children = tuple(module_tree(child, below, kinds, depth + 1) for child, below in inside.items())
    return Module(path, kinds.get(path, ""), depth, tuple(rows), children)


def row_json(row: Row) -> dict[str, Any]:
    """Return a row as plain data."""
    return {
        "name": row.name,
        "op": row.op,
        "family": row.family,
        "path": row.path,
        "shape": _shape_json(row.shapes),
        "dtype": row.dtype,
        **figures(row.cost),
        "live": row.live,
        "counted": row.counted,
        "ms": row.ms,
        "spread": row.timing.spread if row.timing is not None else None,
    }


def module_json(module: Module) -> dict[str, Any]:
    """Return a module as plain data."""
    return {
        "path": module.path,
        "type": module.kind,
        "depth": module.depth,
        "nodes": len(module.rows),
        "shape": _shape_json(module.shapes),
        **figures(module.cost),
        "live": module.live,
        "ms": module.ms,
    }


def figures(cost: Cost) -> dict[str, Any]:
    """Return a cost as plain data."""
    return {**vars(cost), "intensity": float(cost.intensity)}


def _shape_json(shapes: tuple[Shape, ...]) -> Any:
    """Return a shape as a list; where there are several, a list of lists."""
    plain_shapes = [list(shape) for shape in shapes]
    return plain_shapes[0] if len(plain_shapes) == 1 else plain_shapes
