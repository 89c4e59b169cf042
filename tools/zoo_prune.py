"""Prune the zoo: half the channels of every network, and what came of it; see tools/zoo.py --prune.

A network is a success when the pass raises nothing, its own proof holds (the original with those
channels zeroed wherever they are read computes the same), the pruned graph runs forward and
backward, its outputs have the shapes they had, and at least 25 % of the MACs are gone, or the rest
is frozen for reasons that the table names.
"""

from __future__ import annotations

import gc
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from zoo_models import Subject, randomize, subjects

import fxopt
from fxopt.inputs import as_inputs
from fxopt.passes import PruneChannels
from fxopt.pruning.record import PruningRecord
from fxopt.vision import import_torchvision

ENOUGH = 0.25
PASS = PruneChannels(ratio=0.5, round_to=8)


def prune_all(only: str, state: Path, again: bool, out: Path | None) -> None:
    """Prune every network whose name contains `only`; finished rows are kept in `state`."""
    import_torchvision()  # timm and transformers import it, too
    rows: dict[str, Any] = json.loads(state.read_text()) if state.exists() and not again else {}
    for subject in subjects(only):
        if subject.name not in rows:
            try:
                rows[subject.name] = prune(subject)
            except Exception as error:
                rows[subject.name] = {"error": f"{type(error).__name__}: {error}"[:300]}
            state.write_text(json.dumps(rows, indent=1))
        print(line(subject.name, rows[subject.name]), flush=True)
        gc.collect()
    print(summary(rows))
    if out is not None:
        out.write_text(markdown(rows))


def prune(subject: Subject) -> dict[str, Any]:
    """Return the row of one network."""
    model, inputs = subject.make()
    randomize(model)
    graph = fxopt.capture(model, inputs)
    call = as_inputs(inputs)
    with torch.no_grad():
        shapes = _shapes(graph(*call.args, **call.kwargs))
    started = time.perf_counter()
    record = PASS.run(graph).details
    seconds = time.perf_counter() - started
    if not isinstance(record, PruningRecord):
        raise RuntimeError("nothing was pruned")
    outputs = graph(*call.args, **call.kwargs)
    floats = [one for one in _tensors(outputs) if one.requires_grad]
    sum(one.float().square().mean() for one in floats).backward()  # type: ignore[union-attr]
    learnt = [p.grad is not None and bool(p.grad.isfinite().all()) for p in graph.parameters()]
    return {
        "seconds": seconds,
        "macs": record.macs,
        "parameters": record.parameters,
        "channels": record.channels,
        "error": None,
        "oracle": record.error,
        "bound": record.bound,
        "same_shapes": _shapes(outputs) == shapes,
        "gradients": sum(learnt) / len(learnt),
        "frozen": Counter(one.reason.text for one in record.frozen).most_common(4),
    }


def _tensors(value: Any) -> list[torch.Tensor]:
    return [one for one in pytree.tree_leaves(value) if isinstance(one, torch.Tensor)]


def _shapes(value: Any) -> list[tuple[int, ...]]:
    return [tuple(one.shape) for one in _tensors(value)]


def _saved(row: dict[str, Any]) -> float:
    before, after = row["macs"]
    return float(1 - after / before)


def is_right(row: dict[str, Any]) -> bool:
    """Whether the pruned network is what it must be, however much was saved."""
    return (
        not row["error"]
        and row["oracle"] <= row["bound"]
        and row["same_shapes"]
        and row["gradients"] > 0
        and row["parameters"][1] < row["parameters"][0]
    )


def is_held(row: dict[str, Any]) -> bool:
    """Whether nothing of a network may go, for reasons that are given."""
    return not row["error"] and row["channels"][0] == 0 and bool(row["frozen"])


def line(name: str, row: dict[str, Any]) -> str:
    """Return a row as text."""
    if row["error"]:
        return f"{name:40} FAILED {row['error'][:120]}"
    word = "ok    " if is_right(row) else "frozen" if is_held(row) else "WRONG "
    before, after = row["parameters"]
    text = (
        f"{name:40} {word} MACs −{_saved(row):.0%}  parameters −{1 - after / before:.0%}  "
        f"error {row['oracle']:.1e}  {row['seconds']:.1f} s"
    )
    if _saved(row) < ENOUGH:
        text += f"  the rest is frozen: {row['frozen'][0][0]}"
    return text


def summary(rows: dict[str, Any]) -> str:
    """Return the counts."""
    done = [row for row in rows.values() if not row["error"]]
    right = [row for row in done if is_right(row)]
    enough = [row for row in right if _saved(row) >= ENOUGH]
    held = [row for row in done if is_held(row)]
    slowest = max((row["seconds"] for row in done), default=0.0)
    return (
        f"{len(right)} of {len(rows)} pruned and proven, {len(enough)} of them with at least "
        f"{ENOUGH:.0%} fewer MACs; {len(held)} where nothing may go; {len(rows) - len(done)} "
        f"failed. What is frozen, and why, is named. The slowest pass took {slowest:.1f} s"
    )


def markdown(rows: dict[str, Any]) -> str:
    """Return the table as a page."""
    lines = [
        "# Pruning half the channels of the zoo",
        "",
        "`python tools/zoo.py --prune` writes this page. Every network, with random weights and",
        "batch-norm statistics, is pruned by `PruneChannels(ratio=0.5, round_to=8)` and nothing",
        "else is told about it. The error is that of the pass's own proof, max |Δ| / max",
        "|reference|. `gradients`: the share of parameters that one backward pass reaches.",
        "Seconds are those of the pass, its proof included, capture apart.",
        "",
        f"**{summary(rows)}.**",
        "",
        "| network | MACs before | after | less | parameters before | after | error | gradients "
        "| s | frozen, mostly |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if row["error"]:
            lines.append(f"| {name} | failed: {row['error']} | | | | | | | | |")
            continue
        (m, n), (p, q) = row["macs"], row["parameters"]
        why = row["frozen"][0][0] if row["frozen"] else ""
        lines.append(
            f"| {name} | {m:,} | {n:,} | {_saved(row):.0%} | {p:,} | {q:,} | {row['oracle']:.1e} "
            f"| {row['gradients']:.0%} | {row['seconds']:.1f} | {why} |"
        )
    return "\n".join(lines) + "\n"
