"""What the interactive page shows, as plain data: every state of every node, once, and the steps.

A step holds the graph after it as indices into `records`; a node that a step left alone is the same
record before and after. So the page needs no weights, and grows with what changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.cost import cost_of, live_bytes, parameters_of
from fxopt.families import family_of
from fxopt.graph_module import GraphModule
from fxopt.manifest import fxopt_version
from fxopt.report import Report
from fxopt.story import NodeRecord, Recorder, Snapshot, Step, Story
from fxopt.text import dtype_text, target_text, type_text, value_text

if TYPE_CHECKING:
    from fxopt.compiled import CompiledModel
    from fxopt.profile import Profile

VERSION = 1


def page_data(
    graph: GraphModule, compiled: CompiledModel | None = None, profile: Profile | None = None
) -> dict[str, Any]:
    """Return the data of the page for a graph, with its story where it has one.

    `compiled` adds what its backend said, `profile` (of this graph) milliseconds and the roofline.
    """
    story = graph.info.story
    if story is None:
        story = Story(graph.info.model_name, Recorder().snapshot(graph))
    collector = _Collector(graph)
    steps = [_captured(story, collector.indices(story.captured, None))]
    before = steps[0]["records"]
    for step in story.steps:
        after = collector.indices(step.after, step.name)
        steps.append(_step(step, None if after == before else after))
        before = after
    if profile is not None:  # of the final graph, so of no state that a node had before
        for index in before:
            record = collector.records[index]
            record["ms"] = profile.milliseconds_by_node.get(record["name"])
    roofline = None if profile is None else profile.to_json()
    return {
        "version": VERSION,
        "model": story.model_name,
        "tool": f"fxopt {fxopt_version()}",
        "facts": _facts(story, compiled),
        "records": collector.records,
        "modules": dict(graph.info.modules),
        "steps": steps,
        "memory": {"before": _memory(story.captured), "after": _memory(story.final)},
        "roofline": None if roofline is None else _roofline(roofline),
    }


class _Collector:
    """Numbers the states of nodes; equal states are one record."""

    def __init__(self, graph: GraphModule) -> None:
        self.records: list[dict[str, Any]] = []
        self._known: dict[tuple[Any, ...], int] = {}
        self._modules = graph.info.modules

    def indices(self, snapshot: Snapshot, by: str | None) -> list[int]:
        """Return the snapshot's nodes as indices; `by` is the pass that made what is new."""
        return [
            self._index(record, prefix, path, by)
            for prefix, path, record in _drawn(snapshot, "", "")
        ]

    def _index(self, record: NodeRecord, prefix: str, path: str, by: str | None) -> int:
        replaces = tuple(prefix + name for name in record.meta.get("replaces") or ())
        key = (prefix + record.name, record.text, record.meta.get("rule"), replaces, path)
        if key not in self._known:
            self._known[key] = len(self.records)
            self.records.append(self._content(record, prefix, path, replaces, by))
        return self._known[key]

    def _content(
        self,
        record: NodeRecord,
        prefix: str,
        path: str,
        replaces: tuple[str, ...],
        by: str | None,
    ) -> dict[str, Any]:
        value: Any = record.meta.get("val")
        is_tensor = isinstance(value, torch.Tensor)
        cost = cost_of(record)
        return {
            "name": prefix + record.name,
            "kind": _KINDS[record.op],
            "label": target_text(record.target) if record.op == "call_function" else record.name,
            "family": family_of(record),
            "type": "" if record.op == "output" else type_text(value),
            "shape": "×".join(map(str, value.shape)) if is_tensor else None,
            "dtype": dtype_text(value.dtype) if is_tensor else None,
            "text": record.text,
            "arguments": list(_arguments(record)),
            "inputs": [prefix + node.name for node in _inputs(record)],
            "path": path,
            "module": record.meta.get("module") or self._modules.get(path, ""),
            "source": record.meta.get("source") or "",
            "rule": record.meta.get("rule"),
            "replaces": list(replaces),
            "pass": by,
            "macs": cost.macs,
            "flops": cost.flops,
            "params": cost.params,
            "parameters": parameters_of(record),
            "read": cost.read,
            "written": cost.written,
            "ms": None,
        }


_KINDS = {"placeholder": "input", "call_function": "call", "output": "output"}


