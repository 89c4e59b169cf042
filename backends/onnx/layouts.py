"""In which of two layouts each call computes: the choice that needs the fewest nodes.

Many calls compute as well on a tensor that is laid out otherwise: tokens (B, N, C) as a matrix
(B·N, C), pictures (N, H, W, C) as (N, C, H, W). Some become cheaper there, and wherever the layout
changes along an edge of the graph, a conversion is needed. A pass describes its calls as `Step`s;
`Layouts.choose` decides which of them move to the other layout, so that

    Σ cost of each call in its layout  +  Σ conversions of each value that is needed otherwise

does not grow, and shrinks for every group of connected calls that moves. It starts with everything
moved, lets calls go back one by one as long as that costs nothing, and puts back the groups that
save nothing. Each call is looked at a few times, so the work is linear in the size of the graph.
"""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

# Costs are compared by nodes written, and where these are equal by nodes left by ONNX Runtime.
WRITTEN, LEFT = 1000, 1
CONVERSION = WRITTEN + LEFT


class Comes(enum.Enum):
    """The layout in which a value comes without a conversion."""

    KEPT = "kept"
    MOVED = "moved"
    EITHER = "either"  # it comes by a reshape, which may as well lead to the other layout


@dataclass(frozen=True)
class Step:
    """A call that may compute in the other layout.

    `inputs` are the values that it reads in its own layout, `outputs` those that it makes.
    `saved` is what moving it saves. A `view` moved does nothing; kept, it reads either layout.
    """

    node: fx.Node
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    saved: int = 0
    view: bool = False


# Calls element by element that do not bear PyTorch's tag for that.
_UNTAGGED = {
    torch.ops.aten.hardswish.default, torch.ops.aten.log_sigmoid.default,
    torch.ops.aten.to.dtype, torch.ops.aten.dropout.default,
}  # fmt: skip


def is_by_element(target: Any) -> bool:
    """Whether an operator computes element by element, after broadcasting."""
    return target in _UNTAGGED or torch.Tag.pointwise in getattr(target, "tags", ())


