"""Pruned graphs: shapes, numbers against zeroed channels, options, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt.dialect import retarget
from fxopt.errors import FxoptError, OptionError, VerifyError
from fxopt.passes import PruneChannels
from fxopt.pruning import mending
from fxopt.pruning.record import PruningRecord
from fxopt.testing import noisy, relative_error


class Net(nn.Module):
    """Two blocks, a residual sum and a flatten over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.a = nn.Conv2d(16, 24, 3, padding=1)
        self.b = nn.Conv2d(24, 16, 1)
        self.fc1 = nn.Linear(16 * 4 * 4, 20)
        self.fc2 = nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> Any:
        x = torch.sigmoid(self.bn(self.stem(x)))
        x = x + self.b(torch.sigmoid(self.a(x)))
        x = F.adaptive_avg_pool2d(x, 4)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return noisy(Net().eval())


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def pruned(model: nn.Module, x: torch.Tensor, **options: Any) -> tuple[Any, PruningRecord]:
    graph = retarget(fxopt.capture(model, x), dtype=torch.float64)
    record = PruneChannels(**options).run(graph).details
    assert isinstance(record, PruningRecord)
    return graph, record


def widths(record: PruningRecord) -> dict[str, int]:
    return {one.name: one.after for one in record.widths}


def test_half_of_every_family_goes(model: nn.Module, x: torch.Tensor) -> None:
    graph, record = pruned(model, x, ratio=0.5)
    assert widths(record) == {"stem": 8, "a": 12, "fc1": 10}
    assert graph.constant("fc1.weight_pruned").shape == (10, 8 * 4 * 4)
    assert record.error < 1e-12
    assert graph(x.double()).shape == (2, 5)
    assert [one.layer for one in record.frozen] == ["fc2"]


