"""What pruning costs in accuracy, on real networks and real images, beside Torch-Pruning.

    python tools/prune_accuracy.py resnet56 vgg16 [--cpu-minutes 60] [--by fxopt peer] [--state DIR]

Each network is pruned to the same MACs, by `fxopt.prune` and by Torch-Pruning's L2 magnitude, and
both are fine-tuned by the same call, for the same processor time: 60 minutes of it are 30 minutes
on two cores. Channels are scored on the 5,000 images that no training saw, and the same decide
which epoch's weights are kept; the test set is only reported. A run keeps a checkpoint, so that
one that is stopped goes on; finished rows stand in `rows.json`.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import cifar
import torch
import torch.nn.functional as F

import fxopt
from fxopt.cost import macs
from fxopt.pruning.importance import Taylor

LESS = {"resnet56": 2.13, "vgg16": 4.0}  # how many times fewer MACs
TRAINING: dict[str, Any] = {"lr": 0.05, "schedule": "cosine", "channels_last": True}
BATCH = 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("networks", nargs="*", help=f"some of {', '.join(LESS)}; else all")
    parser.add_argument("--by", nargs="+", default=["fxopt", "peer"], choices=["fxopt", "peer"])
    parser.add_argument("--cpu-minutes", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--state", type=Path, default=Path("accuracy"))
    options = parser.parse_args()
    unknown = sorted(set(options.networks) - set(LESS))
    if unknown:
        parser.error(f"unknown networks {', '.join(unknown)}: there are {', '.join(LESS)}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    options.state.mkdir(exist_ok=True)
    for name in options.networks or LESS:
        for who in options.by:
            run(name, who, options.cpu_minutes, options.state)


def run(name: str, who: str, cpu_minutes: float, state: Path) -> None:
    """Prune, fine-tune and measure one network; skip what is finished."""
    key = f"{name} by {who}, {cpu_minutes:g} CPU minutes"
    file = state / "rows.json"
    rows: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if key in rows:
        print(key, json.dumps(rows[key]), flush=True)
        return
    model = getattr(cifar, name)().eval()
    clean, test, train = cifar.clean_set(), cifar.test_set(), cifar.training_set()
    pruned = prune_by_fxopt(model, name) if who == "fxopt" else prune_by_peer(model, name)
    row: dict[str, Any] = {
        "macs": [count(model), count(pruned)],
        "parameters": [sum(p.numel() for p in one.parameters()) for one in (model, pruned)],
        "test_before": cifar.accuracy(model, test),
        "test_pruned": cifar.accuracy(pruned, test),
    }
    print(key, json.dumps(row), flush=True)
    started = time.time()
    tuned = fxopt.finetune(
        pruned,
        train.training_batches(BATCH),
        loss=F.cross_entropy,
        cpu_minutes=cpu_minutes,
        evaluate=lambda one: cifar.accuracy(one, clean),
        checkpoint=state / f"{name}-{who}-{cpu_minutes:g}.ckpt",
        **TRAINING,
    )
    row["clean_tuned"] = cifar.accuracy(tuned.model, clean)
    row["test_tuned"] = cifar.accuracy(tuned.model, test)
    row["loss_in_points"] = row["test_before"] - row["test_tuned"]
    row["epochs"] = len(tuned.history)
    row["minutes"] = (time.time() - started) / 60
    rows = json.loads(file.read_text()) if file.exists() else {}
    rows[key] = row
    file.write_text(json.dumps(rows, indent=1))
    print(key, json.dumps(row), flush=True)


def prune_by_fxopt(model: torch.nn.Module, name: str) -> fxopt.GraphModule:
    """Prune by first-order Taylor scores over the whole network, on images no training saw."""
    graph = fxopt.capture(model, torch.zeros(2, 3, 32, 32), dynamic_shapes={"x": {0: "batch"}})
    data = list(cifar.clean_set().batches(250))
    return fxopt.prune(
        graph, ratio=1 - 1 / LESS[name], of="macs", scope="global", max_ratio=0.8,
        importance=Taylor(data=data, loss=F.cross_entropy),
    )  # fmt: skip


def prune_by_peer(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """Prune by Torch-Pruning's L2 magnitude, at the ratio that leaves as many MACs."""
    import torch_pruning as tp

    def at(ratio: float) -> torch.nn.Module:
        twin = getattr(cifar, name)().eval()
        last = [layer for layer in twin.modules() if isinstance(layer, torch.nn.Linear)][-1]
        tp.pruner.MagnitudePruner(
            twin, torch.zeros(2, 3, 32, 32), tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=ratio, ignored_layers=[last],
        ).step()  # fmt: skip
        return twin

    low, high = 0.0, 0.9
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if count(at(middle)) > count(model) / LESS[name] else (low, middle)
        )
    return at(high)


def count(model: torch.nn.Module) -> int:
    """Return the multiply-accumulates of one image."""
    graph = model
    if not isinstance(model, fxopt.GraphModule):
        graph = fxopt.capture(model, torch.zeros(1, 3, 32, 32))
    assert isinstance(graph, fxopt.GraphModule)
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    batch = int(graph.info.example_inputs[0].shape[0])
    return sum(map(macs, calls)) // batch


if __name__ == "__main__":
    main()
