"""Scores of channels that need data: gradients, curvature and activations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.channels.groups import Appearance, Family, Member, Role
from fxopt.errors import FxoptError, OptionError, ShapeError
from fxopt.pruning.importance import Activations, Hessian, Taylor, importance_of
from fxopt.testing import noisy


class Net(nn.Module):
    """conv → bn → relu → conv, and a linear layer over its mean."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, bias=bias)
        self.bn = nn.BatchNorm2d(5)
        self.last = nn.Conv2d(5, 4, 3)
        self.head = nn.Linear(4, 3)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn(self.conv(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.last(self.hidden(x))).mean((2, 3)))


FAMILY = Family(
    "conv", ("conv",), 5,
    (
        Member("conv.weight", 0, Role.OUTPUT, np.arange(5)[:, None]),
        Member("conv.bias", 0, Role.SHIFT, np.arange(5)[:, None]),
        Member("bn.weight", 0, Role.SCALE, np.arange(5)[:, None]),
        Member("bn.bias", 0, Role.SHIFT, np.arange(5)[:, None]),
        Member("last.weight", 1, Role.INPUT, np.arange(5)[:, None]),
    ),
    (Appearance("conv2d", 1, np.arange(5)[:, None]),),
)  # fmt: skip


def batches(count: int = 3, size: int = 2, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 7, 7, generator=generator, dtype=torch.float64),
         torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]  # fmt: skip


@pytest.fixture
def model() -> Net:
    return noisy(Net()).double().eval()  # type: ignore[return-value]


@pytest.fixture
def graph(model: Net) -> fxopt.GraphModule:
    return fxopt.capture(model, batches()[0][0])


def gate_slopes(model: Net) -> torch.Tensor:
    """∂L/∂gate of each hidden channel, [batches, channels], by a gate behind the activation."""
    found = []
    for x, target in batches():
        gate = torch.ones(5, dtype=torch.float64, requires_grad=True)
        hidden = model.hidden(x) * gate[:, None, None]
        loss = F.cross_entropy(model.head(torch.tanh(model.last(hidden)).mean((2, 3))), target)
        found.append(torch.autograd.grad(loss, gate)[0])
    return torch.stack(found)


# -- taylor ----------------------------------------------------------------------------------------


def test_taylor_is_the_gate_behind_the_activation(model: Net, graph: Any) -> None:
    slopes = gate_slopes(model)
    (squared,) = Taylor(batches(), F.cross_entropy).scores(graph, [FAMILY])
    torch.testing.assert_close(squared, slopes.square().mean(0))
    (absolute,) = Taylor(batches(), F.cross_entropy, form="absolute-sum").scores(graph, [FAMILY])
    torch.testing.assert_close(absolute, slopes.abs().mean(0))


def test_taylor_of_scale_and_shift_is_the_gate_behind_the_norm(model: Net, graph: Any) -> None:
    """relu(c · x) = c · relu(x): so it is the gate behind the activation as well."""
    roles = ("scale", "shift")
    kind = Taylor(batches(), F.cross_entropy, roles=roles, form="absolute-sum")
    norm_alone = replace(FAMILY, members=(FAMILY.members[2], FAMILY.members[3]))
    (found,) = kind.scores(graph, [norm_alone])
    torch.testing.assert_close(found, gate_slopes(model).abs().mean(0))


def test_taylor_sum_of_squares(model: Net, graph: Any) -> None:
    expected = torch.zeros(5, dtype=torch.float64)
    for x, target in batches():
        loss = F.cross_entropy(model(x), target)
        (slope,) = torch.autograd.grad(loss, model.last.weight)
        expected += (slope * model.last.weight).detach().square().sum((0, 2, 3)) / 3
    kind = Taylor(batches(), F.cross_entropy, form="sum-of-squares")
    torch.testing.assert_close(kind.scores(graph, [FAMILY])[0], expected)


