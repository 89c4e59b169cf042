"""The benchmark: how passes scale, what compiling costs beside torch.onnx, and what it gains.

    python tools/bench.py scale               time per node on synthetic graphs of 1k to 100k nodes
    python tools/bench.py compile MODEL …     compile(backend="onnx") beside torch.onnx.export
    python tools/bench.py engines [MODEL …]   ours beside the engines that people use
    python tools/bench.py rules MODEL …       each rule: latency without it and with it
    python tools/bench.py prune [MODEL …]     pruned networks: accuracy, and latency beside MACs
    python tools/bench.py quantize [NETWORK …]  accuracy in integers, beside other quantizers

Models are named as in torchvision.models or timm, or `bert12`, or `bert`: two layers of it.
`engines` has its own list of them, keeps what it measured in --json and goes on there, and writes
docs/engines.md with a plot beside it. `prune` also takes `cifar-resnet56` and `cifar-vgg16`; with
models it measures their latency alone, without them all that docs/pruning-figures.md shows, and
writes it: hours of training, of which `--state` keeps what is done; what is committed there is not
trained again, and with --no-training nothing is. `quantize` keeps what it measured beside
docs/quantization-figures.md, which it writes; latencies are those of `engines --precision int8`.
`--prune` is the same as `prune`, `--quantize` as `quantize`. Times on a
shared machine move by a third: compare the ratios, which come from interleaved rounds of one run.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engine_race import measure_engines
from engines import ENGINES
from pruning_page import STATE as PRUNED
from pruning_page import measure_pruning
from rule_latency import measure_rules
from subjects import subject
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import fxopt
from fxopt.graph_module import GraphInfo, GraphModule
from fxopt.normalize import canonical, node_name
from fxopt.shapes import describe, fake_of, infer

aten = torch.ops.aten


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark that the command line, or `arguments`, asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    verbs = ("scale", "compile", "engines", "rules", "prune", "quantize")
    parser.add_argument("what", choices=verbs)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backends", nargs="+", metavar="BACKEND")
    parser.add_argument("--out", type=Path, help="the page that `engines` and `prune` write")
    engines = parser.add_argument_group("engines")
    engines.add_argument("--engines", nargs="+", metavar="ENGINE", choices=tuple(ENGINES))
    precisions = ("fp32", "bf16", "int8")
    engines.add_argument("--precision", nargs="+", default=["fp32"], choices=precisions)
    engines.add_argument("--batch", type=int, nargs="+", default=[1])
    engines.add_argument("--seconds", type=float, default=4.0, help="of timing, per engine")
    engines.add_argument("--memory", action="store_true", help="peaks, in a process for each")
    engines.add_argument("--json", type=Path, default=Path("engines.json"), help="goes on there")
    parser.add_argument("--state", type=Path, default=PRUNED, help="where `prune` goes on")
    parser.add_argument("--no-training", action="store_true", help="`prune` takes what is there")
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(
        [one[2:] if one in ("--prune", "--quantize") else one for one in given]
    )
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    models = options.models or ["resnet18", "mobilenet_v2"]
    backends = options.backends or ["eager", "torchscript", "onnx"]
    if options.what == "scale":
        scale(options.sizes)
    elif options.what == "compile":
        for name in models:
            compile_beside_torch(name)
    elif options.what == "prune":
        backends = options.backends or ["eager", "onnx"]
        measure_pruning(
            options.models, backends, options.rounds, options.threads, options.state, options.out,
            train=not options.no_training,
        )  # fmt: skip
    elif options.what == "quantize":
        from quantize_accuracy import measure_quantization

        page = options.out or Path("docs/quantization-figures.md")
        measure_quantization(options.models, page.with_suffix("") / "rows.json", page)
    elif options.what == "rules":
        measure_rules(models, backends, options.rounds, options.threads)
    else:
        measure_engines(
            options.models, options.precision, options.batch, options.threads,
            options.engines or [], options.seconds, options.memory,
            options.json, options.out or Path("docs/engines.md"),
        )  # fmt: skip


# -- scale -------------------------------------------------------------------------------------


def scale(sizes: list[int]) -> None:
    """Print microseconds per node for each default pass and the whole pipeline."""
    for kind, build in (("chain", chain), ("dag", dag)):
        print(f"{kind}: microseconds per node")
        per_node: dict[str, list[float]] = {}
        for size in sizes:
            repeats = 5 if size < 20_000 else 2
            times = _pass_times(lambda build=build, size=size: build(size), repeats)
            for name, seconds in times.items():
                per_node.setdefault(name, []).append(seconds / size * 1e6)
        print(f"  {'nodes':22}" + "".join(f"{size:>10,}" for size in sizes) + "    growth")
        for name, values in per_node.items():
            shown = "".join(f"{value:10.2f}" for value in values)
            print(f"  {name:22}{shown}{values[-1] / max(values[0], 1e-9):9.2f}×")


def _pass_times(build: Callable[[], GraphModule], repeats: int) -> dict[str, float]:
    """Return the seconds of each default pass, and of all with their checks and records."""
    best: dict[str, float] = {}
    for _ in range(repeats):
        graph = build()
        gc.collect()
        gc.disable()
        started = time.perf_counter()
        optimized = fxopt.optimize(graph, verify="off")
        whole = time.perf_counter() - started
        gc.enable()
        times = {step.name: step.seconds for step in optimized.story.steps}
        for name, seconds in {
            **times,
            "all passes": sum(times.values()),
            "optimize()": whole,
        }.items():
            best[name] = min(best.get(name, seconds), seconds)
    return best


class _Builder:
    """Builds a legal graph call by call, as capture would."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode()
        self.graph = fx.Graph()
        self.constants: dict[str, torch.Tensor] = {}
        self._values: dict[Any, Any] = {}
        self.x = self.graph.placeholder("x")
        self.x.meta["val"] = fake_of(torch.randn(4, 8), self.mode)

    def constant(self, tensor: torch.Tensor) -> fx.Node:
        name = f"c{len(self.constants)}"
        self.constants[name] = tensor
        node = self.graph.create_node("get_attr", name, name=name)
        node.meta["val"] = fake_of(tensor, self.mode)
        return node

    def call(self, target: Any, *args: Any) -> fx.Node:
        call = canonical(target, args, {}, describe)
        node = self.graph.create_node(
            "call_function", call.target, call.args, call.kwargs, name=node_name(call.target)
        )
        key = (call.target, tuple(a.meta["val"].shape for a in node.all_input_nodes))
        if key not in self._values:
            self._values[key] = infer(*call, self.mode)
        node.meta["val"] = self._values[key]
        return node

    def finish(self, output: fx.Node) -> GraphModule:
        self.graph.output((output,))
        module = GraphModule(torch.nn.Module(), fx.Graph())
        for name, tensor in self.constants.items():
            module.set_constant(name, tensor)
        module.meta["fxopt"] = GraphInfo(
            None, self.mode, (torch.randn(4, 8),), sources=frozenset(self.constants),
            state=frozenset(self.constants),
        )  # fmt: skip
        module.graph = self.graph
        return module


