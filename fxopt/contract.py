"""What a pass is: the protocol, its effect, its preconditions and its result."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    from fxopt.graph_module import GraphModule


class Effect(enum.Enum):
    """What a pass may do to the function that the graph computes."""

    EXACT = "exact"  # the same function up to rounding
    LOSSY = "lossy"  # another function, asked for by the user


@dataclass(frozen=True)
class Precondition:
    """Something a graph must satisfy before a pass runs; `check` returns why not, or None."""

    name: str
    check: Callable[[GraphModule], str | None]


@dataclass(frozen=True)
class Miss:
    """A place where a pass nearly applied, and the reason why it did not."""

    node: str
    reason: str


@dataclass(frozen=True)
class RuleCount:
    """How often one rule was tried, matched and applied during one run, and in what time."""

    tried: int = 0
    matched: int = 0
    rewritten: int = 0
    seconds: float = 0.0

    def plus(self, other: RuleCount) -> RuleCount:
        """Return the sum of two counts."""
        return RuleCount(
            self.tried + other.tried,
            self.matched + other.matched,
            self.rewritten + other.rewritten,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class PassResult:
    """What one run of a pass did, as its Rewriter recorded it.

    `created` and `erased` are node names, `changed` are nodes whose arguments were replaced in
    place, `origins` maps a created node to the nodes it stands for. `details` is what else the pass
    has to say; printed in the report, it is text.
    """

    rewrites: int = 0
    misses: tuple[Miss, ...] = ()
    created: tuple[str, ...] = ()
    erased: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    origins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rules: Mapping[str, RuleCount] = field(default_factory=dict)
    details: Any = None

    @property
    def modified(self) -> bool:
        """Whether the graph differs from what it was."""
        return bool(self.rewrites or self.created or self.erased or self.changed)

    def plus(self, other: PassResult) -> PassResult:
        """Return the record of this run and of another one, on another part of the graph."""
        counts = dict(self.rules)
        for name, count in other.rules.items():
            counts[name] = counts.get(name, RuleCount()).plus(count)
        return PassResult(
            self.rewrites + other.rewrites,
            self.misses + other.misses,
            self.created + other.created,
            self.erased + other.erased,
            self.changed + other.changed,
            {**self.origins, **other.origins},
            counts,
            other.details if self.details is None else self.details,
        )

    def followed_by(self, second: PassResult) -> PassResult:
        """Return the record of this run and of a second one on the same graph, as if of one.

        What only stood between them is in neither of its ends.
        """
        between = set(self.created)

        def first_ones(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(dict.fromkeys(
                old for name in names for old in self.origins.get(name, (name,))
            ))  # fmt: skip

        origins = {
            name: first_ones(names)
            for name, names in {**self.origins, **second.origins}.items()
            if name not in second.erased
        }
        both = self.plus(second)
        return replace(
            both,
            created=tuple(name for name in both.created if name not in second.erased),
            erased=tuple(name for name in both.erased if name not in between),
            changed=tuple(
                name for name in dict.fromkeys(both.changed) if name not in second.erased
            ),
            origins=origins,
        )


@runtime_checkable
class Pass(Protocol):
    """A graph pass: a frozen dataclass whose fields are its options.

    `run` changes `graph` in place, through one `fxopt.rewrite.Rewriter`, and returns
    `rewriter.result()`. It neither logs, prints, times nor verifies: the pipeline does.
    """

    name: ClassVar[str]
    effect: ClassVar[Effect]
    requires: ClassVar[tuple[Precondition, ...]]

    def run(self, graph: GraphModule) -> PassResult:
        """Rewrite `graph` in place and report what was done."""
        ...
