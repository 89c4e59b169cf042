"""Run the zoo: capture, optimize and lower real networks, and compare each with eager.

    python tools/zoo.py [--only PART] [--onnx] [--peer] [--out docs/zoo.md] [--state zoo.json]
    python tools/zoo.py --prune [--only PART] [--out docs/pruning-zoo.md] [--state prune.json]

Every network has its batch-norm statistics and constant parameters randomized first. A row is
written to the state file as soon as it is there, so that a stopped run goes on where it was.
The error is max |Δ| / max |reference| over all outputs; it passes at 1e-5, or at 20 times the
network's own error in float32 against float64.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from zoo_models import Subject, randomize, subjects
from zoo_prune import prune_all

import fxopt
from fxopt.inputs import as_inputs
from fxopt.testing import relative_error
from fxopt.verify import own_error
from fxopt.vision import import_torchvision

FOLDABLE = ("batch_norm",)
LIMIT = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="run networks whose name contains this")
    parser.add_argument("--onnx", action="store_true", help="lower to ONNX too, and run it")
    parser.add_argument("--peer", action="store_true", help="time torch.onnx.export beside ours")
    parser.add_argument("--prune", action="store_true", help="prune half the channels instead")
    parser.add_argument("--out", type=Path, help="write the table as Markdown")
    parser.add_argument("--state", type=Path, default=Path("zoo.json"), help="finished rows")
    parser.add_argument("--again", action="store_true", help="ignore finished rows")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.prune:
        prune_all(options.only, options.state, options.again, options.out)
        return
    import_torchvision()  # timm and transformers import it, too
    rows: dict[str, Any] = {}
    if options.state.exists() and not options.again:
        rows = json.loads(options.state.read_text())
    for subject in subjects(options.only):
        if subject.name not in rows:
            rows[subject.name] = run(subject, options.onnx, options.peer)
            options.state.write_text(json.dumps(rows, indent=1))
        print(line(subject.name, rows[subject.name]), flush=True)
        gc.collect()
    print(summary(rows))
    if options.out:
        options.out.write_text(markdown(rows))


def run(subject: Subject, onnx: bool, peer: bool) -> dict[str, Any]:
    """Return the row of one network; what fails is in its 'error' or 'onnx_error'."""
    row: dict[str, Any] = {}
    try:
        model, inputs = subject.make()
        randomize(model)
        _optimize(row, model, inputs)
    except Exception as error:
        row["error"] = _words(error)
        return row
    if onnx:
        try:
            _onnx(row, model, inputs)
        except Exception as error:
            row["onnx_error"] = _words(error)
    if peer:
        try:
            _peer(row, model, inputs)
        except Exception as error:
            row["torch_onnx_error"] = _words(error)
    return row


def _optimize(row: dict[str, Any], model: torch.nn.Module, inputs: Any) -> None:
    row["parameters"] = sum(p.numel() for p in model.parameters())
    call = as_inputs(inputs)
    with torch.no_grad():
        expected = model(*call.args, **call.kwargs)
    compiled = fxopt.compile(model, inputs, verify="off")
    story = compiled.story
    row["capture_s"], row["passes_s"] = story.capture_seconds, story.pass_seconds
    row["captured"], row["final"] = story.captured.counts.nodes, story.final.counts.nodes
    row["batch_norms"] = _count(story.captured, "batch_norm")
    row["batch_norms_left"] = _count(story.final, "batch_norm")
    row["error_eager"] = relative_error(compiled(*call.args, **call.kwargs), expected)
    row["bound"] = _bound(model, inputs, row["error_eager"])
    row["pass_ms"] = {step.name: round(step.seconds * 1e3, 2) for step in story.steps}


def _bound(model: torch.nn.Module, inputs: Any, error: float) -> float:
    """1e-5, or 20 times the network's own float32 error, measured only where it is needed."""
    if error <= LIMIT:
        return LIMIT
    graph = fxopt.capture(model, inputs)
    with torch.no_grad():
        expected = graph.run(*graph.info.example_inputs)
    return max(LIMIT, 20 * own_error(graph, graph.info.example_inputs, expected))


def _onnx(row: dict[str, Any], model: torch.nn.Module, inputs: Any) -> None:
    call = as_inputs(inputs)
    with torch.no_grad():
        expected = model(*call.args, **call.kwargs)
    started = time.perf_counter()
    compiled = fxopt.compile(model, inputs, backend="onnx", verify="off")
    row["onnx_compile_s"] = time.perf_counter() - started
    row["onnx_lower_s"] = compiled.lower_seconds
    started = time.perf_counter()
    found = compiled(*call.args, **call.kwargs)
    row["onnx_first_run_s"] = time.perf_counter() - started
    row["error_onnx"] = relative_error(found, expected)
    row["bound_onnx"] = _bound(model, inputs, row["error_onnx"])
    row["onnx_nodes"] = sum(compiled.executable.op_counts().values())
    row["onnx_notes"] = list(compiled.executable.notes)


def _peer(row: dict[str, Any], model: torch.nn.Module, inputs: Any) -> None:
    call = as_inputs(inputs)
    started = time.perf_counter()
    torch.onnx.export(model, call.args, kwargs=call.kwargs, dynamo=True, verbose=False)
    row["torch_onnx_s"] = time.perf_counter() - started


def _count(snapshot: Any, word: str) -> int:
    return sum(1 for r in snapshot.records if r.op == "call_function" and word in str(r.target))


def _words(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
    return f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:300]}"