def chain(size: int) -> GraphModule:
    """A chain in which every pass finds work: folds, no-ops, duplicates and dead ends."""
    build = _Builder()
    x = build.x
    weight, bias = torch.nn.Parameter(torch.randn(8, 8) / 3), torch.randn(8)
    made = 0
    while made < size - 12:
        w = build.constant(weight)
        scaled = build.call(aten.mul.Tensor, w, 0.5)  # folds
        x = build.call(aten.linear.default, x, scaled, build.constant(bias))
        x = build.call(aten.relu.default, build.call(aten.relu.default, x))
        x = build.call(aten.dropout.default, x, 0.5, False)
        x = build.call(aten.permute.default, build.call(aten.permute.default, x, [1, 0]), [1, 0])
        x = build.call(aten.add.Tensor, x, build.call(aten.sigmoid.default, x))
        build.call(aten.tanh.default, x)  # dead
        made += 12
    return build.finish(x)


def dag(size: int) -> GraphModule:
    """A graph of random edges: each call takes two earlier ones, some of them far away."""
    build, draw = _Builder(), random.Random(0)
    nodes = [build.x, build.call(aten.relu.default, build.x)]
    binary = (aten.add.Tensor, aten.mul.Tensor, aten.maximum.default)
    unary = (aten.relu.default, aten.sigmoid.default, aten.tanh.default, aten.neg.default)
    while len(nodes) < size:
        if draw.random() < 0.5:
            a = nodes[max(0, len(nodes) - 1 - int(draw.expovariate(0.05)))]
            nodes.append(build.call(draw.choice(binary), nodes[-1], a))
        else:
            nodes.append(build.call(draw.choice(unary), nodes[-1 - draw.randrange(2)]))
    return build.finish(nodes[-1])


# -- compiling and running ---------------------------------------------------------------------


def compile_beside_torch(name: str) -> None:
    """Print the seconds of both compilers, capture included, after one warm-up of each."""
    model, x = subject(name)
    times: dict[str, list[float]] = {"fxopt": [], "torch.onnx": []}
    for attempt in range(3):
        started = time.perf_counter()
        fxopt.compile(model, x, backend="onnx", verify="off")
        middle = time.perf_counter()
        torch.onnx.export(model, (x,), dynamo=True, verbose=False)
        ended = time.perf_counter()
        if attempt:
            times["fxopt"].append(middle - started)
            times["torch.onnx"].append(ended - middle)
    ours, theirs = min(times["fxopt"]), min(times["torch.onnx"])
    print(f"{name:24} fxopt {ours:.2f} s, torch.onnx {theirs:.2f} s, ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
