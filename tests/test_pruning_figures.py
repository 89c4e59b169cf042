"""The benchmark of pruned networks: what it asks for, and the table that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from fxopt.comparison.race import Latency

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool, for which every model is a small one."""
    monkeypatch.syspath_prepend(TOOLS)
    import bench
    import pruning_latency

    def small(name: str) -> tuple[nn.Module, torch.Tensor]:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 48, 3), nn.ReLU(), nn.Conv2d(48, 48, 3), nn.ReLU()]
        return nn.Sequential(*layers, nn.Conv2d(48, 4, 3)).eval(), torch.rand(1, 3, 20, 20)

    monkeypatch.setattr(pruning_latency, "subject", small)
    return bench


def test_the_table_has_macs_and_latency_by_backend(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "latency.md"
    bench.main(["prune", "mine", "--rounds", "6", "--threads", "1", "--backends", "eager",
                "torchscript", "--out", str(out)])  # fmt: skip
    page = out.read_text(encoding="utf-8")
    assert page in capsys.readouterr().out
    head, _, *rows = [line for line in page.splitlines() if line.startswith("|")]
    assert head.endswith("| MACs | parameters | eager | torchscript |")
    by_rounding = {row.split(" | ")[3]: row.split(" | ") for row in rows}
    assert [*by_rounding] == ["1", "8"]
    for cells in by_rounding.values():
        assert cells[:3] == ["| mine", "1×3×20×20", "2×"]
        assert 1.9 < float(cells[4].rstrip("×")) < 2.6
        for cell in cells[6:]:
            assert "×" in cell and " to " in cell and " → " in cell and "inf" not in cell


def test_the_page_has_all_figures_and_some_models_alone_do_not_replace_it(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pruning_latency
    import pruning_page
    import restoration

    page, state = tmp_path / "page.md", tmp_path / "state"
    monkeypatch.setattr(pruning_page, "PAGE", page)
    monkeypatch.setattr(pruning_latency, "MODELS", ("one",))
    options = ["--rounds", "1", "--threads", "1", "--backends", "eager", "--state", str(state)]
    bench.main(["prune", "one", *options])
    assert not page.exists()

    bench.main(["--prune", "--no-training", *options])
    text = page.read_text(encoding="utf-8")
    assert text.count("not yet trained") == len(pruning_page.RUNS) and "Not yet trained." in text

    # what hours of training have found
    accuracy = {
        "macs": [200, 100], "parameters": [30, 10], "test_before": 93.2, "test_pruned": 88.4,
        "test_tuned": 92.95, "loss_in_points": 0.25,
    }  # fmt: skip
    found = {f"{n} by {who}, {m:g} CPU minutes": accuracy for n, who, m in pruning_page.RUNS}
    (state / "rows.json").write_text(json.dumps(found))
    decibels = dict.fromkeys(("reported", "imagenet", "animals"), 30.0)
    stages = {"noisy": decibels, "before": decibels, "pruned": decibels, "tuned": decibels}
    key = f"{restoration.CHOSEN}, {pruning_page.RESTORING:g} CPU minutes"
    (state / "restoration.json").write_text(json.dumps({key: {"macs_per_pixel": [4, 2], **stages}}))
    bench.main(["--prune", *options])
    text = page.read_text(encoding="utf-8")
    row = "| 2.00× | 3.00× | 93.20 | 88.40 | 90 | 92.95 | 0.25 |"
    assert f"| resnet56 | fxopt {row}" in text
    assert "| all 40 | 30.00 | 30.00 | 30.00 | 30.00 | 0.00 |" in text
    assert "with 2.00 times" in text
    assert "| one | " in text


def test_a_ratio_says_how_many_times_as_fast_the_pruned_one_is(bench: ModuleType) -> None:
    import pruning_latency

    times = {"eager": (Latency(((8.0,),) * 6), Latency(((2.0,),) * 6))}
    graph: Any = None
    pruned = pruning_latency.Pruned(graph, 2.13, 8, 2.2, 1.75)
    assert pruning_latency.Row("mine", "1×3×8×8", pruned, times).cells(["eager"]) == (
        "| mine | 1×3×8×8 | 2.13× | 8 | 2.20× | 1.75× | 4.00× (4.00 to 4.00), 8.00 → 2.00 ms |"
    )


def test_widths_are_multiples_of_what_is_asked(bench: ModuleType) -> None:
    import pruning_latency

    graph, _, options = pruning_latency.network("mine")
    for round_to in (1, 8):
        pruned = pruning_latency.pruned_to(graph, 2.0, round_to, options)
        widths = [len(one) for one in pruned.graph.parameters() if one.dim() == 4][:-1]
        assert all(width % round_to == 0 for width in widths) and max(widths) < 48
