"""fxopt.sensitivity: one family pruned at a time, measured once, and resumed after a kill."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.errors import ArtefactError, FxoptError, OptionError
from fxopt.passes import PruneChannels
from fxopt.sensitivity import Row, Sensitivity
from fxopt.testing import noisy

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A residual block between two convolutions: stem and block.1 are one family."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.block = nn.Sequential(nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(x + self.block(x)).mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    return noisy(Net()).eval()


class Evaluate:
    """Minus the distance to the unpruned model's output; notes every call."""

    def __init__(self, model: nn.Module, die_after: int | None = None) -> None:
        self.expected = model(X).detach()
        self.seen: list[fxopt.GraphModule] = []
        self.die_after = die_after

    def __call__(self, pruned: fxopt.GraphModule) -> float:
        if len(self.seen) == self.die_after:
            raise KeyboardInterrupt
        assert not pruned.training
        self.seen.append(pruned)
        with torch.no_grad():
            return -float((pruned(X) - self.expected).norm())


def measured(model: nn.Module, evaluate: Any, **options: Any) -> Sensitivity:
    return fxopt.sensitivity(
        model, options.pop("ratios", [0.25, 0.5]), evaluate, example_inputs=X, progress=False,
        **options,
    )  # fmt: skip


def test_each_family_is_pruned_alone_and_really(model: nn.Module) -> None:
    evaluate = Evaluate(model)
    found = measured(model, evaluate)
    assert [(row.name, row.channels, row.removed) for row in found.rows] == [
        ("stem", 8, (2, 4)), ("block.0", 6, (2, 3)),
    ]  # fmt: skip
    assert found.rows[0].layers == ("stem", "block.1")
    assert found.baseline == 0 and found.measured == (0.25, 0.5)
    for row in found.rows:
        for ratio, value in zip(found.measured, row.values, strict=True):
            one = PruneChannels(ratio=0.0, overrides={row.name: ratio})
            graph = fxopt.optimize(model, X, passes=[one], verify="off")
            assert value == pytest.approx(Evaluate(model)(graph), rel=1e-5)
            assert value < 0
    widths = [tuple(one.constants()[name].shape[0] for name in one.constants() if "weight" in name)
              for one in evaluate.seen]  # fmt: skip
    assert widths == [(8, 6, 8, 5), (6, 6, 6, 5), (4, 6, 4, 5), (8, 4, 8, 5), (8, 3, 8, 5)]


def test_the_importance_decides_which_channels_go(model: nn.Module) -> None:
    def backwards(graph: Any, family: Any) -> torch.Tensor:
        return torch.arange(family.channels, 0, -1)

    evaluate = Evaluate(model)
    measured(model, evaluate, importance=backwards, layers=["block.0"])
    last = evaluate.seen[-1]
    weights = [tensor for tensor in last.constants().values() if tensor.shape == (3, 8, 1, 1)]
    assert torch.equal(weights[0].detach(), model.block[0].weight[:3].detach())  # type: ignore[index]