def _drawn(snapshot: Snapshot, prefix: str, inside: str) -> Iterator[tuple[str, str, NodeRecord]]:
    """Yield what is drawn: all but constants; a sub-graph's nodes stand before the rest.

    Each comes with the prefix of its name and its module path. The nodes of a sub-graph are called
    `body/name`, and their path is that of the call with the sub-graph's name behind it.
    """
    calls = {
        str(argument.target): record.meta.get("path") or ""
        for record in snapshot.records
        for argument in _nodes_of(record)
        if argument.op == "get_attr" and str(argument.target) in snapshot.subgraphs
    }
    for name, body in snapshot.subgraphs.items():
        path = ".".join(part for part in (inside, calls.get(name, ""), name) if part)
        yield from _drawn(body, f"{prefix}{name}/", path)
    for record in snapshot.records:
        if record.op in _KINDS:
            own = record.meta.get("path") or ""
            yield prefix, ".".join(part for part in (inside, own) if part), record


def _nodes_of(record: NodeRecord) -> list[fx.Node]:
    """Return the nodes among the arguments, in order, each once."""
    found: dict[fx.Node, None] = {}
    fx.map_arg((record.args, record.kwargs), lambda node: found.setdefault(node))
    return list(found)


def _inputs(record: NodeRecord) -> list[fx.Node]:
    return [node for node in _nodes_of(record) if node.op != "get_attr"]


def _arguments(record: NodeRecord) -> Iterator[tuple[str, str]]:
    """Yield names and values of the arguments, a constant with its type."""
    names: list[str] = []
    if isinstance(record.target, OpOverload):
        names = [argument.name for argument in record.target._schema.arguments]
    for index, value in enumerate(record.args):
        yield names[index] if index < len(names) else str(index), _argument_text(value)
    for name, value in record.kwargs.items():
        yield name, _argument_text(value)


def _argument_text(value: Any) -> str:
    if isinstance(value, fx.Node) and value.op == "get_attr":
        return f"{value.target}  {type_text(value.meta.get('val'))}"
    return value_text(value)


# -- steps and summaries ---------------------------------------------------------------------------


def _captured(story: Story, records: list[int]) -> dict[str, Any]:
    return {
        "name": "capture",
        "options": {},
        "effect": "exact",
        "seconds": story.capture_seconds,
        "rewrites": 0,
        "skipped": None,
        "counts": vars(story.captured.counts),
        "records": records,
        "origins": {},
        "misses": [],
        "rules": [],
    }


def _step(step: Step, records: list[int] | None) -> dict[str, Any]:
    return {
        "name": step.name,
        "options": {name: repr(value) for name, value in step.options.items()},
        "effect": step.effect.value,
        "seconds": step.seconds,
        "rewrites": step.rewrites,
        "skipped": step.skipped,
        "counts": vars(step.after.counts),
        "records": records,
        "origins": {new: list(old) for new, old in step.origins.items()},
        "misses": [vars(miss) for miss in step.misses],
        "rules": [{"name": name, **vars(count)} for name, count in step.rules.items()],
    }


def _facts(story: Story, compiled: CompiledModel | None) -> list[tuple[str, str]]:
    facts = []
    if story.capture_seconds:
        facts.append(("captured in", f"{story.capture_seconds:.2f} s"))
    if story.steps:
        facts.append(("passes took", f"{story.pass_seconds:.2f} s"))
    if compiled is not None:
        facts.append((f"lowered to {compiled.backend.name} in", f"{compiled.lower_seconds:.2f} s"))
    for check in story.verifications:
        verdict = "" if check.passed else "FAILED: "
        facts.append((
            f"verified: {check.what}",
            f"{verdict}max |Δ| / max |reference| = {check.error:.2g} (bound {check.bound:.2g})",
        ))  # fmt: skip
    if story.steps and not story.verifications:
        facts.append(("verified", "no"))
    if story.regularizers:
        more = len(story.regularizers) - 3
        named = ", ".join(story.regularizers[:3]) + (f" and {more} more" if more > 0 else "")
        facts.append(("absent from this graph in training", named))
    facts += [("note", note) for note in Report(story, compiled).notes]
    return facts


def _memory(snapshot: Snapshot) -> list[tuple[str, int]]:
    records = [record for record in snapshot.records if record.op != "get_attr"]
    return [(r.name, size) for r, size in zip(records, live_bytes(records), strict=True)]


def _roofline(profile: Mapping[str, Any]) -> dict[str, Any] | None:
    machine = profile["machine"]
    if machine is None:
        return None
    return {
        "machine": machine["name"],
        "flops_per_second": machine["flops_per_second"],
        "bytes_per_second": machine["bytes_per_second"],
        "points": [
            {
                "name": node["name"],
                "flops": node["flops"],
                "bytes": node["read"] + node["written"],
                "ms": node["ms"],
            }
            for node in profile["nodes"]
            if node["ms"]
        ],
    }
