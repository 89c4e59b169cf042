"""Check the cost model on real networks, and write the tables of docs/costs.md.

    python tools/costs.py formulas            the table of formulas, from their docstrings
    python tools/costs.py networks [NAME …]   MACs beside FlopCounterMode, memory beside a tracker
    python tools/costs.py zoo [PART]          MACs of every network of the zoo; writes nothing

A network's MACs are compared with half of what torch.utils.flop_counter.FlopCounterMode counts
while the model itself runs, once as it is and once without fused kernels; the peak of its
activations with the storages that are alive while the graph runs.
"""

from __future__ import annotations

import argparse
import gc
import re
import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from zoo_models import Subject, subjects

import fxopt
from fxopt.cost import FORMULAS, Formula
from fxopt.cost.formula import nothing
from fxopt.graph_module import GraphModule
from fxopt.inputs import as_inputs
from fxopt.vision import import_torchvision

PAGE = Path(__file__).parent.parent / "docs" / "costs.md"
NETWORKS = (
    "torchvision/resnet18", "torchvision/resnet50", "torchvision/mobilenet_v2",
    "torchvision/mobilenet_v3_large", "torchvision/efficientnet_b0", "torchvision/densenet121",
    "torchvision/googlenet", "torchvision/shufflenet_v2_x1_0", "torchvision/convnext_tiny",
    "torchvision/regnet_y_400mf", "torchvision/swin_t", "torchvision/swin_v2_t",
    "torchvision/maxvit_t", "torchvision/vit_b_16", "timm/halonet_h1", "timm/volo_d1_224",
    "timm/xcit_nano_12_p8_224", "timm/focalnet_tiny_srf", "timm/sequencer2d_s", "hf/bert_12",
    "hf/gpt2", "hf/llama", "hf/t5_encoder", "hf/whisper_encoder", "hf/wav2vec2", "hf/segformer",
)  # fmt: skip
REMARKS = {
    "torchvision/googlenet": "the auxiliary classifiers, in training only, are not counted",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("formulas", "networks", "zoo"))
    parser.add_argument("names", nargs="*", help="print these networks only, and write nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.what == "formulas":
        write("formulas", formula_table())
        return
    import_torchvision()
    if options.what == "zoo":
        compare_zoo(*options.names)
        return
    rows = []
    for name in options.names or NETWORKS:
        rows.append(network_row(*make(name)))
        print(rows[-1], flush=True)
        gc.collect()
    if not options.names:
        write("networks", network_table(rows))


def write(name: str, table: str) -> None:
    """Put a table between its two marks in the page."""
    text = PAGE.read_text()
    marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    PAGE.write_text(marks.sub(lambda found: f"{found[1]}\n{table}\n{found[2]}", text))


# -- formulas --------------------------------------------------------------------------------------


def formula_table() -> str:
    """Return all formulas as a Markdown table, by the file that they stand in."""
    lines = ["| operators | counted |", "|---|---|"]
    for one in _formulas():
        names = ", ".join(f"`{name}`" for name in _names(one))
        lines.append(f"| {names} | {one.words.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def _formulas() -> Iterator[Formula]:
    """Yield every formula once; those of one function, under other names, follow from it."""
    seen = set()
    for one in FORMULAS.values():
        if one.count not in seen and one.count is not nothing:
            seen.add(one.count)
            yield one


def _names(one: Formula) -> list[str]:
    """Return the names that a user may meet; decompositions of theirs begin with `_`."""
    names = [name for name, other in FORMULAS.items() if other.count is one.count]
    plain = [name for name in names if not name.startswith("_")]
    return plain or names


# -- networks --------------------------------------------------------------------------------------


def make(name: str) -> tuple[str, torch.nn.Module, Any]:
    """Return a network of the zoo, or one of the two that are too large for it."""
    torch.manual_seed(0)
    if name == "torchvision/vit_b_16":
        return name, import_torchvision().models.vit_b_16().eval(), torch.randn(1, 3, 224, 224)
    if name == "hf/bert_12":
        import transformers as hf

        model = hf.BertModel(hf.BertConfig(num_hidden_layers=12)).eval()
        return name, model, torch.randint(0, 1000, (1, 128))
    found = [one for one in subjects(name) if one.name == name]
    if not found:
        raise SystemExit(f"There is no network '{name}'; write it as docs/costs.md does.")
    subject: Subject = found[0]
    model, inputs = subject.make()
    return name, model.eval(), inputs


def network_row(name: str, model: torch.nn.Module, inputs: Any) -> dict[str, Any]:
    """Return our figures for a network, and PyTorch's."""
    profile = fxopt.profile(model, inputs, measure=False)
    return {
        "name": name,
        "params": profile.params,
        "macs": profile.macs,
        "flops": profile.flops,
        "counted": counted_macs(model, inputs, fused=True),
        "unfused": counted_macs(model, inputs, fused=False),
        "peak": profile.peak_activation_bytes,
        "tracked": tracked_peak(fxopt.capture(model, inputs)),
        "notes": profile.notes,
    }


def counted_macs(model: torch.nn.Module, inputs: Any, *, fused: bool) -> int:
    """Return half of FlopCounterMode's count of one call, with or without fused kernels.

    It does not look into fused attention, the transformer's fused layers and oneDNN's LSTM.
    """
    call = as_inputs(inputs)
    model.requires_grad_(False)  # the counter's hooks stumble over gradients that are off
    counter = FlopCounterMode(display=False)
    with ExitStack() as stack:
        if not fused:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        torch.backends.mha.set_fastpath_enabled(fused)
        stack.callback(torch.backends.mha.set_fastpath_enabled, True)
        with counter:
            model(*call.args, **call.kwargs)
    return counter.get_total_flops() // 2


def compare_zoo(part: str = "") -> None:
    """Print whether our MACs are FlopCounterMode's, network by network."""
    equal = every = 0
    for subject in subjects(part):
        model, inputs = subject.make()
        profile = fxopt.profile(model.eval(), inputs, measure=False)
        found = counted_macs(model, inputs, fused=False)
        every, equal = every + 1, equal + (found == profile.macs)
        words = "equal" if found == profile.macs else f"FlopCounterMode / 2: {found:,}"
        print(f"{subject.name:45} {profile.macs:16,} {words} {' '.join(profile.notes)}", flush=True)
        gc.collect()
    print(f"{equal} of {every} are equal")


def tracked_peak(graph: GraphModule) -> int:
    """Return the most bytes of activations that were alive while the graph ran."""
    inputs = [v.clone() if isinstance(v, torch.Tensor) else v for v in graph.info.example_inputs]
    tracker = _Tracker(graph.constants().values(), inputs)
    with torch.no_grad(), tracker:
        graph.run(*inputs)
    return tracker.peak


class _Tracker(TorchDispatchMode):
    """Adds up the storages that operators return, for as long as each is alive."""

    def __init__(self, constants: Any, inputs: Any) -> None:
        super().__init__()
        self._constants = {tensor.untyped_storage()._cdata for tensor in constants}
        self._alive: dict[int, int] = {}
        self.peak = 0
        self._note(inputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._note(result)
        self.peak = max(self.peak, sum(self._alive.values()))
        return result

    def _note(self, values: Any) -> None:
        for tensor in pytree.tree_leaves(values):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._constants and key not in self._alive:
                    self._alive[key] = storage.nbytes()
                    weakref.finalize(storage, self._alive.pop, key, None)


def network_table(rows: list[dict[str, Any]]) -> str:
    """Return all rows as a Markdown table."""
    heads = (
        "network", "parameters", "MACs", "FlopCounterMode / 2", "FLOPs", "peak activations",
        "alive when run", "remarks",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 2) + "---|"]
    lines += [_markdown(row) for row in rows]
    equal = sum(row["macs"] == row["unfused"] for row in rows)
    version = torch.__version__.split("+")[0]
    head = (
        f"With torch {version}, on a CPU: {equal} of {len(rows)} networks have MACs equal to the "
        "last digit.\n"
    )
    return "\n".join([head, *lines])


def _markdown(row: dict[str, Any]) -> str:
    remarks = [REMARKS.get(row["name"], ""), *row["notes"]]
    if row["counted"] != row["unfused"] == row["macs"]:
        remarks.append(f"{row['counted']:,} as it runs: fused kernels are not")
    difference = row["peak"] / row["tracked"] - 1
    same = "equal" if row["peak"] == row["tracked"] else f"{difference:+.1%}"
    return (
        f"| {row['name']} | {row['params']:,} | {row['macs']:,} | {row['unfused']:,} | "
        f"{row['flops']:,} | {row['peak']:,} | {same} | {'; '.join(filter(None, remarks))} |"
    )


if __name__ == "__main__":
    main()
