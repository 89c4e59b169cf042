"""A profile as a table: by module, by node or by kind of operator; for a terminal or a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxopt.cost import Cost
from fxopt.errors import OptionError, unknown_name
from fxopt.profiling.rows import Module, Row, milliseconds, total_of

if TYPE_CHECKING:
    from fxopt.profiling.result import Profile

MOST_ROWS = 40  # what fits a screen: modules are shown as deep as that
_FIGURES = (
    "params", "MACs", "FLOPs", "read", "written", "FLOP/B", "live", "ms"
)  # fmt: skip
COLUMNS = ("params", "macs", "flops", "read", "written", "bytes", "flop/b", "live", "ms")
_UNITS = ("", "k", "M", "G", "T", "P", "E")
_LEFT = {"module", "type", "node", "operator", "output"}
_WORDS = (
    "MACs: multiply-accumulates. FLOPs: 2 per MAC, 1 per any other operation. read, written: bytes "
    "moved. FLOP/B: FLOPs per byte moved. live: bytes of activations, at most. ms: median."
)


@dataclass(frozen=True)
class _Line:
    """One line: its words, and the figures to sort by."""

    words: tuple[str, ...]
    cost: Cost
    live: int
    ms: float | None
    more: tuple[str, ...] = ()  # behind the figures
    children: tuple[_Line, ...] = ()

    def cells(self, timed: bool) -> tuple[str, ...]:
        """Return the line as text."""
        cost = self.cost
        figures = [
            *map(short, (cost.params, cost.macs, cost.flops, cost.read, cost.written)),
            f"{float(cost.intensity):.1f}" if cost.bytes_moved else "", short(self.live),
        ]  # fmt: skip
        times = ["" if self.ms is None else f"{self.ms:.3f}", *self.more] if timed else []
        return (*self.words, *figures, *times)


@dataclass(frozen=True)
class ProfileTable:
    """A table that prints itself, and shows itself in a notebook."""

    title: str
    headings: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    caption: str

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=self.title, title_justify="left", caption=self.caption,
                      caption_justify="left")  # fmt: skip
        for heading in self.headings:
            left = heading in _LEFT
            table.add_column(
                heading, justify="left" if left else "right", no_wrap=not left,
                overflow="fold",
            )  # fmt: skip
        for line in self.lines:
            table.add_row(*line)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=130, no_color=True, highlight=False)
        with console.capture() as captured:
            console.print(self.__rich__(), markup=False)
        return captured.get().rstrip()

    def _repr_html_(self) -> str:
        def cells(tag: str, line: Iterable[str]) -> str:
            return "".join(
                f'<{tag} style="text-align:{"left" if heading in _LEFT else "right"};'
                f'white-space:pre">{html.escape(cell)}</{tag}>'
                for heading, cell in zip(self.headings, line, strict=True)
            )

        body = "".join(f"<tr>{cells('td', line)}</tr>" for line in self.lines)
        caption = html.escape(self.caption).replace("\n", "<br>")
        return (
            f"<table><caption>{html.escape(self.title)}</caption>"
            f"<thead><tr>{cells('th', self.headings)}</tr></thead><tbody>{body}</tbody></table>"
            f"<p>{caption}</p>"
        )


def make_table(
    profile: Profile, by: str, depth: int | None, sort: str | None, symbolic: Profile
) -> ProfileTable:
    """Return the table of a profile without symbols; `symbolic` is the one it was made from."""
    makers = {"module": _by_module, "node": _by_node, "op": _by_op}
    if by not in makers:
        raise unknown_name("kind of table", by, makers)
    if depth is not None and (by != "module" or depth < 0):
        raise OptionError("depth= says how deep a table by module goes: 0 or more.")
    timed = profile.ms is not None
    headings, lines = makers[by](profile, depth)
    columns = [*headings, *_FIGURES[: None if timed else -1]]
    if timed and by == "node":
        columns.append("±")
    ordered = _sorted(lines, sort, timed)
    return ProfileTable(
        _title(profile), tuple(columns), tuple(line.cells(timed) for line in ordered),
        "\n".join([*_totals(profile, symbolic), _WORDS, *profile.notes]),
    )  # fmt: skip


def short(number: float) -> str:
    """Return a number in three digits: 4089184256 → 4.09G."""
    if number < 1000:
        return f"{number:.3g}" if isinstance(number, float) else str(number)
    power = min((len(str(round(number))) - 1) // 3, len(_UNITS) - 1)
    value = float(f"{number / 1000**power:.3g}")
    if value >= 1000 and power < len(_UNITS) - 1:  # 999,999 is 1.00M
        value, power = value / 1000, power + 1
    return f"{value:.{max(3 - len(str(int(value))), 0)}f}{_UNITS[power]}"


def shape_text(shapes: Sequence[Sequence[Any]]) -> str:
    """Return the shapes of what a node returns: `1×64×56×56`; of the first of several."""
    if not shapes:
        return ""
    text = "×".join(map(str, shapes[0])) or "scalar"
    return text if len(shapes) == 1 else f"{text}, …"


def _title(profile: Profile) -> str:
    sizes = ", ".join(f"{name} = {size}" for name, size in profile.sizes.items())
    return f"{profile.name}: what it costs" + (f" at {sizes}" if sizes else "")


def _totals(profile: Profile, symbolic: Profile) -> list[str]:
    cost = profile.cost
    lines = [
        f"{cost.macs:,} MACs, {cost.flops:,} FLOPs, {cost.params:,} parameters, "
        f"{cost.bytes_moved:,} bytes moved, {profile.peak_activation_bytes:,} bytes of activations "
        "at the peak" + (f", {profile.ms:.2f} ms" if profile.ms is not None else "")
    ]
    if symbolic is not profile:
        sizes = ", ".join(f"{name} = {size}" for name, size in symbolic.sizes.items())
        lines[0] = f"at {sizes}: {lines[0]}"
        lines += [f"MACs = {symbolic.macs}", f"FLOPs = {symbolic.flops}"]
    return lines


def _by_module(profile: Profile, depth: int | None) -> tuple[list[str], list[_Line]]:
    root = profile.modules
    if depth is None:
        depths = [module.depth for module in root.walk()]
        fitting = (d for d in range(1, max(depths) + 1) if _count(depths, d) <= MOST_ROWS)
        depth = max(fitting, default=1)
    return ["module", "type", "output"], [_module_line(root, depth, profile.name)]


def _count(depths: Sequence[int], depth: int) -> int:
    return sum(one <= depth for one in depths)


def _module_line(module: Module, depth: int, name: str) -> _Line:
    below = [
        _module_line(child, depth, "  " * child.depth + child.name)
        for child in module.children if child.depth <= depth
    ]  # fmt: skip
    words = (name, module.kind.rpartition(".")[2], shape_text(module.shapes))
    return _Line(words, module.cost, module.live, module.ms, (), tuple(below))


def _by_node(profile: Profile, depth: int | None) -> tuple[list[str], list[_Line]]:
    lines = [
        _Line((row.name, row.op, shape_text(row.shapes)), row.cost, row.live, row.ms, _spread(row))
        for row in profile.rows
    ]
    return ["node", "operator", "output"], lines


def _spread(row: Row) -> tuple[str, ...]:
    return (f"{row.timing.spread:.3f}",) if row.timing is not None else ("",)


def _by_op(profile: Profile, depth: int | None) -> tuple[list[str], list[_Line]]:
    groups: dict[str, list[Row]] = {}
    for row in profile.rows:
        groups.setdefault(row.op, []).append(row)
    lines = [
        _Line(
            (op, str(len(rows))), total_of(rows), max(row.live for row in rows), milliseconds(rows)
        )
        for op, rows in groups.items()
    ]
    return ["operator", "calls"], lines


def _sorted(lines: Sequence[_Line], sort: str | None, timed: bool) -> list[_Line]:
    """Return all lines in order; those of a tree below the one they belong to."""
    if sort is not None:
        known = COLUMNS if timed else COLUMNS[:-1]
        if sort.lower() == COLUMNS[-1] and not timed:
            raise OptionError("There are no milliseconds to sort by: nothing was measured.")
        if sort.lower() not in known:
            raise unknown_name("column", sort, known)
        lines = sorted(lines, key=lambda line: _figure(line, sort.lower()), reverse=True)
    return [one for line in lines for one in (line, *_sorted(line.children, sort, timed))]


def _figure(line: _Line, name: str) -> float:
    cost = line.cost
    figures = {
        "live": line.live, "ms": line.ms or 0.0, "bytes": cost.bytes_moved,
        "flop/b": cost.intensity,
    }  # fmt: skip
    return float(figures[name] if name in figures else getattr(cost, name))
