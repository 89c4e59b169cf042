"""`bench.py engines`: every engine on every model, by turns, and the page that shows it.

For each model, precision and batch all engines are built, compared with the model in float32, and
timed in turns (`fxopt.comparison.race`), so that a busy machine slows all alike. A ratio is the
median of those of neighbouring turns. Results are written as they come, as JSON, so that a run that
is stopped goes on; Markdown and a plot are made from that.
"""

from __future__ import annotations

import gc
import json
import math
import platform
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from engines import ENGINES, NotOffered, Task, built, first_output, peak_memory
from rich.console import Console
from subjects import subject

from fxopt.comparison.race import Ratio, race
from fxopt.files import atomic_path
from fxopt.profiling.machine import processor

MODELS = (
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0",
    "convnext_tiny", "densenet121", "shufflenet_v2_x1_0", "swin_t", "vit_b_16", "bert12",
)  # fmt: skip
SMALL = {"mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "shufflenet_v2_x1_0"}
INTEGERS = ("fxopt eager", "fxopt onnx", "fxopt openvino")
QUANTIZERS = ("ONNX Runtime, quantize_static", "OpenVINO, NNCF", "Inductor, torchao PT2E")
OURS, BASE = "fxopt eager", "eager"
PEERS = (
    "eager", "eager, channels last", "torch.jit", "Inductor", "torch.onnx in ONNX Runtime",
    "OpenVINO",
)  # fmt: skip


@dataclass
class Case:
    """One model in one precision, batch and number of threads."""

    model: str
    precision: str
    batch: int
    threads: int
    rows: dict[str, Row] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What tells this case from others."""
        return f"{self.model}, {self.precision}, batch {self.batch}, {self.threads} threads"


@dataclass
class Row:
    """What was measured of one engine: milliseconds, seconds, MiB."""

    median: float
    low: float  # quartiles
    high: float
    faster: float  # times as fast as the model as it is
    error: float  # max |Δ| / max |reference|
    build: float
    memory: float | None = None


def measure_engines(
    models: list[str], precisions: list[str], batches: list[int], threads: int, engines: list[str],
    seconds: float, with_memory: bool, state: Path, out: Path,
) -> None:  # fmt: skip
    """Measure what is not in `state` yet, and write the page."""
    console = Console()
    cases = _read(state)
    for name in models or MODELS:
        for precision in precisions:
            for batch in batches:
                case = Case(name, precision, batch, threads)
                if case.title in cases:
                    continue
                _measure(case, engines or list(ENGINES), seconds, with_memory)
                cases[case.title] = case
                with atomic_path(state) as temporary:
                    text = json.dumps([asdict(one) for one in cases.values()], indent=1)
                    temporary.write_text(text)
                console.print(f"[bold]{case.title}[/bold]", highlight=False)
                console.print("\n".join(_table(case)), highlight=False)
    shown = list(cases.values())
    with atomic_path(out) as temporary:
        temporary.write_text(page(shown, out.with_suffix(".png").name))
    _plot(shown, out.with_suffix(".png"))
    console.print(f"{out} and {out.with_suffix('.png')} written")


def _measure(case: Case, engines: list[str], seconds: float, with_memory: bool) -> None:
    """Build all engines, compare what they compute, and time them by turns."""
    torch.set_num_threads(case.threads)
    model, x = subject(case.model)
    x = x.repeat(case.batch, *[1] * (x.dim() - 1))
    task = Task(model, x, case.precision, case.threads)
    with torch.no_grad():
        expected = first_output(model(x))
    calls, builds, errors = {}, {}, {}
    for name in engines:
        try:
            calls[name], builds[name] = built(name, task)
            with torch.no_grad():
                found = first_output(calls[name]())
        except NotOffered as why:
            case.failures[name] = str(why)
            continue
        except Exception as error:  # whatever an engine raises is its result
            case.failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            calls.pop(name, None)
            continue
        scale = max(float(expected.abs().max()), 1e-12)
        errors[name] = float((found - expected).abs().max()) / scale
    with torch.no_grad():
        outcome = race(calls, seconds=seconds * len(calls))
    case.failures.update(outcome.failures)
    base = outcome.latencies.get(BASE)
    for name, latency in outcome.latencies.items():
        low, high = latency.quartiles
        faster = Ratio.of(latency, base).median if base is not None else math.nan
        case.rows[name] = Row(latency.median, low, high, faster, errors[name], builds[name])
    del calls
    gc.collect()
    torch._dynamo.reset()
    if with_memory:
        for name, row in case.rows.items():
            row.memory = peak_memory(
                case.model, name, case.precision, case.batch, case.threads
            )


def _read(state: Path) -> dict[str, Case]:
    if not state.exists():
        return {}
    cases = {}
    for entry in json.loads(state.read_text()):
        rows = {name: Row(**row) for name, row in entry.pop("rows").items()}
        case = Case(**entry, rows=rows)
        cases[case.title] = case
    return cases


# -- the page -----------------------------------------------------------------------------------


def page(cases: list[Case], plot: str) -> str:
    """Return Markdown: what was asked of ours, and a table for each case."""
    lines = [
        "# Engines",
        "",
        "Written by `python tools/bench.py engines`. Times are medians of calls in interleaved",
        "rounds; ± is half the distance of the quartiles; ratios are of neighbouring rounds. Build",
        "is from the model to the first result. Error is max |Δ| / max |reference| against the",
        "model in float32.",
        "",
        f"{processor()}, {platform.system()}, torch {torch.__version__}.",
        "",
        f"![latencies relative to the fastest]({plot})",
        "",
        *_summary([case for case in cases if case.precision != "int8"]),
        *_summary_of_integers([case for case in cases if case.precision == "int8"]),
    ]
    for case in cases:
        lines += ["", f"## {case.title}", "", *_table(case)]
        lines += [f"\n{name}: {why}" for name, why in case.failures.items()]
    return "\n".join(lines) + "\n"


def _summary(cases: list[Case]) -> list[str]:
    """Return the table of ours beside the best peers, and geometric means."""
    header = ("model", "fxopt eager", "Inductor", "best of ONNX Runtime, OpenVINO", "ratio",
              "fxopt auto", "best peer", "our ONNX : torch's ONNX")  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    ratios: dict[str, list[float]] = {"eager": [], "inductor": [], "auto": [], "onnx": []}
    for case in cases:
        time = {name: row.median for name, row in case.rows.items()}
        if OURS not in time:
            continue
        engines = [time[n] for n in PEERS[-2:] if n in time]
        peers = [time[n] for n in PEERS if n in time]
        best = min(engines, default=math.nan)
        auto, onnx = time.get("fxopt auto", math.nan), time.get("fxopt onnx", math.nan)
        torch_onnx = time.get("torch.onnx in ONNX Runtime", math.nan)
        induced = time.get("Inductor", math.nan)
        figures = (
            time[OURS], induced, best, time[OURS] / best, auto, min(peers, default=math.nan),
            onnx / torch_onnx,
        )  # fmt: skip
        cells = (case.title, *("–" if math.isnan(one) else f"{one:.2f}" for one in figures))
        lines.append("| " + " | ".join(cells) + " |")
        ratios["eager"].append(time[OURS] / best)
        ratios["inductor"].append(time[OURS] / induced)
        ratios["auto"].append(auto / min(peers, default=math.nan))
        ratios["onnx"].append(onnx / torch_onnx)
    words = {
        "eager": "fxopt eager : the best of ONNX Runtime and OpenVINO",
        "inductor": "fxopt eager : Inductor",
        "auto": "fxopt auto : the best peer",
        "onnx": "our ONNX : torch's ONNX, both in ONNX Runtime",
    }
    lines.append("")
    for key, text in words.items():
        known = [ratio for ratio in ratios[key] if math.isfinite(ratio)]
        if known:
            mean = statistics.geometric_mean(known)
            lines.append(f"- {text}: {mean:.2f} in the geometric mean, {max(known):.2f} at worst.")
    return lines


def _summary_of_integers(cases: list[Case]) -> list[str]:
    """Return the table of ours beside the best of those that quantize."""
    if not cases:
        return []
    header = ("model", *INTEGERS, "the best of others that quantize", "our best : theirs")
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    ratios = []
    for case in cases:
        time = {name: row.median for name, row in case.rows.items()}
        ours = [time.get(name, math.nan) for name in INTEGERS]
        others = [time[name] for name in QUANTIZERS if name in time]
        best = min(others, default=math.nan)
        ratios.append(min(one for one in ours if not math.isnan(one)) / best)
        figures = (*ours, best, ratios[-1])
        cells = (case.title, *("–" if math.isnan(one) else f"{one:.2f}" for one in figures))
        lines.append("| " + " | ".join(cells) + " |")
    mean = statistics.geometric_mean(ratios)
    return [*lines, "", f"{mean:.2f} in the geometric mean, {max(ratios):.2f} at worst."]


def _table(case: Case) -> list[str]:
    header = ("engine", "ms", "±", "times as fast as eager", "error", "build, s", "memory, MiB")
    lines = ["| " + " | ".join(header) + " |", "|---" + "|--:" * (len(header) - 1) + "|"]
    for name, row in sorted(case.rows.items(), key=lambda item: item[1].median):
        memory = "" if row.memory is None else f"{row.memory:.0f}"
        cells = (name, f"{row.median:.2f}", f"{(row.high - row.low) / 2:.2f}",
                 f"{row.faster:.2f}", f"{row.error:.1e}", f"{row.build:.1f}", memory)  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _plot(cases: list[Case], file: Path) -> None:
    """Draw each engine's time over the fastest one's, model by model."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for case in cases for name in case.rows))
    figure = Figure(figsize=(max(8, 1.1 * len(cases)), 5), layout="constrained")
    axes = figure.subplots()
    for name in names:
        places: list[int] = []
        heights: list[float] = []
        for place, case in enumerate(cases):
            if name in case.rows:
                places.append(place)
                heights.append(case.rows[name].median / min(r.median for r in case.rows.values()))
        ours: dict[str, Any] = {"s": 70, "marker": "D"} if name.startswith("fxopt") else {"s": 30}
        axes.scatter(places, heights, label=name, **ours)
    axes.set_xticks(range(len(cases)), [case.title for case in cases], rotation=40, ha="right")
    axes.set_ylabel("time over the fastest engine's")
    axes.set_yscale("log")
    axes.grid(axis="y", which="both", alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(file, dpi=110)
