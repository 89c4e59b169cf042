"""What pruning costs in accuracy, on real networks and real images, beside Torch-Pruning.

    python tools/prune_accuracy.py resnet56 vgg16 [--cpu-minutes 60] [--by fxopt peer] [--state DIR]

Each network is pruned to the same MACs, by fxopt and by Torch-Pruning's L2 magnitude, and both are
fine-tuned by the same call, with the network before pruning as the teacher, for the same
processor time: 60 minutes of it are 30 minutes on two cores. What scoring, reconstruction and the
teacher take counts, too. The teacher is asked once about a few shifted and flipped views of each
image, as to ask about each batch afresh takes more than it gives. ResNet-56 is shown these very
views (Beyer et al.: Knowledge distillation: a good teacher is patient and consistent, CVPR 2022,
section 3.1); VGG-16, which would learn them by heart, new ones, with the mean of what is said.

Training and teacher compute in bfloat16 where the processor has instructions for it, which
`--precision` overrules; weights, their sums and all accuracies are float32.

Channels are scored on the 5,000 images that no training saw, and the same decide which epoch's
weights are kept; the test set is only reported. A run keeps a checkpoint, so that one that is
stopped goes on; finished rows stand in `rows.json`.

Dropout is off: it was for networks several times as wide (Han et al.: Learning both Weights and
Connections, NIPS 2015, section 3.2).
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import cifar
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import fxopt
from fxopt.cost import macs
from fxopt.files import atomic_path
from fxopt.finetuning.distillation import distillation_loss
from fxopt.passes.remove_residual_blocks import RemoveResidualBlocks
from fxopt.profiling.machine import processor
from fxopt.pruning.importance import Taylor

LESS = {"resnet56": 2.13, "vgg16": 4.0}  # how many times fewer MACs
BLOCKS_LESS = {"resnet56": 9}  # residual blocks that go as a whole, before channels do
# VGG-16 has its wide layers where they cost little: chosen over the whole network, they go first
PRUNING: dict[str, dict[str, Any]] = {
    "resnet56": {"of": "macs", "scope": "global", "max_ratio": 0.8},
    "vgg16": {"of": "macs", "scope": "layer", "round_to": 8},
}
TRAINING: dict[str, dict[str, Any]] = {
    "resnet56": {"lr": 0.02},
    "vgg16": {"lr": 0.002},  # its weights are small: 0.1 the norm of a row, behind a batch norm
}
TEACHER_WEIGHT, TEMPERATURE = 0.7, 4.0
BATCH = 128
RECONSTRUCTED_ON = 32  # batches of 64
# processor minutes set aside of each budget for the teacher, scoring and fitting
BEFORE_TRAINING = {"resnet56": {"bf16": 6.0, "fp32": 12.0}, "vgg16": {"bf16": 14.0, "fp32": 28.0}}
VIEWS = 8  # of each image
ROWS = "rows.json"
# VGG-16 learns eight views by heart: it is shown new ones, with the mean of what is said of these
SHOWN_OTHER_VIEWS = {"vgg16"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("networks", nargs="*", help=f"some of {', '.join(LESS)}; else all")
    parser.add_argument("--by", nargs="+", default=["fxopt", "peer"], choices=["fxopt", "peer"])
    parser.add_argument("--cpu-minutes", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=["bf16", "fp32"])
    parser.add_argument("--state", type=Path, default=Path("accuracy"))
    options = parser.parse_args()
    unknown = sorted(set(options.networks) - set(LESS))
    if unknown:
        parser.error(f"unknown networks {', '.join(unknown)}: there are {', '.join(LESS)}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    options.state.mkdir(parents=True, exist_ok=True)
    for name in options.networks or LESS:
        for who in options.by:
            row = run(name, who, options.cpu_minutes, options.state, options.precision)
            print(json.dumps(row), flush=True)


def fast_precision() -> str:
    """Return "bf16" on processors that multiply bfloat16, else "fp32"."""
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def run(
    name: str, who: str, cpu_minutes: float, state: Path, precision: str | None = None
) -> dict[str, Any]:
    """Prune, fine-tune and measure one network, if that is not done yet; return the figures."""
    row = known(name, who, cpu_minutes, state)
    if row is not None:
        return row
    precision = precision or fast_precision()
    model = network(name)
    clean, test = cifar.clean_set(), cifar.test_set()
    views, teaching = taught(name, model, state, precision)
    started = time.process_time()
    pruned = prune_by_fxopt(model, name) if who == "fxopt" else prune_by_peer(model, name)
    spent = (time.process_time() - started) / 60 + teaching
    set_aside = BEFORE_TRAINING[name][precision]
    if spent > set_aside:
        raise SystemExit(f"{spent:.1f} processor minutes before training: set more aside.")
    row = {
        "macs": [count(model), count(pruned)],
        "parameters": [sum(p.numel() for p in one.parameters()) for one in (model, pruned)],
        "test_before": cifar.accuracy(model, test),
        "test_pruned": cifar.accuracy(pruned, test),
        "cpu_minutes_before_training": spent,
        "precision": precision,
        "processor": processor(),
    }
    print(key(name, who, cpu_minutes), json.dumps(row), flush=True)
    began = time.time()
    tuned = fxopt.finetune(
        pruned,
        taught_batches(name, views),
        loss=labels_and_teacher,
        cpu_minutes=cpu_minutes - set_aside,
        precision="bf16" if precision == "bf16" else None,
        channels_last=True,
        evaluate=lambda one: cifar.accuracy(one, clean),
        checkpoint=state / f"{name}-{who}-{cpu_minutes:g}-{precision}.ckpt",
        **TRAINING[name],
    )
    row["clean_tuned"] = cifar.accuracy(tuned.model, clean)
    row["test_tuned"] = cifar.accuracy(tuned.model, test)
    row["loss_in_points"] = row["test_before"] - row["test_tuned"]
    row["epochs"] = len(tuned.history)
    row["minutes"] = (time.time() - began) / 60
    rows = rows_in(state)  # now, for others may have been added
    with atomic_path(state / ROWS) as temporary:
        temporary.write_text(json.dumps({**rows, key(name, who, cpu_minutes): row}, indent=1))
    return row


def known(name: str, who: str, cpu_minutes: float, state: Path) -> dict[str, Any] | None:
    """Return the figures of a run that has ended, or None."""
    return rows_in(state).get(key(name, who, cpu_minutes))


def key(name: str, who: str, cpu_minutes: float) -> str:
    """Return the name of a run."""
    return f"{name} by {who}, {cpu_minutes:g} CPU minutes"


def rows_in(state: Path) -> dict[str, Any]:
    """Return the figures of all runs that have ended, by name."""
    file = state / ROWS
    return dict(json.loads(file.read_text())) if file.exists() else {}


def network(name: str) -> torch.nn.Module:
    """Return a trained network without dropout, in evaluation mode."""
    model: torch.nn.Module = getattr(cifar, name)()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.eval()


def taught(
    name: str, model: torch.nn.Module, state: Path, precision: str
) -> tuple[cifar.Views, float]:
    """Return what a network says of the training images, and the processor minutes it took."""
    file = state / f"{name}-taught-{precision}.safetensors"
    if not file.exists():
        torch.manual_seed(0)
        train = cifar.training_set()
        views = cifar.random_shifts(VIEWS, len(train))
        started = time.process_time()
        teacher = fxopt.compile(model, torch.zeros(500, 3, 32, 32), precision=precision)
        told = [
            torch.cat([
                teacher(_channels_last(cifar.floats(pixels)))
                for pixels in cifar.shifted(train.pixels, shifts).split(500)
            ])
            for shifts in views
        ]  # fmt: skip
        minutes = torch.tensor((time.process_time() - started) / 60)
        with atomic_path(file) as temporary:
            save_file({"views": views, "told": torch.stack(told), "minutes": minutes}, temporary)
    held = load_file(file)
    return cifar.Views(held["views"], held["told"]), float(held["minutes"])


def taught_batches(name: str, views: cifar.Views) -> cifar.Batches:
    """Return batches of training images, with their labels and what the teacher says of them."""
    train = cifar.training_set()
    if name in SHOWN_OTHER_VIEWS:
        return train.training_batches(BATCH, told=views.told.mean(0))
    return train.training_batches(BATCH, views)


def _channels_last(images: torch.Tensor) -> torch.Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def labels_and_teacher(
    outputs: torch.Tensor, targets: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Return the loss: how far the outputs are from the labels, and from what the teacher says."""
    labels, told = targets
    outputs = outputs.float()
    distance = distillation_loss(outputs, told, TEMPERATURE)
    return (1 - TEACHER_WEIGHT) * F.cross_entropy(outputs, labels) + TEACHER_WEIGHT * distance


