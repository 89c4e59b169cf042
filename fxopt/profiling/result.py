"""The result of `fxopt.profile`: totals, rows, modules; tables, plots and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fxopt.cost import Cost
from fxopt.profiling.dimensions import Dimensions, plain
from fxopt.profiling.machine import Machine, measure_machine
from fxopt.profiling.rows import (
    Module,
    Row,
    figures,
    milliseconds,
    module_json,
    module_tree,
    row_json,
    total_of,
)
from fxopt.profiling.table import ProfileTable, make_table


@dataclass(frozen=True, repr=False)
class Profile:
    """What a model costs: totals, `rows` (per node) and `modules` (a tree); printable.

    Totals are ints, or sympy expressions in the names of the dynamic dimensions: `at(batch=8)`
    gives the profile at that size. Tables, pictures and JSON show the sizes in `sizes`, which
    are those of the inputs.
    """

    name: str
    rows: tuple[Row, ...]
    peak_activation_bytes: Any
    dimensions: Dimensions
    kinds: Mapping[str, str]  # the class of each module
    device: torch.device
    dtype: torch.dtype
    notes: tuple[str, ...] = ()

    @cached_property
    def cost(self) -> Cost:
        """All calls together; a parameter that several of them use counts once."""
        return total_of(self.rows)

    @property
    def macs(self) -> Any:
        """Multiply-accumulates: one for each product of a contraction."""
        return self.cost.macs

    @property
    def flops(self) -> Any:
        """Floating-point operations: two per multiply-accumulate, one per any other."""
        return self.cost.flops

    @property
    def params(self) -> Any:
        """Elements of all parameters in use, each once."""
        return self.cost.params

    @property
    def bytes_moved(self) -> Any:
        """Bytes read and written by all calls: the memory access cost."""
        return self.cost.bytes_moved

    @property
    def ms(self) -> float | None:
        """The sum of all calls' median milliseconds; None where nothing was measured."""
        return milliseconds(self.rows)

    @property
    def milliseconds_by_node(self) -> dict[str, float]:
        """The median milliseconds of each call that was measured."""
        return {row.name: row.ms for row in self.rows if row.ms is not None}

    @property
    def sizes(self) -> dict[str, int]:
        """The dynamic dimensions by name, with the sizes that tables and pictures show."""
        return dict(self.dimensions.example)

    @cached_property
    def machine(self) -> Machine:
        """What this machine can do at best; measured when first asked for."""
        return measure_machine(self.device, self.dtype)

    @cached_property
    def modules(self) -> Module:
        """The model as a tree of modules."""
        return module_tree("", self.rows, self.kinds)

    def at(self, sizes: Mapping[str, int] | None = None, /, **named: int) -> Profile:
        """Return the profile with dynamic dimensions at these sizes: `at(batch=8)`.

        A name that is no identifier goes into a dict: `at({"x.shape[0]": 8})`. Milliseconds were
        measured at `sizes`, and go where these differ. Raises OptionError for an unknown name.
        """
        given = {**(sizes or {}), **named}
        values = self.dimensions.values(given)

        def evaluated(size: Any) -> Any:
            return size if isinstance(size, int) else plain(size.xreplace(values))

        same = all(self.sizes[name] == size for name, size in given.items())
        rows = tuple(row.at(evaluated, timed=same) for row in self.rows)
        left = {s: n for s, n in self.dimensions.names.items() if str(n) not in given}
        example = {n: size for n, size in self.sizes.items() if n not in given}
        return replace(
            self, rows=rows, peak_activation_bytes=evaluated(self.peak_activation_bytes),
            dimensions=Dimensions(left, example),
        )  # fmt: skip

    @cached_property
    def shown(self) -> Profile:
        """The profile at the sizes of the inputs: itself where no dimension is dynamic."""
        return self.at(self.sizes) if self.sizes else self

    def table(
        self, by: str = "module", *, depth: int | None = None, sort: str | None = None
    ) -> ProfileTable:
        """Return a table to print: a row for each "module", "node" or "op" (all calls of one kind).

        `depth` is how deep modules are shown, by default as deep as fits a screen. `sort` names a
        column whose largest rows come first, as in "ms". Raises OptionError for unknown names.
        """
        return make_table(self.shown, by, depth, sort, self)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data, at the sizes of the inputs.

        Where nodes were measured, the machine's ceilings are, too.
        """
        shown = self.shown
        symbolic = {"macs": self.macs, "flops": self.flops, "params": self.params,
                    "bytes_moved": self.bytes_moved,
                    "peak_activation_bytes": self.peak_activation_bytes}  # fmt: skip
        totals = {**figures(shown.cost), "bytes_moved": shown.bytes_moved,
                  "peak_activation_bytes": shown.peak_activation_bytes, "ms": self.ms}  # fmt: skip
        return {
            "model": self.name,
            "nodes": [row_json(row) for row in shown.rows],
            "modules": [module_json(module) for module in shown.modules.walk()],
            "totals": totals,
            "sizes": self.sizes,
            "symbolic": {k: str(v) for k, v in symbolic.items()} if self.sizes else {},
            "machine": vars(self.machine) if self.ms is not None else None,
            "notes": list(self.notes),
        }

    def roofline(self, path: str | Path) -> None:
        """Draw bytes against FLOPs, with this machine's ceilings: .svg, .png or .pdf.

        Raises OptionError for a profile that was not measured, BackendUnavailable without
        matplotlib.
        """
        from fxopt.profiling.plots import draw_roofline

        draw_roofline(self.shown, path)

    def memory(self, path: str | Path) -> None:
        """Draw the bytes of activations that are alive while each node runs: .svg, .png or .pdf.

        Raises BackendUnavailable without matplotlib.
        """
        from fxopt.profiling.plots import draw_memory

        draw_memory(self.shown, path)

    def __str__(self) -> str:
        return str(self.table())

    def __repr__(self) -> str:
        return f"<fxopt.Profile of {self.name}: {len(self.rows)} calls>"

    def __rich__(self) -> Any:
        return self.table().__rich__()

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()