def test_taylor_predicts_what_a_small_step_to_zero_costs(model: Net, graph: Any) -> None:
    step, (x, target) = 1e-5, batches()[0]
    with torch.no_grad():
        before = F.cross_entropy(model(x), target)
        changes = []
        for channel in range(5):
            kept = model.last.weight.detach().clone()
            model.last.weight[:, channel] *= 1 - step
            changes.append(float(F.cross_entropy(model(x), target) - before) / step)
            model.last.weight.copy_(kept)
    kind = Taylor(batches(1), F.cross_entropy, form="absolute-sum")
    (found,) = kind.scores(graph, [FAMILY])
    torch.testing.assert_close(found, torch.tensor(changes).abs().double(), rtol=1e-3, atol=1e-8)


def test_channels_that_no_columns_read_are_scored_by_what_computes_them(graph: Any) -> None:
    unread = replace(FAMILY, members=FAMILY.members[:2])
    rows = Taylor(batches(), F.cross_entropy, roles=("output", "shift"))
    expected = rows.scores(graph, [unread])
    found = Taylor(batches(), F.cross_entropy).scores(graph, [unread])
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found[0], Taylor(batches(), F.cross_entropy).scores(graph, [FAMILY])[0])


def test_positions_that_go_together_are_one_gate(graph: Any) -> None:
    pairs = np.arange(4).reshape(2, 2)
    heads = replace(
        FAMILY, channels=2, members=(Member("head.weight", 1, Role.INPUT, pairs),)
    )
    single = replace(
        FAMILY, channels=4, members=(Member("head.weight", 1, Role.INPUT, np.arange(4)[:, None]),)
    )
    batch = batches(1)
    (both,) = Taylor(batch, F.cross_entropy, form="absolute-sum").scores(graph, [heads])
    ones = Taylor(batch, F.cross_entropy, form="sum-of-squares")
    twos = ones.scores(graph, [single])[0].reshape(2, 2).sum(1)
    torch.testing.assert_close(ones.scores(graph, [heads])[0], twos)
    assert (both > 0).all() and len(both) == 2


# -- hessian ---------------------------------------------------------------------------------------


def curvature(model: Net) -> torch.Tensor:
    """½ Σ h w² over the columns that read each channel, with the exact Hessian."""
    weight = model.last.weight.detach()
    found = torch.zeros(5, dtype=torch.float64)
    for x, target in batches():
        def loss_of(flat: torch.Tensor, x: Any = x, target: Any = target) -> torch.Tensor:
            new = {"last.weight": flat.reshape(weight.shape)}
            return F.cross_entropy(torch.func.functional_call(model, new, (x,)), target)

        whole = torch.autograd.functional.hessian(loss_of, weight.flatten())
        terms = 0.5 * whole.diagonal() * weight.flatten().square()
        found += terms.reshape(weight.shape).sum((0, 2, 3)) / 3
    return found


def test_hessian_approaches_the_exact_diagonal(model: Net, graph: Any) -> None:
    expected = curvature(model)
    (found,) = Hessian(batches(), F.cross_entropy, samples=1000).scores(graph, [FAMILY])
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) < 0.15 * scale
    (rough,) = Hessian(batches(), F.cross_entropy, samples=1).scores(graph, [FAMILY])
    assert float((rough - expected).abs().max()) > float((found - expected).abs().max())


def test_hessian_is_the_same_for_a_seed(graph: Any) -> None:
    kind = Hessian(batches(), F.cross_entropy)
    state = torch.random.get_rng_state()
    (first,), (again,) = kind.scores(graph, [FAMILY]), kind.scores(graph, [FAMILY])
    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), state)
    (other,) = replace(kind, seed=1).scores(graph, [FAMILY])
    assert not torch.equal(first, other)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).reshape(2, 5, 3, 2, 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(2, 5, 4).mean(1))


