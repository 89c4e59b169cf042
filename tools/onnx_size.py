"""Count the ONNX nodes that fxopt writes, beside those of torch.onnx, onnxsim and onnxslim.

    python tools/onnx_size.py [NAME …] [--state onnx_size.json] [--again ours|all] [--out FILE]

Names are those of tools/zoo.py, or parts of them; without any, the fifteen models of the first
table, and whatever the state file holds. Each file is counted as it was written, and after ONNX
Runtime's extended optimisation. The peers start from `torch.onnx.export(dynamo=True,
optimize=True)`, constants folded by onnxscript. Batch-norm statistics and constant parameters are
randomized, so that no peer folds what only a fresh network allows. A row is written to the state
file as soon as it is there, so that a stopped run goes on where it was. The peers come with
`pip install 'fxopt[size]'`.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from zoo_models import Subject, randomize, subjects

import fxopt
from fxopt.inputs import as_inputs
from fxopt.testing import relative_error
from fxopt.vision import import_torchvision

FIRST = (
    "torchvision/resnet18", "torchvision/resnet50", "torchvision/mobilenet_v2",
    "torchvision/mobilenet_v3_large", "torchvision/efficientnet_b0", "torchvision/densenet121",
    "torchvision/convnext_tiny", "torchvision/swin_t", "torchvision/vit_b_16",
    "torchvision/maxvit_t", "torchvision/shufflenet_v2_x1_0", "torchvision/inception_v3",
    "timm/levit_128s", "timm/repvgg_a0", "hf/bert_base_2_layers",
)  # fmt: skip
PEERS = ("torch.onnx", "onnxsim", "onnxslim")

# Why ours has more nodes, by network.
REASONS: dict[str, str] = {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="networks of the zoo, or parts of their names")
    parser.add_argument("--state", type=Path, default=Path("onnx_size.json"), help="finished rows")
    parser.add_argument("--again", choices=("ours", "all"), help="measure these again")
    parser.add_argument("--out", type=Path, help="write the tables of all finished rows")
    parser.add_argument("--ops", action="store_true", help="print where the counts differ")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import_torchvision()  # timm and transformers import it, too
    rows: dict[str, Any] = {}
    if options.state.exists():
        rows = json.loads(options.state.read_text())
    for subject in chosen(options.names or list(dict.fromkeys((*FIRST, *rows)))):
        row = {} if options.again == "all" else dict(rows.get(subject.name, {}))
        if options.again == "ours":
            row.pop("ours", None)
        measure(row, subject)
        rows[subject.name] = row
        options.state.write_text(json.dumps(rows, indent=1))
        print(line(subject.name, row), flush=True)
        if options.ops:
            print(difference_text(row), flush=True)
        gc.collect()
    if options.out:
        options.out.write_text(markdown(rows))


# -- networks --------------------------------------------------------------------------------------


def chosen(names: list[str]) -> Iterator[Subject]:
    """Yield the networks that the command line names."""
    known = {one.name: one for one in (*subjects(), *_others())}
    for name in names:
        exact = [known[name]] if name in known else []
        yield from exact or [one for one in known.values() if name in one.name]


def _others() -> Iterator[Subject]:
    yield Subject("timm/repvgg_a0", _repvgg)
    yield Subject("hf/bert_base_2_layers", _bert)
    yield Subject("torchvision/vit_b_16", _vit)


def _repvgg() -> tuple[torch.nn.Module, Any]:
    import timm

    torch.manual_seed(0)
    return timm.create_model("repvgg_a0"), torch.randn(1, 3, 224, 224)


def _vit() -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    model = import_torchvision().models.get_model("vit_b_16", weights=None)
    return model, torch.randn(1, 3, 224, 224)


def _bert() -> tuple[torch.nn.Module, Any]:
    import transformers

    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=2))
    return model, torch.randint(0, 1000, (1, 128))


# -- measuring -------------------------------------------------------------------------------------


def measure(row: dict[str, Any], subject: Subject) -> None:
    """Add what a row does not have yet; what fails says so in its place."""
    missing = [name for name in ("ours", *PEERS) if name not in row]
    if not missing:
        return
    model, inputs = subject.make()
    randomize(model)
    if "ours" in missing:
        row["ours"] = _attempt(lambda: _ours(model, inputs))
    if missing != ["ours"]:
        exported = _attempt(lambda: {"model": _exported(model, inputs)})
        for name in PEERS:
            row[name] = (
                exported if "error" in exported
                else _attempt(lambda name=name: _peer(name, exported["model"]))
            )  # fmt: skip


def _attempt(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return action()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def _ours(model: torch.nn.Module, inputs: Any) -> dict[str, Any]:
    call = as_inputs(inputs)
    compiled = fxopt.compile(model, inputs, backend="onnx", verify="off")
    with torch.no_grad():
        expected = model(*call.args, **call.kwargs)
    counts = _counts(compiled.executable.model_proto())
    counts["numbers"] = relative_error(compiled(*call.args, **call.kwargs), expected)
    return counts


def _exported(model: torch.nn.Module, inputs: Any) -> onnx.ModelProto:
    import onnxscript.optimizer

    call = as_inputs(inputs)
    program = torch.onnx.export(
        model, call.args, kwargs=call.kwargs, dynamo=True, optimize=True, verbose=False
    )
    assert program is not None
    onnxscript.optimizer.optimize(program.model)
    return program.model_proto


def _peer(name: str, exported: onnx.ModelProto) -> dict[str, Any]:
    if name == "onnxsim":
        import onnxsim

        exported, _ = onnxsim.simplify(exported)
    elif name == "onnxslim":
        import onnxslim

        exported = onnxslim.slim(exported)
    return _counts(exported)


def _counts(model: onnx.ModelProto) -> dict[str, Any]:
    """Count the nodes of a model by type, as it is and after ONNX Runtime's optimisation."""
    started = time.perf_counter()
    optimized = _optimized(model)
    return {
        "plain": dict(_op_types(model.graph).most_common()),
        "extended": dict(_op_types(optimized.graph).most_common()),
        "seconds": round(time.perf_counter() - started, 2),
    }