def passed(row: dict[str, Any], kind: str = "eager") -> bool:
    """Whether a row's error is within its bound."""
    bound = row.get("bound" if kind == "eager" else "bound_onnx", 0.0)
    return f"error_{kind}" in row and row[f"error_{kind}"] <= bound


def line(name: str, row: dict[str, Any]) -> str:
    """Return one row as text."""
    if "error" in row:
        return f"{name:45} FAILED {row['error']}"
    text = (
        f"{name:45} {row['captured']:5} → {row['final']:4}  bn {row['batch_norms']:3} → "
        f"{row['batch_norms_left']:2}  err {row['error_eager']:.1e} "
        f"{'ok' if passed(row) else 'WRONG'}  capture {row['capture_s']:.2f} s, passes "
        f"{row['passes_s'] * 1e3:4.0f} ms"
    )
    if "error_onnx" in row:
        text += (
            f"  onnx {row['onnx_nodes']} nodes err {row['error_onnx']:.1e} "
            f"{'ok' if passed(row, 'onnx') else 'WRONG'} {row['onnx_compile_s']:.2f} s"
        )
    if "torch_onnx_s" in row:
        text += f" (torch.onnx {row['torch_onnx_s']:.2f} s)"
    if "onnx_error" in row:
        text += f"  onnx REFUSED {row['onnx_error']}"
    return text


def within_budget(row: dict[str, Any]) -> bool:
    """Whether the passes cost at most 25 % of the capture plus 1 s per 100 M parameters."""
    return bool(row["passes_s"] <= 0.25 * row["capture_s"] + row["parameters"] / 1e8)


def summary(rows: dict[str, Any]) -> str:
    """Return the counts that matter."""
    whole = [row for row in rows.values() if "error" not in row]
    onnx = [row for row in whole if "error_onnx" in row or "onnx_error" in row]
    lines = [
        f"{len(rows)} networks; captured and optimized {len(whole)}; equal to eager "
        f"{sum(map(passed, whole))}; batch norms left {sum(r['batch_norms_left'] for r in whole)} "
        f"of {sum(r['batch_norms'] for r in whole)}; passes within budget "
        f"{sum(map(within_budget, whole))}"
    ]
    if onnx:
        lines.append(
            f"onnx: {len(onnx)} tried, {sum(passed(r, 'onnx') for r in onnx)} equal to eager, "
            f"{sum('onnx_error' in r for r in onnx)} refused, "
            f"{sum(bool(r.get('onnx_notes')) for r in onnx)} with notes"
        )
        ratios = sorted(
            r["onnx_compile_s"] / r["torch_onnx_s"] for r in onnx if "torch_onnx_s" in r
        )
        if ratios:
            lines.append(
                f"compile(backend='onnx') / torch.onnx.export(dynamo=True): median "
                f"{ratios[len(ratios) // 2]:.2f}, worst {ratios[-1]:.2f}, "
                f"{sum(r <= 0.5 for r in ratios)} of {len(ratios)} at most one half"
            )
    return "\n".join(lines)


HEAD = """# The zoo

Written by `python tools/zoo.py --onnx --peer --out docs/zoo.md`. Batch-norm statistics and constant
parameters are randomized. *nodes*: operator calls captured → optimized. *bn*: batch norms captured
→ left. *error*: max |Δ| / max |reference| against eager. *passes*: all passes beside the capture.
*compile*: `fxopt.compile(backend="onnx")`, capture included, without verification and session,
beside `torch.onnx.export(dynamo=True)` of the same model in the same run.

Batch norms that are left have no layer beside them to take them in: they follow a concatenation
(densenet, dpn), an activation (convmixer, xcit), a sum (xception, resnetv2) or a pool (halonet);
what follows is an activation, or a convolution that pads with zeros, which have no shift. Each
report names the near-misses.
"""
COLUMNS = (
    "network", "nodes", "bn", "error eager", "passes / capture", "onnx nodes", "error onnx",
    "compile s / torch.onnx s", "remarks",
)  # fmt: skip


def markdown(rows: dict[str, Any]) -> str:
    """Return all rows as a Markdown page."""
    version = torch.__version__.split("+")[0]
    table = [f"| {' | '.join(COLUMNS)} |\n", "|---" * len(COLUMNS) + "|\n"]
    table += [_markdown_row(name, row) for name, row in rows.items()]
    return f"{HEAD}\nWith torch {version}: {summary(rows)}\n\n{''.join(table)}"


def _markdown_row(name: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {name} | | | | | | | | {row['error']} |\n"
    onnx = [f"{row['onnx_nodes']}", f"{row['error_onnx']:.0e}"] if "error_onnx" in row else ["", ""]
    times = f"{row['onnx_compile_s']:.2f}" if "onnx_compile_s" in row else ""
    times += f" / {row['torch_onnx_s']:.2f}" if "torch_onnx_s" in row else ""
    times += " / torch.onnx fails" if "torch_onnx_error" in row else ""
    remarks = "; ".join(filter(None, [row.get("onnx_error", ""), *row.get("onnx_notes", [])]))
    return (
        f"| {name} | {row['captured']} → {row['final']} | {row['batch_norms']} → "
        f"{row['batch_norms_left']} | {row['error_eager']:.0e} | {row['passes_s'] * 1e3:.0f} ms / "
        f"{row['capture_s'] * 1e3:.0f} ms | {' | '.join(onnx)} | {times} | {remarks} |\n"
    )


if __name__ == "__main__":
    main()