def test_the_function_is_that_of_channels_read_as_zero(model: nn.Module, x: torch.Tensor) -> None:
    """By hand: zero columns of the original's weights, and only those."""
    graph, _ = pruned(model, x, ratio=0.5, importance="l1(roles=('output',), normalize=None)")
    twin = Net().eval().double()
    twin.load_state_dict(model.double().state_dict())
    with torch.no_grad():
        gone = []
        for layers in ((twin.stem, twin.b), (twin.a,), (twin.fc1,)):
            scores = sum(one.weight.flatten(1).abs().sum(1) for one in layers)
            assert isinstance(scores, torch.Tensor)
            gone.append(scores.argsort(stable=True)[: len(scores) // 2])
        twin.a.weight[:, gone[0]] = 0
        twin.fc1.weight.view(20, 16, 16)[:, gone[0]] = 0
        twin.b.weight[:, gone[1]] = 0
        twin.fc2.weight[:, gone[2]] = 0
    assert relative_error(graph(x.double()), twin(x.double())) < 1e-12


def test_the_users_model_and_a_captured_graph_stay(model: nn.Module, x: torch.Tensor) -> None:
    graph = fxopt.capture(model, x)
    text, expected = str(graph), model(x)
    small = fxopt.optimize(graph, passes=[PruneChannels(ratio=0.5)])
    assert str(graph) == text
    assert torch.equal(model(x), expected)
    assert small(x).shape == expected.shape
    assert "channels 60 → 30" in str(small.report)


def test_ratio_of_macs_params_and_bytes(model: nn.Module, x: torch.Tensor) -> None:
    for kind in ("macs", "params", "bytes"):
        _, record = pruned(model, x, ratio=0.5, of=kind)
        before, after = record.macs if kind == "macs" else record.parameters
        assert 0.35 < after / before <= 0.5, kind


def test_the_budget_is_the_cost_of_the_pruned_graph(model: nn.Module, x: torch.Tensor) -> None:
    from fxopt.channels import Channels
    from fxopt.pruning.budget import Budget
    from fxopt.pruning.importance import importance_of, score
    from fxopt.pruning.removal import _sizes, remove
    from fxopt.pruning.selection import Selection

    graph = fxopt.capture(model, x)
    channels = Channels(graph)
    scores = [one.numpy() for one in score(importance_of("l2"), graph, channels.families)]
    chosen = Selection(channels, scores, PruneChannels(ratio=0.4)._wish())
    gone = chosen.gone(chosen.at_ratio(0.4))
    _, (_, parameters) = _sizes(graph, remove(channels, gone)[0])
    (_, macs), _ = _sizes(graph, remove(channels, gone)[0])
    assert Budget(channels, "macs")(gone) == pytest.approx(macs, rel=1e-9)
    assert Budget(channels, "params")(gone) == pytest.approx(parameters, rel=1e-9)


def test_overrides_keep_rounding_and_minimum(model: nn.Module, x: torch.Tensor) -> None:
    assert widths(pruned(model, x, overrides={"f*": 0.25})[1]) == {"stem": 8, "a": 12, "fc1": 15}
    assert widths(pruned(model, x, keep=("b",))[1])["stem"] == 16  # tied to b by the sum
    assert widths(pruned(model, x, ratio=0.6, round_to=8)[1]) == {"stem": 8, "a": 8, "fc1": 8}
    assert widths(pruned(model, x, ratio=0.9, min_channels=6)[1]) == {"stem": 6, "a": 6, "fc1": 6}
    assert min(widths(pruned(model, x, ratio=1.0, max_ratio=1.0)[1]).values()) == 1


def test_names_of_modules_and_patterns() -> None:
    block = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
    model = nn.Sequential(block, nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    x = torch.randn(2, 4)
    assert widths(pruned(model, x, keep=("0",))[1]) == {"0.0": 8, "0.2": 8, "2": 4}
    assert widths(pruned(model, x, keep=("*.2",))[1]) == {"0.0": 4, "0.2": 8, "2": 4}
    assert widths(pruned(model, x, overrides={"0": 0.25, "0.2": 0.75})[1]) == {
        "0.0": 6, "0.2": 6, "2": 4  # of several the least
    }  # fmt: skip


def test_scopes(model: nn.Module, x: torch.Tensor) -> None:
    _, record = pruned(model, x, ratio=0.5, scope="global")
    assert sum(widths(record).values()) == 30
    _, record = pruned(model, x, ratio=0.5, scope="global", max_ratio=0.5)
    assert widths(record) == {"stem": 8, "a": 12, "fc1": 10}
    _, record = pruned(model, x, ratio=0.5, scope="isomorphic")
    assert widths(record) == {"stem": 8, "a": 12, "fc1": 10}  # no two of a kind here


def test_own_importance_decides(model: nn.Module, x: torch.Tensor) -> None:
    def last_first(graph: Any, family: Any) -> torch.Tensor:
        return -torch.arange(float(family.channels))

    graph, _ = pruned(model, x, ratio=0.25, importance=last_first)
    kept = model.get_parameter("stem.weight")[:12].double()
    assert torch.equal(graph.constant("stem.weight_pruned"), kept)


def test_is_deterministic_and_prunes_again(model: nn.Module, x: torch.Tensor) -> None:
    one, two = (fxopt.prune(model, x, importance="random") for _ in range(2))
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))
    again = fxopt.prune(one, ratio=0.5)
    assert "stem.weight_pruned" not in again.state_dict()
    assert again.constant("stem.weight_pruned_2").shape == (4, 3, 3, 3)


def test_trains_saves_loads_and_exports(model: nn.Module, x: torch.Tensor, tmp_path: Path) -> None:
    graph = fxopt.prune(model, x)
    graph.train()
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(graph(x), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    graph.eval()
    for backend, suffix in (("eager", "fxopt"), ("torchscript", "pt"), ("onnx", "onnx")):
        compiled = fxopt.compile(graph, x, backend=backend)
        path = tmp_path / f"small.{suffix}"
        compiled.save(path)
        assert relative_error(fxopt.load(path)(x), graph(x)) < 1e-5


def test_new_weights_go_through_the_pruning(model: nn.Module, x: torch.Tensor) -> None:
    compiled = fxopt.compile(model, x, passes=[PruneChannels(), *fxopt.default_passes()])
    trained = noisy(Net().eval(), seed=3)
    assert compiled.graph is not None
    kept = compiled.graph.story.renamed
    assert "stem.weight" in kept
    before = compiled(x)
    compiled.update(trained.state_dict())
    assert relative_error(compiled(x), before) > 1e-3
    weight = compiled.graph.constants()[kept["fc2.weight"][0]]
    assert weight.shape == (5, 10)
    columns = trained.get_parameter("fc2.weight").T
    assert all((column == columns).all(1).any() for column in weight.T)


def test_dynamic_batch(model: nn.Module, x: torch.Tensor) -> None:
    graph = fxopt.prune(model, x, dynamic_shapes={"x": {0: "batch"}})
    assert graph(torch.randn(7, 3, 8, 8)).shape == (7, 5)


def test_channels_that_norms_reduce_only_on_request() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(6, 16)
            self.norm = nn.LayerNorm(16)
            self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
            self.head = nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> Any:
            x = self.stem(x)
            return self.head(x + self.down(F.gelu(self.up(self.norm(x)))))

    torch.manual_seed(0)
    block, x = noisy(Block().eval()), torch.randn(2, 4, 6)
    _, record = pruned(block, x)
    assert widths(record) == {"up": 12}
    assert {one.reason.text for one in record.frozen} == {
        "a layer norm reduces over them", "the model returns them"
    }  # fmt: skip
    graph, record = pruned(block, x, residual=True)
    assert widths(record) == {"stem": 8, "up": 12}
    assert record.approximate == ("a layer norm reduces over them (layer_norm)",)
    assert record.error > 1e-3
    assert "approximate" in str(record)
    assert graph(x.double()).shape == (2, 4, 3)


def test_a_weight_that_is_computed_becomes_a_constant() -> None:
    class Standardized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
            self.head = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> Any:
            for layer in (self.a, self.b):
                w = layer.weight
                w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
                x = F.relu(F.conv2d(x, w, layer.bias))
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    model, x = noisy(Standardized().eval()), torch.randn(1, 3, 8, 8)
    graph, record = pruned(model, x)
    assert widths(record) == {"conv2d": 4, "conv2d_1": 4} or record.channels == (16, 8)
    assert graph.constant("a.weight_folded_pruned").shape == (4, 3, 3, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 1.5}, "ratio must be a share between 0 and 1"),
        ({"ratio": float("nan")}, "ratio must be a share"),
        ({"of": "flops"}, "of must be one of"),
        ({"scope": "local"}, "scope must be one of"),
        ({"overrides": {"stem": 2.0}}, r"overrides\['stem'\] must be a share"),
        ({"overrides": {"stm": 0.5}}, "Did you mean 'stem'"),
        ({"keep": ("layer9.*",)}, "Unknown layer"),
        ({"round_to": 0}, "round_to must be a whole number"),
        ({"kinds": ("neurons",)}, "kinds must be some of"),
        ({"heads": "none"}, "heads must be one of"),
        ({"importance": "l3"}, "Did you mean"),
    ],
)
def test_options_that_cannot_be_meant(
    model: nn.Module, x: torch.Tensor, options: dict[str, Any], words: str
) -> None:
    graph = fxopt.capture(model, x)
    text = str(graph)
    with pytest.raises(OptionError, match=words):
        PruneChannels(**options).run(graph)
    assert str(graph) == text