def test_heads_of_an_attention_are_scored_to_second_order() -> None:
    model = noisy(Attention()).double().eval()
    data = [(torch.randn(2, 5, 4).double(), torch.tensor([0, 2]))]
    rows = np.arange(12).reshape(3, 2, 2).transpose(1, 0, 2).reshape(2, 6)
    heads = Family("qkv", ("qkv",), 2, (Member("qkv.weight", 0, Role.OUTPUT, rows),))
    (found,) = Hessian(data, F.cross_entropy).scores(fxopt.capture(model, data[0][0]), [heads])
    assert torch.isfinite(found).all() and (found != 0).all()


# -- activations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["activation", "layer"])
def test_activations_are_statistics_over_all_batches(model: Net, graph: Any, at: str) -> None:
    read = model.hidden if at == "activation" else model.conv
    with torch.no_grad():
        values = torch.cat([read(x) for x, _ in batches()]).movedim(1, 0).flatten(1)
    expected = {
        "mean": values.abs().mean(1),
        "std": values.std(1, correction=0),
        "apoz": (values != 0).double().mean(1),
    }
    for statistic, numbers in expected.items():
        kind = Activations(batches(), statistic, at=at, normalize=None)
        torch.testing.assert_close(kind.scores(graph, [FAMILY])[0], numbers)
    assert (expected["apoz"] < 1).all() == (at == "activation")


def test_activations_of_several_places_and_positions_are_pooled(model: Net, graph: Any) -> None:
    twice = replace(
        FAMILY, channels=2, computed=(
            Appearance("conv2d", 1, np.asarray([[0, 1], [3, 4]])),
            Appearance("conv2d_1", 1, np.asarray([[3], [0]])),
        ),
    )  # fmt: skip
    with torch.no_grad():
        a = torch.cat([model.conv(x) for x, _ in batches()]).movedim(1, 0)
        b = torch.cat([model.last(model.hidden(x)) for x, _ in batches()]).movedim(1, 0)
    first = torch.cat([a[:2].flatten(), b[3].flatten()])
    second = torch.cat([a[3:].flatten(), b[0].flatten()])
    kind = Activations(batches(), at="layer", normalize=None)
    expected = torch.stack([first.abs().mean(), second.abs().mean()])
    torch.testing.assert_close(kind.scores(graph, [twice])[0], expected)


def test_what_follows_a_layer_ends_where_two_values_meet() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(F.hardswish(self.a(x)) * 2 + self.b(x)).flatten(1)

    model = noisy(Sum()).double().eval()
    x = batches()[0][0]
    family = Family("a", ("a",), 2, (), (Appearance("conv2d", 1, np.arange(2)[:, None]),))
    (found,) = Activations([x], normalize=None).scores(fxopt.capture(model, x), [family])
    with torch.no_grad():
        expected = (F.hardswish(model.a(x)) * 2).abs().mean((0, 2, 3))  # type: ignore[operator]
    torch.testing.assert_close(found, expected)


def test_a_family_that_nothing_computes_is_an_error(graph: Any) -> None:
    with pytest.raises(FxoptError, match="where the channels of the family 'conv' are computed"):
        Activations(batches()).scores(graph, [replace(FAMILY, computed=())])


# -- what all of them share ------------------------------------------------------------------------


KINDS = [
    Taylor(batches(), F.cross_entropy),
    Hessian(batches(), F.cross_entropy),
    Activations(batches()),
]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@each_kind
@pytest.mark.parametrize("training", [False, True])
def test_the_graph_is_only_read(model: Net, kind: Any, training: bool) -> None:
    graph = fxopt.capture(model, batches()[0][0])
    expected = kind.scores(graph, [FAMILY])
    graph.train(training)
    graph.constant("conv.weight").requires_grad_(False)
    tensors = graph.constants()
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    wanted = {name: tensor.requires_grad for name, tensor in tensors.items()}
    text = str(graph)
    found = kind.scores(graph, [FAMILY])
    torch.testing.assert_close(found, expected)  # batch norms use their statistics either way
    now = graph.constants()
    assert all(now[name] is tensor for name, tensor in tensors.items())
    assert all(torch.equal(now[name].detach(), before[name]) for name in before)
    assert {name: tensor.requires_grad for name, tensor in now.items()} == wanted
    assert all(tensor.grad is None for tensor in now.values())
    assert graph.training is training and str(graph) == text