def _op_types(graph: onnx.GraphProto) -> Counter[str]:
    counts: Counter[str] = Counter()
    for node in graph.node:
        counts[node.op_type] += 1
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                counts += _op_types(inner)
    return counts


def _optimized(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model as ONNX Runtime's extended optimisation leaves it."""
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    settings.log_severity_level = 4
    settings.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        settings.optimized_model_filepath = f"{folder}/optimized.onnx"
        onnxruntime.InferenceSession(
            model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
        )
        return onnx.load(settings.optimized_model_filepath, load_external_data=False)


# -- telling ---------------------------------------------------------------------------------------


def total(row: dict[str, Any], who: str, kind: str) -> int | None:
    """Return how many nodes somebody's model has; None where there is none."""
    counts = row.get(who, {}).get(kind)
    return None if counts is None else sum(counts.values())


def best(row: dict[str, Any], kind: str) -> int | None:
    """Return the smallest count of the peers."""
    known = [n for n in (total(row, name, kind) for name in PEERS) if n is not None]
    return min(known, default=None)


def is_smallest(row: dict[str, Any]) -> bool:
    """Whether ours has no more nodes than the best peer, in both counts."""
    pairs = [(total(row, "ours", kind), best(row, kind)) for kind in ("plain", "extended")]
    return all(ours is not None and (peer is None or ours <= peer) for ours, peer in pairs)


def _pair(row: dict[str, Any], who: str) -> str:
    found = [total(row, who, kind) for kind in ("plain", "extended")]
    return "fails" if None in found else "{} / {}".format(*found)


def line(name: str, row: dict[str, Any]) -> str:
    """Return one row as text."""
    shown = "  ".join(f"{who} {_pair(row, who)}" for who in ("ours", *PEERS))
    numbers = row["ours"].get("numbers")
    end = row["ours"].get("error") or f"error {numbers:.0e}"
    return f"{name:38} {'ok  ' if is_smallest(row) else 'MORE'} {shown}  {end}"


def difference_text(row: dict[str, Any]) -> str:
    """Return the types of node of which ours has another number than the smallest peer."""
    lines = []
    for kind in ("plain", "extended"):
        known = [name for name in PEERS if total(row, name, kind) is not None]
        if not known or total(row, "ours", kind) is None:
            continue
        peer = min(known, key=lambda name: total(row, name, kind) or 0)
        ours, theirs = (Counter(row[who][kind]) for who in ("ours", peer))
        gaps = {op: (ours[op], theirs[op]) for op in (ours | theirs) if ours[op] != theirs[op]}
        shown = (f"{op} {a}:{b}" for op, (a, b) in sorted(gaps.items(), key=_gap, reverse=True))
        lines.append(f"    {kind}, ours:{peer}  {', '.join(shown)}")
    return "\n".join(lines)


def _gap(item: tuple[str, tuple[int, int]]) -> int:
    return item[1][0] - item[1][1]


HEAD = """# The size of the ONNX models

Written by `python tools/onnx_size.py`. Nodes as written / after ONNX Runtime's extended
optimisation. The peers start from `torch.onnx.export(dynamo=True, optimize=True)` with its
constants folded; batch-norm statistics and constant parameters are randomized. *error*: max |Δ| /
max |reference| of ours against eager.
"""


def markdown(rows: dict[str, Any]) -> str:
    """Return all rows as a Markdown page: the fifteen models, then the rest."""
    first = {name: rows[name] for name in FIRST if name in rows}
    rest = {name: row for name, row in rows.items() if name not in FIRST}
    text = f"{HEAD}\n{_table(first)}"
    if rest:
        text += f"\n## More of the zoo\n\n{_summary(rest)}\n\n{_table(rest)}"
    more = [name for name, row in rows.items() if not is_smallest(row)]
    if more:
        text += "\n## Where ours has more\n\n"
        text += "".join(f"- {name}: {REASONS.get(name, 'not known yet')}\n" for name in more)
    return text


def _summary(rows: dict[str, Any]) -> str:
    beside = [row for row in rows.values() if best(row, "plain") is not None]
    smallest = sum(map(is_smallest, beside))
    return (
        f"{smallest} of {len(beside)} have no more nodes than the best peer, in both counts; "
        f"{len(rows) - len(beside)} more no peer can export."
    )


def _table(rows: dict[str, Any]) -> str:
    lines = [
        f"| network | fxopt | {' | '.join(PEERS)} | error |\n", "|---" * (len(PEERS) + 3) + "|\n"
    ]  # fmt: skip
    for name, row in rows.items():
        shown = f"**{_pair(row, 'ours')}**" if is_smallest(row) else _pair(row, "ours")
        peers = " | ".join(_pair(row, peer) for peer in PEERS)
        error = row["ours"].get("numbers")
        end = "" if error is None else f"{error:.0e}"
        lines.append(f"| {name} | {shown} | {peers} | {end} |\n")
    return "".join(lines)


if __name__ == "__main__":
    main()
