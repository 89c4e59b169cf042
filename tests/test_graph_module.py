"""The graph as an nn.Module: it leaves the user's model alone, and trains as the model would."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt.testing import relative_error

aten = torch.ops.aten
X = torch.linspace(-1, 1, 12).reshape(3, 4)
IMAGES = torch.linspace(-1, 1, 2 * 3 * 6 * 6).reshape(2, 3, 6, 6)


class Net(nn.Module):
    """A bit of everything that a graph could damage."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(4, 2)
        self.head.bias.requires_grad_(False)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("scale", torch.ones(4), persistent=False)
        self.extra = {"list": [1, 2]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        x = self.drop(F.relu(self.bn(self.conv(x)), inplace=True)).mean((2, 3))
        return self.head(x * self.scale)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return everything of a model that must not change, by identity and by value."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[path, "training"] = module.training
        found[path, "hooks"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
        found[path, "attributes"] = {name: id(value) for name, value in vars(module).items()}
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                where = (id(tensor), tensor.data_ptr(), tensor._version, id(tensor.grad))
                found[path, name] = (*where, tensor.requires_grad, tensor.tolist())
    return found


def train_a_step(graph: fxopt.GraphModule) -> None:
    graph.train()
    optimizer = torch.optim.SGD(graph.parameters(), 0.1)
    graph(IMAGES).sum().backward()
    optimizer.step()


def fill(tensors: Any) -> None:
    with torch.no_grad():
        for tensor in tensors:
            tensor.fill_(3)


USES: dict[str, Callable[[nn.Module], Any]] = {
    "capture": lambda m: fxopt.capture(m, IMAGES),
    "run": lambda m: fxopt.capture(m, IMAGES)(IMAGES),
    "run backward": lambda m: fxopt.capture(m, IMAGES)(IMAGES).sum().backward(),
    "optimize": lambda m: fxopt.optimize(m, IMAGES)(IMAGES),
    "compile": lambda m: fxopt.compile(m, IMAGES)(IMAGES),
    "train": lambda m: train_a_step(fxopt.capture(m, IMAGES)),
    "train the optimized": lambda m: train_a_step(fxopt.optimize(m, IMAGES)),
    "train a copy": lambda m: train_a_step(fxopt.capture(m, IMAGES).copy()),
    "write parameters": lambda m: fill(fxopt.capture(m, IMAGES).parameters()),
    "write buffers": lambda m: fill(fxopt.capture(m, IMAGES).buffers()),
    "write the state": lambda m: fill(fxopt.capture(m, IMAGES).state_dict().values()),
    "write a part": lambda m: fill(fxopt.capture(m, IMAGES).head.parameters()),
    "write children": lambda m: [fill(c.parameters()) for c in fxopt.capture(m, IMAGES).children()],
    "load weights": lambda m: fxopt.capture(m, IMAGES).load_state_dict(Net().state_dict()),
    "retarget": lambda m: train_a_step_in_double(m),
    "requires_grad_": lambda m: fxopt.capture(m, IMAGES).requires_grad_(False),
}


def train_a_step_in_double(model: nn.Module) -> None:
    fxopt.dialect.retarget(fxopt.capture(model, IMAGES), dtype=torch.float64)(IMAGES.double())


@pytest.mark.parametrize("use", USES)
def test_the_users_model_is_untouched(use: str) -> None:
    model = Net().train()
    model.bn.eval()
    model(IMAGES).sum().backward()
    before = fingerprint(model)
    USES[use](model)
    after = fingerprint(model)
    for key, value in before.items():
        assert after[key] == value, f"{key} changed"


def test_graphs_follow_the_model_until_they_write_and_compiled_models_do_not() -> None:
    model = nn.Linear(4, 4)
    graph, compiled = fxopt.capture(model, X), fxopt.compile(model, X)
    expected = model(X).detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    assert torch.equal(graph(X), model(X))
    assert relative_error(compiled(X), expected) < 1e-6


def test_copies_are_independent_of_each_other() -> None:
    graph = fxopt.capture(Net(), IMAGES)
    expected = graph(IMAGES).detach()
    for other in (graph.copy(), copy.copy(graph), copy.deepcopy(graph), fxopt.capture(graph)):
        train_a_step(other)
        assert not graph.training and not graph.bn.training
        assert relative_error(graph(IMAGES), expected) == 0
    trained = graph.copy().train()
    assert trained.copy().training and copy.deepcopy(trained).training


def test_state_goes_on_in_each_copy_by_itself() -> None:
    model = Net().eval()
    graph = fxopt.capture(model, IMAGES)
    graph(IMAGES), graph(IMAGES)
    other = graph.copy()
    other(IMAGES)
    assert (model.count, graph.count, other.count) == (0, 2, 3)


def test_text_without_running_and_names_of_constants() -> None:
    graph = fxopt.capture(nn.Linear(4, 2), X)
    assert str(graph) == repr(graph) and "linear(%input_1, %weight, %bias)" in str(graph)
    assert sorted(graph.constants()) == sorted(graph.state_dict()) == ["bias", "weight"]
    with pytest.raises(AttributeError, match="no constant 'info'"):
        graph.constant("info")


def test_a_graph_cannot_be_moved_but_says_how() -> None:
    graph = fxopt.capture(nn.Linear(4, 4), X)
    for move in (graph.double, graph.half, lambda: graph.to("meta")):
        with pytest.raises(fxopt.FxoptError, match=r"dialect\.retarget"):
            move()


def test_the_models_own_state_dict_loads_as_it_is() -> None:
    model = Net()
    graph = fxopt.capture(model, IMAGES)
    assert set(model.state_dict()) - set(graph.state_dict()) == {"bn.num_batches_tracked"}
    other = Net().eval()
    graph.load_state_dict(other.state_dict())
    assert relative_error(graph(IMAGES), other(IMAGES)) < 1e-6
    with pytest.raises(RuntimeError, match="Unexpected key"):
        graph.load_state_dict({**other.state_dict(), "foreign": X})


# -- training -------------------------------------------------------------------------------------


class Functional(nn.Module):
    """Dropouts and batch norm as functions; some follow `training`, and some never switch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.fc(x), 0.5, training=self.training)
        x = F.dropout(x, 0.5, training=False)
        x = F.batch_norm(x, self.mean, self.var, training=self.training)
        x = drop(x, self.training)
        return F.dropout(
            x,
            p=0.3,
            training=self.training,
        )


def drop(x: torch.Tensor, training: bool) -> torch.Tensor:
    return F.dropout(x, 0.1, training)


class Frozen(nn.Module):
    """Keeps one of its batch norms in evaluation mode, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.fixed, self.free = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.fixed.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.free(self.fixed(self.fc(x)))


class Own(nn.BatchNorm1d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.fc(self.bn(x)))


TRAINED: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "layers": (Net, IMAGES),
    "functional": (Functional, X),
    "frozen by train()": (Frozen, X),
    "shared": (Shared, X),
    "a subclass": (lambda: nn.Sequential(nn.Linear(4, 4), Own(4)), X),
    "without statistics": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)), X
    ),
    "instance norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.InstanceNorm2d(3, track_running_stats=True)),
        IMAGES,
    ),
    "dropouts": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.AlphaDropout(0.2), nn.RReLU(), nn.Dropout(0.1)), X
    ),
    "channel dropout": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout2d(0.5)), IMAGES),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_training_the_graph_is_training_the_model(name: str) -> None:
    make, x = TRAINED[name]
    model = make()
    graph = fxopt.capture(model, x)
    twins = copy.deepcopy(model).train(), graph.train()
    for twin in twins:
        optimizer = torch.optim.SGD(twin.parameters(), 0.1)
        for step in range(3):
            torch.manual_seed(step)
            optimizer.zero_grad()
            (twin(x) ** 2).sum().backward()
            optimizer.step()
    reference = twins[0].state_dict()
    for key, value in graph.state_dict().items():
        assert relative_error(value, reference[key]) < 1e-5, key
    expected = twins[0].eval()(x)
    assert relative_error(graph.eval()(x), expected) < 1e-5
    assert relative_error(fxopt.optimize(graph)(x), expected) < 1e-4