@each_kind
def test_scores_are_the_same_where_gradients_are_off(kind: Any, graph: Any) -> None:
    expected = kind.scores(graph, [FAMILY])
    with torch.no_grad():
        torch.testing.assert_close(kind.scores(graph, [FAMILY]), expected)


@each_kind
def test_batches_limits_what_is_looked_at(kind: Any, graph: Any) -> None:
    few = replace(kind, batches=1).scores(graph, [FAMILY])
    torch.testing.assert_close(few, replace(kind, data=batches(1)).scores(graph, [FAMILY]))
    assert not torch.equal(few[0], kind.scores(graph, [FAMILY])[0])


@each_kind
def test_bad_data_is_an_error(kind: Any, graph: Any) -> None:
    for bad in (None, "data", 3):
        with pytest.raises(OptionError, match=rf"'{kind.name}' needs data.*{type(kind).__name__}"):
            replace(kind, data=bad)
    with pytest.raises(OptionError, match="batches=0"):
        replace(kind, batches=0)
    with pytest.raises(FxoptError, match="has no batches"):
        replace(kind, data=[]).scores(graph, [FAMILY])
    with pytest.raises(ShapeError):
        replace(kind, data=[(torch.randn(2, 3, 9, 9).double(), torch.tensor([0, 1]))]).scores(
            graph, [FAMILY]
        )


@each_kind
def test_a_name_alone_says_that_data_is_missing(kind: Any) -> None:
    with pytest.raises(OptionError, match=rf"given as an object: {type(kind).__name__}\(data=…"):
        importance_of(kind.name)
    assert importance_of(kind) is kind


def test_wrong_options_are_errors() -> None:
    with pytest.raises(OptionError, match=r"form='cube'.*'squared-sum'"):
        Taylor(batches(), F.cross_entropy, form="cube")
    with pytest.raises(OptionError, match="samples=0"):
        Hessian(batches(), F.cross_entropy, samples=0)
    with pytest.raises(OptionError, match=r"statistic='max'.*'mean', 'std', 'apoz'"):
        Activations(batches(), "max")
    with pytest.raises(OptionError, match=r"at='input'"):
        Activations(batches(), at="input")
    with pytest.raises(OptionError, match="the class CrossEntropyLoss itself"):
        Taylor(batches(), nn.CrossEntropyLoss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_computed_as_they_are(model: Net, graph: Any, dtype: Any) -> None:
    narrow = fxopt.dialect.retarget(graph, dtype=dtype)
    data = [(x.to(dtype), target) for x, target in batches()]
    for kind in KINDS:
        if kind.name != "hessian" or dtype is torch.float32:
            (found,) = replace(kind, data=data).scores(narrow, [FAMILY])  # type: ignore[type-var]
            (expected,) = kind.scores(graph, [FAMILY])
            error = float((found - expected).abs().max() / expected.abs().max())
            assert 0 < error < (1e-3 if dtype is torch.float32 else 0.3), kind.name


class ToldLoss(nn.Module):
    """A model that computes its own loss, as Hugging Face's do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.down(torch.relu(self.up(x)))
        return {"loss": F.cross_entropy(y, labels), "logits": y}


def test_a_model_with_a_loss_of_its_own() -> None:
    model = noisy(ToldLoss()).eval()
    batch = {"x": torch.randn(4, 3), "labels": torch.tensor([0, 1, 1, 0])}
    graph = fxopt.capture(model, batch)
    reading = Member("down.weight", 1, Role.INPUT, np.arange(6)[:, None])
    family = Family("up", ("up",), 6, (reading,))
    (found,) = Taylor([batch], form="absolute-sum").scores(graph, [family])
    loss = model(**batch)["loss"]
    (slope,) = torch.autograd.grad(loss, model.down.weight)  # type: ignore[union-attr]
    expected = (slope * model.down.weight).detach().sum(0).abs()  # type: ignore[union-attr]
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-7)