class Layouts:
    """The choice for one graph.

    `comes` says how values come that no step makes, where it is not KEPT. `reads_any` tells of a
    user that is no step whether it reads a value in either layout, `needs_moved` whether it reads
    it in the other one.
    """

    def __init__(
        self,
        steps: Iterable[Step],
        comes: dict[fx.Node, Comes],
        *,
        reads_any: Callable[[fx.Node], bool],
        needs_moved: Callable[[fx.Node], bool] = lambda user: False,
    ) -> None:
        self.steps = {step.node: step for step in steps}
        self.moved = dict.fromkeys(self.steps, True)
        self._comes = comes
        self._maker = {value: step for step in self.steps.values() for value in step.outputs}
        self._readers: dict[fx.Node, list[Step]] = defaultdict(list)
        for step in self.steps.values():
            for value in dict.fromkeys(step.inputs):
                self._readers[value].append(step)
        parts = {value for step in self.steps.values() for value in step.outputs} - set(self.steps)
        self._needs_kept: Counter[fx.Node] = Counter()
        self._needs_moved: Counter[fx.Node] = Counter()
        for value in {**self._maker, **self._readers}:
            outside = [u for u in value.users if u not in self.steps and u not in parts]
            self._needs_moved[value] = sum(map(needs_moved, outside))
            any_layout = sum(map(reads_any, outside))
            self._needs_kept[value] = len(outside) - any_layout - self._needs_moved[value]
        for step in self.steps.values():
            self._count(step, 1)

    # -- what it costs --------------------------------------------------------------------------

    def comes(self, value: fx.Node) -> Comes:
        """Return the layout in which a value comes."""
        step = self._maker.get(value)
        if step is None:
            return self._comes.get(value, Comes.KEPT)
        if self.moved[step.node]:
            return Comes.MOVED
        return Comes.EITHER if step.view else Comes.KEPT

    def is_needed_kept(self, value: fx.Node) -> bool:
        """Whether somebody reads a value in its own layout."""
        return self._needs_kept[value] > 0

    def is_needed_moved(self, value: fx.Node) -> bool:
        """Whether somebody reads a value in the other layout."""
        return self._needs_moved[value] > 0

    def _conversions(self, value: fx.Node) -> int:
        kept, moved = self._needs_kept[value] > 0, self._needs_moved[value] > 0
        comes = self.comes(value)
        if comes is Comes.EITHER:
            return max(1, kept + moved)
        return int(moved if comes is Comes.KEPT else kept)

    def _count(self, step: Step, sign: int) -> None:
        """Add what a step reads to the needs of these values, or take it away."""
        if step.view and not self.moved[step.node]:
            return
        needs = self._needs_moved if self.moved[step.node] else self._needs_kept
        for value in step.inputs:
            needs[value] += sign

    def _put(self, step: Step, moved: bool) -> int:
        """Let a step compute in a layout; return by how much the costs grow."""
        if self.moved[step.node] == moved:
            return 0
        around = dict.fromkeys((*step.inputs, *step.outputs))
        before = sum(map(self._conversions, around))
        self._count(step, -1)
        self.moved[step.node] = moved
        self._count(step, 1)
        after = sum(map(self._conversions, around))
        return (after - before) * CONVERSION + (-step.saved if moved else step.saved)

    # -- choosing -------------------------------------------------------------------------------

    def choose(self, overhead: Callable[[list[Step]], int] = lambda group: 0) -> list[list[Step]]:
        """Decide, and return the groups of connected steps that move, in the order of the graph.

        `overhead` is what moving a group costs beside its conversions.
        """
        self._put_back_single_steps()
        groups = []
        for group in self._groups():
            grown = sum(self._put(step, False) for step in group)
            if grown > overhead(group):
                for step in group:
                    self._put(step, True)
                groups.append(group)
        return groups

    def _put_back_single_steps(self) -> None:
        # ordered, as a plain dict looks at all that left its front for each next one
        pending = OrderedDict.fromkeys(self.steps.values())
        while pending:
            step, _ = pending.popitem(last=False)
            if not self.moved[step.node]:
                continue
            if self._put(step, False) > 0:
                self._put(step, True)
            else:
                pending.update(dict.fromkeys(self._neighbours(step)))

    def _neighbours(self, step: Step) -> Iterator[Step]:
        """Yield the steps whose costs may have changed with this one's layout."""
        for value in (*step.inputs, *step.outputs):
            if value in self._maker:
                yield self._maker[value]
            readers = self._readers[value]
            if value in step.outputs or self._needs_moved[value] <= 1 or len(readers) <= 8:
                yield from readers

    def _groups(self) -> list[list[Step]]:
        """Return the connected groups of moved steps.

        Connected are steps that read the same value, or a reshape of it.
        """
        groups, grouped, seen = [], set[fx.Node](), set[fx.Node]()
        for first in self.steps.values():
            if first.node in grouped or not self.moved[first.node]:
                continue
            group = [first]
            grouped.add(first.node)
            for step in group:
                values = [*step.inputs, *step.outputs]
                for value in values:
                    if value in seen:
                        continue
                    seen.add(value)
                    values.extend(self._linked(value))
                    for other in (*self._makers(value), *self._readers[value]):
                        if other.node not in grouped and self.moved[other.node]:
                            grouped.add(other.node)
                            group.append(other)
            groups.append(sorted(group, key=lambda one: one.node))
        return groups

    def _linked(self, value: fx.Node) -> Iterator[fx.Node]:
        """Yield the values that a reshape, which may read either layout, makes of this one."""
        yield from (u for u in value.users if u in self._readers and self.comes(u) is Comes.EITHER)
        if self.comes(value) is Comes.EITHER:
            yield value.all_input_nodes[0]

    def _makers(self, value: fx.Node) -> list[Step]:
        return [self._maker[value]] if value in self._maker else []