def test_train_and_eval_switch_exactly_these_nodes() -> None:
    graph = fxopt.capture(Functional(), X)

    def flags() -> list[bool]:
        return [n.args[2] for n in graph.find(aten.dropout.default)] + [
            n.args[5] for n in graph.find(aten.batch_norm.default)
        ]

    assert flags() == [False] * 5
    graph.train()
    assert flags() == [True, False, True, True, True]
    graph.eval()
    assert flags() == [False] * 5


def test_what_cannot_switch_is_listed() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
            self.bn = nn.BatchNorm1d(3, momentum=None)  # a cumulative average

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(self.attention(x, x, x, need_weights=False)[0])

    graph = fxopt.capture(Attention(), X[None])
    assert graph.info.regularizers == ("attention", "bn")
    assert not graph.train().find(aten.batch_norm.default)[0].args[5]


def test_first_calls_from_many_threads() -> None:
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20))).eval()
    x = torch.randn(2, 4)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads meet
    try:
        for _ in range(20):
            graph = fxopt.capture(layers, x)
            together = threading.Barrier(8)

            def call(graph: Any = graph, together: threading.Barrier = together) -> torch.Tensor:
                together.wait()
                return graph(x)

            with ThreadPoolExecutor(8) as pool:
                results = [future.result() for future in [pool.submit(call) for _ in range(8)]]
            assert all(torch.equal(one, results[0]) for one in results)
    finally:
        sys.setswitchinterval(interval)
