"""What a picture is of: a graph, and the story of it where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from fxopt.errors import FxoptError, OptionError, unknown_name
from fxopt.graph_module import GraphModule
from fxopt.network import to_networkx
from fxopt.picture.comparison import comparison_picture, kinds_of_change
from fxopt.picture.plain import plain_picture
from fxopt.picture.side import Side
from fxopt.story import Recorder, Snapshot, Step, Story

if TYPE_CHECKING:
    from fxopt.compiled import CompiledModel

    Drawable: TypeAlias = GraphModule | CompiledModel | Story | Snapshot


@dataclass(frozen=True)
class Subject:
    """A graph at one moment, and what it was before."""

    name: str
    snapshot: Snapshot
    story: Story | None = None
    modules: Mapping[str, str] = field(default_factory=dict)  # classes by path

    @classmethod
    def of(cls, what: Drawable) -> Subject:
        """Find the graph and the story of something that can be drawn.

        Raises FxoptError for a loaded model without a graph, OptionError for anything else.
        """
        if isinstance(what, Snapshot):
            return cls("graph", what)
        if isinstance(what, Story):
            return cls(what.model_name, what.final, what)
        graph = what if isinstance(what, GraphModule) else getattr(what, "graph", what)
        if graph is None:
            raise FxoptError("A loaded artefact without a graph cannot be drawn.")
        if not isinstance(graph, GraphModule):
            raise OptionError(
                f"A {type(what).__name__} cannot be drawn. Give a graph (fxopt.capture), a "
                "compiled model (fxopt.compile), a story or a snapshot of one."
            )
        info = graph.info
        return cls(info.model_name, Recorder().snapshot(graph), info.story, info.modules)

    def draw(self, depth: int | str | None, step: str | int | None) -> tuple[str, int]:
        """Return a picture as DOT, and how many boxes it has."""
        if step is None:
            return plain_picture(self.name, self._side(self.snapshot), depth)
        if self.story is None:
            raise FxoptError("This graph has no story yet; fxopt.optimize(...) writes one.")
        title, before, after = moments(self.story, step)
        sides = self._side(before), self._side(after)
        return comparison_picture(self.name, title, sides, kinds_of_change(before, after), depth)

    def _side(self, snapshot: Snapshot) -> Side:
        return Side.of(to_networkx(snapshot), self.modules)


def moments(story: Story, wanted: str | int) -> tuple[str, Snapshot, Snapshot]:
    """Return the words for a step, and the graph before and after it.

    The step is a pass's name (of several the first that changed something), a number from 0 on,
    or "all". Raises OptionError for another.
    """
    if wanted == "all":
        return "all steps", story.captured, story.final
    step = _step(story, wanted)
    count = f"{step.rewrites or 'no'} rewrite{'s' if step.rewrites != 1 else ''}"
    return f"{step.name}: {count}", step.before, step.after


def _step(story: Story, wanted: str | int) -> Step:
    names = [step.name for step in story.steps]
    if isinstance(wanted, int):
        if not -len(names) <= wanted < len(names):
            raise OptionError(
                f"There is no step {wanted}: this story has {len(names)}, numbered from 0."
            )
        return story.steps[wanted]
    alike = [step for step in story.steps if step.name == wanted]
    if not alike:
        raise unknown_name("step", wanted, {*names, "all"})
    return next((step for step in alike if step.rewrites), alike[0])