def prune_by_fxopt(model: torch.nn.Module, name: str) -> fxopt.GraphModule:
    """Remove the blocks that change least, then channels, and reconstruct the layers.

    Channels go by first-order Taylor scores over the whole network. A network of fewer, wider
    layers learns faster than one of as many MACs in more, narrower ones.
    """
    graph = fxopt.capture(model, torch.zeros(2, 3, 32, 32), dynamic_shapes={"x": {0: "batch"}})
    whole = count(graph)
    scored = list(cifar.clean_set().batches(250))
    if name in BLOCKS_LESS:
        blocks = RemoveResidualBlocks(count=BLOCKS_LESS[name], importance="norm", data=scored[:4])
        graph = fxopt.optimize(graph, passes=[blocks])
    torch.manual_seed(0)
    batches = islice(cifar.training_set().training_batches(64), RECONSTRUCTED_ON)
    settings = {"ratio": 1 - whole / LESS[name] / count(graph), **PRUNING[name]}
    importance = Taylor(data=scored, loss=F.cross_entropy)
    return fxopt.prune(graph, **settings, importance=importance, reconstruct=list(batches))


def prune_by_peer(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """Prune by Torch-Pruning's L2 magnitude, at the ratio that leaves as many MACs."""
    import torch_pruning as tp

    def at(ratio: float) -> torch.nn.Module:
        twin = network(name)
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