def test_the_model_stays_as_it_is(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def vandal(pruned: fxopt.GraphModule) -> float:
        assert all(bool((weight != 0).any()) for weight in pruned.parameters())
        for parameter in pruned.parameters():
            parameter.data.zero_()
        return 0.0

    model.train()
    measured(model, vandal)
    assert model.training
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_a_captured_graph_is_taken_as_it_is(model: nn.Module) -> None:
    graph = fxopt.capture(model, X)
    graph.train()
    text = str(graph)
    found = fxopt.sensitivity(graph, [0.5], Evaluate(model), progress=False)
    assert [row.name for row in found.rows] == ["stem", "block.0"]
    assert graph.training and str(graph) == text


def test_dynamic_sizes(model: nn.Module) -> None:
    def evaluate(pruned: fxopt.GraphModule) -> float:
        assert pruned(X[:3]).shape == (3, 5) and pruned(X).shape == (4, 5)
        return 1.0

    found = measured(model, evaluate, dynamic_shapes={0: "batch"}, layers=["stem"])
    assert found.rows[0].values == (1.0, 1.0)


def test_ratios_that_remove_as_many_channels_are_measured_once(model: nn.Module) -> None:
    evaluate = Evaluate(model)
    found = measured(model, evaluate, ratios=[0.01, 0.5, 0.52, 0.99], layers=["block.0"])
    (row,) = found.rows
    assert row.removed == (0, 3, 3, 5)  # one channel always stays
    assert row.values[0] == found.baseline and row.values[1] == row.values[2]
    assert len(evaluate.seen) == 3
    assert {tensor.shape[0] for tensor in evaluate.seen[2].constants().values()} == {8, 1, 5}


class Attention(nn.Module):
    """One layer computes two families: the heads' queries and keys, and their values."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Linear(6, 8), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.embed(x)).reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(2, 5, 8))


def test_families_of_one_layer_are_pruned_one_by_one() -> None:
    model, x = noisy(Attention()).eval(), torch.randn(2, 5, 6)
    sizes = []

    def evaluate(pruned: fxopt.GraphModule) -> float:
        assert pruned(x).shape == (2, 5, 3)
        sizes.append(sum(tensor.numel() for tensor in pruned.constants().values()))
        return 0.0

    found = fxopt.sensitivity(model, [0.5], evaluate, example_inputs=x, progress=False)
    assert {"embed", "qkv"} <= {row.name for row in found.rows}
    assert len(sizes) == 1 + len(found.rows) and max(sizes[1:]) < sizes[0]


# -- ending and going on ---------------------------------------------------------------------------


def test_a_run_that_was_ended_goes_on(model: nn.Module, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    whole = Evaluate(model)
    expected = measured(model, whole)
    first = Evaluate(model, die_after=3)
    with pytest.raises(KeyboardInterrupt):
        measured(model, first, state=state)
    assert len(json.loads(state.read_text())["values"]) == 1
    second = Evaluate(model)
    found = measured(model, second, state=state)
    assert found == expected
    assert len(first.seen) + len(second.seen) == len(whole.seen) == 5
    third = Evaluate(model)
    wider = measured(model, third, state=str(state), ratios=[0.25, 0.5, 0.75])
    assert len(third.seen) == 2  # what is known is not measured again
    assert [row.values[:2] for row in wider.rows] == [row.values for row in expected.rows]
    assert list(tmp_path.iterdir()) == [state]


def test_random_orders_go_on_as_they_began(model: nn.Module, tmp_path: Path) -> None:
    calls = []

    def drawn(graph: Any, family: Any) -> torch.Tensor:
        calls.append(family.name)
        return torch.rand(family.channels)

    state = tmp_path / "state.json"
    with pytest.raises(KeyboardInterrupt):
        measured(model, Evaluate(model, die_after=2), importance=drawn, state=state)
    order = json.loads(state.read_text())["orders"]["block.0"]
    evaluate = Evaluate(model)
    measured(model, evaluate, importance=drawn, state=state)
    assert calls == ["stem", "block.0"]
    (weight,) = [t for t in evaluate.seen[-1].constants().values() if t.shape == (3, 8, 1, 1)]
    kept = sorted(order[3:])
    assert torch.equal(weight.detach(), model.block[0].weight[kept].detach())  # type: ignore[index]


def test_a_state_of_something_else_is_refused(model: nn.Module, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    measured(model, Evaluate(model), state=state)
    text = state.read_text()
    other = noisy(Net(), seed=3).eval()
    with pytest.raises(OptionError, match="measured on another model, or on other weights"):
        measured(other, Evaluate(other), state=state)
    with pytest.raises(OptionError, match=r"measured with importance=L2\(.*this run has.*L1\("):
        measured(model, Evaluate(model), state=state, importance="l1")
    with pytest.raises(OptionError, match=r"importance=L2\(normalize='mean'.*normalize=None"):
        measured(model, Evaluate(model), state=state, importance="l2(normalize=None)")
    with pytest.raises(OptionError, match="measured with evaluate=.*Evaluate"):
        measured(model, lambda pruned: 0.0, state=state)
    assert state.read_text() == text


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "x"}', '{"a": 1}'])
def test_a_file_that_is_no_state_is_refused(
    model: nn.Module, tmp_path: Path, content: str
) -> None:
    state = tmp_path / "notes.txt"
    state.write_text(content)
    with pytest.raises(OptionError, match=r"'.*notes.txt' (is no state|was written by another)"):
        measured(model, Evaluate(model), state=state)
    assert state.read_text() == content


def test_a_place_that_cannot_be_written_is_found_before_the_work(
    model: nn.Module, tmp_path: Path
) -> None:
    evaluate = Evaluate(model)
    with pytest.raises(ArtefactError, match="Cannot write"):
        measured(model, evaluate, state=tmp_path / "missing" / "state.json")
    assert not evaluate.seen


# -- what is asked for -----------------------------------------------------------------------------


@pytest.mark.parametrize("ratios", [[], 0.5, [0.0], [1.0], [True], ["half"], [float("nan")]])
def test_ratios_that_are_none(model: nn.Module, ratios: Any) -> None:
    with pytest.raises(OptionError, match="ratios"):
        measured(model, Evaluate(model), ratios=ratios)


def test_layers_that_are_none(model: nn.Module) -> None:
    with pytest.raises(OptionError, match=r"'stam'. Did you mean 'stem'\? Known: block.0, block.1"):
        measured(model, Evaluate(model), layers=["stam"])
    with pytest.raises(OptionError, match=r"write layers=\['stem'\]"):
        measured(model, Evaluate(model), layers="stem")
    found = measured(model, Evaluate(model), layers=["block.1"])  # tied to the stem
    assert [row.name for row in found.rows] == ["stem"]
    with pytest.raises(OptionError, match="No layer of this model has channels that may go"):
        measured(nn.Conv2d(3, 4, 1).eval(), Evaluate(model))


def test_evaluations_that_are_no_numbers(model: nn.Module) -> None:
    with pytest.raises(OptionError, match="evaluate must be a function"):
        measured(model, 0.5)
    with pytest.raises(FxoptError, match="evaluate returned NoneType for the model as it is"):
        measured(model, lambda pruned: None)
    with pytest.raises(FxoptError, match="returned nan for the model as it is"):
        measured(model, lambda pruned: float("nan"))
    values = iter([1.0, torch.tensor(0.5), float("nan"), 1, 1])
    found = measured(model, lambda pruned: next(values))
    assert found.rows[0].values[0] == 0.5 and math.isnan(found.rows[0].values[1])
    assert found.to_json()["rows"][0]["values"] == [0.5, None]
    assert found.ratios(0.6)["stem"] == 0.25


# -- what follows ----------------------------------------------------------------------------------


FOUND = Sensitivity(
    "Net", "l2", 0.9, (0.2, 0.5, 0.8),
    (
        Row("stem", ("stem", "block.1"), 64, (13, 32, 51), (0.9, 0.895, 0.5)),
        Row("body", ("body",), 32, (6, 16, 26), (0.85, 0.9, 0.1)),
        Row("blocks.0.a|b", ("blocks.0.a|b",), 2048, (410, 1024, 1638), (0.91, 0.9, 0.89)),
    ),
)  # fmt: skip


def test_ratios_stop_at_the_first_that_costs_more() -> None:
    assert FOUND.ratios(0.01) == {"stem": 0.5, "body": 0.0, "blocks.0.a|b": 0.8}
    assert FOUND.ratios(0.05 + 1e-9) == {"stem": 0.5, "body": 0.5, "blocks.0.a|b": 0.8}
    assert FOUND.ratios(0) == {"stem": 0.2, "body": 0.0, "blocks.0.a|b": 0.5}
    assert FOUND.ratios(0.5, relative=True)["stem"] == 0.8
    assert FOUND.ratios(0.01 / 0.9, relative=True)["stem"] == 0.5
    for drop in (-0.1, "1%", float("nan"), True):
        with pytest.raises(OptionError, match="drop must be"):
            FOUND.ratios(drop)  # type: ignore[arg-type]


def test_ratios_are_overrides_of_the_pass(model: nn.Module) -> None:
    found = measured(model, Evaluate(model))
    drop = -found["stem"].values[0]
    chosen = found.ratios(drop)
    assert chosen["stem"] == 0.25
    one = PruneChannels(ratio=0.0, overrides=chosen)
    graph = fxopt.optimize(model, X, passes=[one], verify="off")
    assert any(t.shape == (6, 3, 3, 3) for t in graph.constants().values())


def test_it_is_shown_as_text_markdown_and_json() -> None:
    text = str(FOUND)
    assert text.splitlines()[0] == "Net: 0.9 unpruned; one layer at a time, by l2"
    assert "stem +1" in text and "0.895" in text and "−0.5" in text and "2,048" in text
    lines = FOUND.to_markdown().splitlines()
    assert lines[2:5] == [
        "| pruned | channels | −0.2 | −0.5 | −0.8 |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| stem +1 | 64 | 0.9 | 0.895 | 0.5 |",
    ]
    assert lines[6].startswith("| blocks.0.a\\|b |")
    document = json.loads(json.dumps(FOUND.to_json()))
    assert document["baseline"] == 0.9 and document["ratios"] == [0.2, 0.5, 0.8]
    assert document["rows"][1]["values"] == [0.85, 0.9, 0.1]
    assert FOUND["body"].channels == 32
    with pytest.raises(KeyError, match="no row 'head'; there are stem, body"):
        FOUND["head"]


@pytest.mark.parametrize("families", [3, 40])
@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plots_of_few_and_of_many(tmp_path: Path, families: int, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    rows = [Row(f"layer{i}", (f"layer{i}",), 8, (1, 4, 6), (0.9, 0.1, i)) for i in range(families)]
    path = tmp_path / f"found.{suffix}"
    Sensitivity("Net", "l2", 0.9, (0.2, 0.5, 0.8), rows).plot(path)
    content = path.read_bytes()
    assert len(content) > 5000
    assert suffix == "png" or f"layer{families - 1}".encode() in content
    with pytest.raises(OptionError, match="Cannot plot"):
        FOUND.plot(tmp_path / "found.gif")


def test_a_bar_says_how_far_it_is(model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    fxopt.sensitivity(model, [0.5], Evaluate(model), example_inputs=X)
    shown = capsys.readouterr()
    assert "3/3" in shown.err and "left:" in shown.err and not shown.out
    measured(model, Evaluate(model))
    assert capsys.readouterr().err == ""
