"""What pruning costs in accuracy, and what it is worth in time: one page; see `tools/bench.py`.

    accuracy       ResNet-56 and VGG-16 on CIFAR-10, pruned and fine-tuned     prune_accuracy.py
    restoration    a network that removes noise from photographs               restoration.py
    latency        pruned networks beside the original, interleaved            pruning_latency.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import prune_accuracy
import restoration
import torch
from pruning_latency import latencies

from fxopt.files import atomic_path
from fxopt.profiling.machine import measure_machine

PAGE = Path(__file__).parent.parent / "docs" / "pruning-figures.md"
STATE = PAGE.with_suffix("")  # what trainings found is committed there, their checkpoints are not
RUNS = (  # network, pruned by, processor minutes: twice those that two cores take
    ("resnet56", "fxopt", 60.0), ("resnet56", "peer", 60.0), ("resnet56", "fxopt", 180.0),
    ("vgg16", "fxopt", 60.0), ("vgg16", "peer", 60.0), ("vgg16", "fxopt", 180.0),
)  # fmt: skip
RESTORING = 10.0  # processor minutes
WHO = {"fxopt": "fxopt", "peer": "Torch-Pruning, L2"}


def measure_pruning(
    models: list[str], backends: list[str], rounds: int, threads: int, state: Path,
    out: Path | None, *, train: bool = True,
) -> None:  # fmt: skip
    """Print the tables, and write them as a page to `out`, or to docs/pruning-figures.md.

    Of `models` that are named only the latency is measured, and written only where `out` says so.
    Unless it may `train`, what has not been trained yet has no figures.
    """
    parts = []
    if not models:
        out = out or PAGE
        state.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)  # small networks: two threads would wait for one another
        parts = [accuracies(state, train), restored(state, train)]
        torch.set_num_threads(threads)
    parts.append(latencies(models, backends, rounds, threads))
    page = "\n".join([heading(), *parts])
    print(f"\n{page}")
    if out is not None:
        with atomic_path(out) as temporary:
            temporary.write_text(page, encoding="utf-8")
        print(f"written to {out}")


def heading() -> str:
    """Return the title, and what this was measured with."""
    return f"""# What pruning costs, and what it is worth

Written by `python tools/bench.py prune`, on {measure_machine().name}, torch {torch.__version__}.
"""


def accuracies(state: Path, train: bool) -> str:
    """Return the section on ResNet-56 and VGG-16."""
    find = prune_accuracy.run if train else prune_accuracy.known
    rows = [_accuracy(*run, find(*run, state)) for run in RUNS]
    columns = [
        "network", "pruned by", "MACs", "parameters", "before", "pruned", "minutes", "fine-tuned",
        "lost",
    ]  # fmt: skip
    less = ", ".join(f"{name} {fewer:g}×" for name, fewer in prune_accuracy.LESS.items())
    return f"""## Accuracy

Networks trained on 45,000 images of CIFAR-10, pruned to fewer multiplications ({less}), and
fine-tuned on the same 45,000 with the original as the teacher. Per cent of the 10,000 test images,
which decide nothing: channels are scored, and the best epoch chosen, on 5,000 other images.

- *pruned*: before any training. Of ResNet-56 fxopt first removes the nine residual blocks that
  change least, then channels wherever they matter least; of VGG-16 the same share of every layer's
  MACs, in widths that are multiples of 8; by first-order Taylor scores, and what stays is fit to
  what the original's layers return (`reconstruct=`). Torch-Pruning takes the same share of the
  smallest L2 norms from every layer.
- *minutes*: of two cores; scoring and fitting are part of them. All runs train by the same call.
- *lost*: points of the accuracy before.

{_table(columns, rows)}
"""


def _accuracy(name: str, who: str, cpu_minutes: float, row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return [name, WHO[who], *["–"] * 4, f"{cpu_minutes / 2:g}", "not yet trained", "–"]
    macs, parameters = (before / after for before, after in (row["macs"], row["parameters"]))
    return [
        name, WHO[who], f"{macs:.2f}×", f"{parameters:.2f}×", f"{row['test_before']:.2f}",
        f"{row['test_pruned']:.2f}", f"{cpu_minutes / 2:g}", f"{row['test_tuned']:.2f}",
        f"{row['loss_in_points']:.2f}",
    ]  # fmt: skip


def restored(state: Path, train: bool) -> str:
    """Return the section on the network that removes noise."""
    row = (restoration.run if train else restoration.known)(RESTORING, state)
    if row is None:
        return "## Restoration\n\nNot yet trained.\n"
    before, after = row["macs_per_pixel"]
    columns = ["photographs", "noisy", "before", "pruned", "fine-tuned", "lost"]
    stages = [row[stage] for stage in ("noisy", "before", "pruned", "tuned")]
    parts = {
        "all 40": "reported", "20 of ImageNet": "imagenet", "10 cats and 10 dogs": "animals",
    }  # fmt: skip
    rows = [
        [name, *(f"{one[part]:.2f}" for one in stages), f"{stages[1][part] - stages[3][part]:.2f}"]
        for name, part in parts.items()
    ]
    return f"""## Restoration

A network of EDSR's kind that removes noise of deviation 25/255, with {before / after:.2f} times
fewer multiplications, fine-tuned for {RESTORING / 2:g} minutes of two cores on other photographs,
of cats and dogs. PSNR in decibels.

{_table(columns, rows)}
"""


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])