def test_a_pattern_of_a_frozen_layer_is_no_error(model: nn.Module, x: torch.Tensor) -> None:
    """Who keeps the head says what is so already."""
    assert widths(pruned(model, x, keep=("fc2",))[1]) == {"stem": 8, "a": 12, "fc1": 10}


def test_nothing_to_prune_is_said(x: torch.Tensor) -> None:
    graph = fxopt.capture(nn.Conv2d(3, 4, 3).eval(), x)
    text = str(graph)
    result = PruneChannels().run(graph)
    assert not result.modified
    assert [one.reason for one in result.misses] == ["the model returns them"]
    assert str(graph) == text


def test_a_wrong_surgery_is_found_and_undone(
    model: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass's own proof: take the wrong columns of one weight."""
    right = mending.Kept.__call__

    def wrong(self: mending.Kept, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape == (5, 20):  # fc2.weight
            ((dim, places),) = self.kept
            return tensor.index_select(dim, torch.tensor(sorted(places)) - min(places))
        return right(self, tensor)

    monkeypatch.setattr(mending.Kept, "__call__", wrong)
    graph = fxopt.capture(model, x)
    text, expected = str(graph), graph(x)
    with pytest.raises(VerifyError, match="not the original with 30 channels zeroed"):
        PruneChannels(importance=lambda graph, family: torch.arange(family.channels)).run(graph)
    assert str(graph) == text
    assert torch.equal(graph(x), expected)


@pytest.mark.parametrize("fail_at", [1, 5, 20])
def test_a_failure_leaves_the_graph_as_it_was(
    model: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    calls = 0
    right: Callable[..., Any] = mending.Mender.__call__

    def failing(self: Any, node: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise RuntimeError("planted")
        return right(self, node)

    monkeypatch.setattr(mending.Mender, "__call__", failing)
    graph = fxopt.capture(model, x)
    text, expected, names = str(graph), graph(x), set(graph.constants())
    with pytest.raises(FxoptError, match="planted"):
        fxopt.optimize(graph, passes=[PruneChannels()])
    with pytest.raises(RuntimeError):
        calls = 0
        PruneChannels().run(graph)
    assert (str(graph), set(graph.constants())) == (text, names)
    assert torch.equal(graph(x), expected)


def test_by_name_with_options(model: nn.Module, x: torch.Tensor) -> None:
    graph = fxopt.optimize(
        model, x, passes=["prune-channels(ratio=0.25, round_to=2, overrides={'fc1': 0.5})"]
    )
    assert widths(graph.story.steps[0].details) == {"stem": 12, "a": 18, "fc1": 10}


def test_bisection_can_stop_it(model: nn.Module, x: torch.Tensor) -> None:
    from fxopt.rewrite import fuel

    graph = fxopt.capture(model, x)
    text = str(graph)
    with fuel(0):
        assert not PruneChannels().run(graph).modified
    assert str(graph) == text


def test_latency_is_measured_as_compiled(
    model: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a stopwatch says decides; here it says the share of the channels that stay."""
    from fxopt.pruning.latency import Stopwatch

    asked: list[float] = []

    def share(self: Stopwatch, gone: Any) -> float:
        asked.append(1 - gone.sum() / 60)
        return asked[-1]

    monkeypatch.setattr(Stopwatch, "__call__", share)
    _, record = pruned(model, x, ratio=0.25, of="latency")
    assert len(asked) == 8  # the whole, the least, and six trials between
    assert 44 <= record.channels[1] <= 45


def test_a_stopwatch_runs_both(model: nn.Module, x: torch.Tensor) -> None:
    from fxopt.channels import Channels
    from fxopt.pruning.latency import Stopwatch

    channels = Channels(fxopt.capture(model, x))
    watch = Stopwatch(channels, "eager")
    gone = np.zeros(len(channels.partition), np.bool_)
    assert watch(gone) == 1.0
    gone[channels.ids_of(channels.families[0])[:8]] = True
    assert 0.0 < watch(gone) < 10.0


@pytest.mark.parametrize("kinds", [("heads",), ("channels",)])
def test_heads_alone_or_channels_alone(kinds: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True).eval()
    _, record = pruned(noisy(layer), torch.randn(2, 5, 16), kinds=kinds)
    assert sorted(one.before - one.after for one in record.widths) == (
        [0, 2] if kinds == ("heads",) else [0, 12]
    )
