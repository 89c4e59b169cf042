"""fxopt as a backend of torch.compile: the same results as PyTorch, whatever changes between calls.

Every test counts or compares, so that a graph which PyTorch ran instead would be noticed.
"""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import fxopt
from fxopt.backends import Eager
from fxopt.dynamo import compiled_graph
from fxopt.errors import OptionError
from tests.models import Function

ROOT = Path(__file__).parent.parent


class Net(nn.Module):
    """What every pass likes: a batch norm behind a convolution, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.bn(self.conv(x))).mean((2, 3)))


@pytest.fixture
def compiled() -> Iterator[list[fxopt.CompiledModel]]:
    """The models that fxopt compiled, in order."""
    torch._dynamo.reset()
    found: list[fxopt.CompiledModel] = []
    with pytest.MonkeyPatch.context() as patch:
        real = compiled_graph.compile

        def counted(*args: Any, **kwargs: Any) -> Any:
            found.append(real(*args, **kwargs))
            return found[-1]

        patch.setattr(compiled_graph, "compile", counted)
        yield found
    torch._dynamo.reset()


def through_fxopt(model: Any, *, dynamic: bool | None = None, **options: Any) -> Any:
    return torch.compile(
        model, backend=fxopt.torch_compile_backend, dynamic=dynamic, options=options
    )


def same(found: Any, expected: Any) -> None:
    ours, theirs = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        else:
            assert a == b and type(a) is type(b)


def images(batch: int = 2, size: int = 8) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


# -- being found -----------------------------------------------------------------------------------


def test_it_is_registered_by_name() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    place = table["torch_dynamo_backends"]["fxopt"]
    point = importlib.metadata.EntryPoint("fxopt", place, "torch_dynamo_backends")
    assert point.load() is fxopt.torch_compile_backend


# -- the same results ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"backend": "onnx"}, {"backend": "torchscript", "freeze": False}, {"backend": Eager()},
    {"passes": [], "verify": "each"},
], ids=str)  # fmt: skip
def test_a_model_on_every_backend(compiled: list[Any], options: dict[str, Any]) -> None:
    model, x = Net().eval(), images()
    same(through_fxopt(model, **options)(x), model(x))
    (one,) = compiled
    named = options.get("backend", "eager")
    assert one.backend.name == getattr(named, "name", named)
    folded = not one.graph.find(torch.ops.aten.batch_norm.default)
    assert folded is ("passes" not in options)
    assert one.story.verifications


def test_graph_breaks_make_several_graphs(compiled: list[Any]) -> None:
    def forward(x: torch.Tensor) -> tuple[Any, ...]:
        y = torch.relu(x) * 2
        torch._dynamo.graph_break()
        return y.view(-1) + 1, {"size": x.shape[0], "word": "no tensor"}

    x = torch.randn(3, 4)
    same(through_fxopt(Function(forward))(x), forward(x))
    assert len(compiled) == 2


@pytest.mark.parametrize("dynamic", [True, None])
def test_a_dynamic_batch_is_compiled_once(compiled: list[Any], dynamic: bool | None) -> None:
    model = Net().eval()
    ours = through_fxopt(model, dynamic=dynamic)
    for batch in (2, 3, 5, 7):
        x = images(batch)
        same(ours(x), model(x))
    assert len(compiled) == (1 if dynamic else 2)  # by default the first graph is static


def test_mark_dynamic_and_integers(compiled: list[Any]) -> None:
    def forward(x: torch.Tensor, n: int) -> tuple[torch.Tensor, int, int]:
        return x * n + x.shape[0], x.shape[0] * 3, n + 1

    ours = through_fxopt(Function(forward), dynamic=True)
    for rows, n in ((4, 5), (6, 7), (9, 11)):
        x = torch.ones(rows, 2)
        torch._dynamo.mark_dynamic(x, 0)
        same(ours(x, n), forward(x, n))
    assert len(compiled) == 1


def test_floats(compiled: list[Any]) -> None:
    """With dynamic=True torch.compile hands floats over as tensors."""

    def forward(x: torch.Tensor, k: float) -> torch.Tensor:
        return F.layer_norm(x * k, (4,), eps=k)

    ours, x = through_fxopt(forward, dynamic=True), torch.randn(3, 4)
    for k in (0.5, 0.25, 0.5):
        same(ours(x, k), forward(x, k))
    assert len(compiled) == 2


def test_a_size_that_the_graph_fixes_is_compiled_for_each(compiled: list[Any]) -> None:
    """torch.compile leaves a size open, torch.export does not: nobody may see the difference."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, 8 - x.shape[0] % 8 if x.shape[0] > 4 else 1))

    ours = through_fxopt(Function(forward), dynamic=True)
    for rows in (3, 4, 7, 3, 9):
        x = torch.ones(rows, 2)
        same(ours(x), forward(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(compiled: list[Any], dtype: torch.dtype) -> None:
    model, x = Net().eval().to(dtype), images().to(dtype)
    found = through_fxopt(model)(x)
    assert found.dtype is dtype
    torch.testing.assert_close(found, model(x), rtol=0.05, atol=0.02)
    assert len(compiled) == 1


def test_autocast_is_kept(compiled: list[Any]) -> None:
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    ours = through_fxopt(model)
    for enabled in (True, False, True):
        with torch.autocast("cpu", enabled=enabled):
            expected, found = model(x), ours(x)
        assert found.dtype is expected.dtype
        torch.testing.assert_close(found, expected)
    assert len(compiled) == 2


def test_autocast_within_the_model(compiled: list[Any]) -> None:
    def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = x @ x
        return y, x @ x

    found = through_fxopt(Function(forward))(torch.eye(3))
    assert [one.dtype for one in found] == [torch.bfloat16, torch.float32] and len(compiled) == 1


def test_inference_mode(compiled: list[Any]) -> None:
    model, x = Net().eval(), images()
    ours = through_fxopt(model)
    with torch.inference_mode():
        same(ours(x), model(x))
        model.head.bias.data = torch.ones(2)  # an inference tensor
        same(ours(x), model(x))
        same(ours(x[:, :, ::2]), model(x[:, :, ::2]))
    same(ours(x), model(x))
    assert len(compiled) >= 2


def test_random_numbers_are_pytorchs(compiled: list[Any]) -> None:
    model = Function(lambda x: F.dropout(x, 0.5, True) + torch.rand_like(x))
    ours, x = through_fxopt(model), torch.randn(3, 4)
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected, after = model(x), torch.rand(1)
        torch.manual_seed(seed)
        same(ours(x), expected)
        assert torch.equal(torch.rand(1), after)  # compiling drew none either
    assert len(compiled) == 1


# -- what changes between calls --------------------------------------------------------------------


def sgd(model: nn.Module) -> None:
    with torch.enable_grad():
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model(images()).square().sum().backward()
        optimizer.step()


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "load_state_dict": lambda model: model.load_state_dict(noisier(model)),
    "optimizer step": sgd,
    "in place": lambda model: model.head.weight.mul_(3),
    "another tensor": lambda model: setattr(model.head, "bias", nn.Parameter(torch.ones(2))),
    "its data": lambda model: setattr(model.head.weight, "data", torch.ones(2, 4)),
    "statistics": lambda model: model.bn.running_mean.add_(1),
}


def noisier(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value + 0.5 for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", CHANGES)
def test_new_weights_are_seen(compiled: list[Any], name: str) -> None:
    model, x = Net().eval(), images()
    ours = through_fxopt(model)
    before = ours(x)
    CHANGES[name](model)
    same(ours(x), model(x))
    assert (ours(x) - before).abs().max() > 1e-3  # it was a change
    assert len(compiled) == 2


def test_instances_that_share_their_code_have_their_own_weights(compiled: list[Any]) -> None:
    model = nn.Sequential(*(Broken() for _ in range(3)))
    ours, x = through_fxopt(model), torch.randn(2, 4)
    for _ in range(2):
        same(ours(x), model(x))
    assert len(compiled) == 4  # three linear layers, and what follows the break


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        torch._dynamo.graph_break()
        return y.relu()


class Memory(nn.Module):
    """A buffer that is written to, read behind a graph break, and handed out."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> Any:
        self.calls += 1
        torch._dynamo.graph_break()
        return x * self.calls, self.calls


def test_state_is_written_where_the_model_has_it(compiled: list[Any]) -> None:
    model, twin, x = Memory(), Memory(), torch.ones(2)
    held, ours = model.calls, through_fxopt(model)
    for turn in range(5):
        found = ours(x)
        same(found, twin(x))
        assert found[1] is model.calls is held and held[0] == turn + 1
    assert len(compiled) == 4  # each twice: what turned out to be state is an input then


def test_an_input_that_is_written_to(compiled: list[Any]) -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        return x.sum() + x[0]

    ours, x = through_fxopt(forward), torch.ones(3)
    same(ours(x), torch.tensor(8.0))
    same(x, torch.full((3,), 2.0))
    same(ours(x), torch.tensor(16.0))
    assert len(compiled) == 1


def test_a_view_of_what_is_written_is_refused(compiled: list[Any], caplog: Any) -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        return x[1:]

    with pytest.raises(Exception, match=r"view of 'l_x_', which the graph writes to"):
        through_fxopt(forward)(torch.ones(3))
    torch._dynamo.reset()
    x = torch.ones(3)
    with caplog.at_level(logging.WARNING, "fxopt"):
        found = through_fxopt(forward, fallback=True)(x)
    x[1] = 7
    assert found[0] == 7 and "PyTorch runs it as it is" in caplog.text


def test_training_mode_under_no_grad(compiled: list[Any]) -> None:
    model = Net()
    twin, x = copy.deepcopy(model), images()
    ours = through_fxopt(model)
    for _ in range(2):
        same(ours(x), twin(x))
        same(model.state_dict(), twin.state_dict())
    assert compiled


# -- gradients -------------------------------------------------------------------------------------


def test_gradients_are_left_to_pytorch_with_a_warning(compiled: list[Any], caplog: Any) -> None:
    model, x = Net().eval(), images()
    ours = through_fxopt(model)
    with torch.enable_grad(), caplog.at_level(logging.WARNING, "fxopt"):
        ours(x).sum().backward()
    assert "needs gradients" in caplog.text and model.conv.weight.grad is not None
    same(ours(x), model(x))
    assert len(compiled) == 1  # under no_grad
    with torch.enable_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        same(ours(x), model(x))
    assert len(compiled) == 2


def test_gradients_may_be_refused(compiled: list[Any]) -> None:
    with torch.enable_grad(), pytest.raises(Exception, match="needs gradients, and fxopt compiles"):
        through_fxopt(Net().eval(), training="refuse")(images())
    assert not compiled


# -- limits, threads, options ----------------------------------------------------------------------


def test_after_many_changes_pytorch_runs_the_graph(compiled: list[Any], caplog: Any) -> None:
    model, x = nn.Linear(4, 2), torch.randn(3, 4)
    ours = through_fxopt(model, variants=2)
    with caplog.at_level(logging.WARNING, "fxopt"):
        for _ in range(5):
            same(ours(x), model(x))
            model.weight.mul_(1.5)
    assert len(compiled) == 2
    assert caplog.text.count("was compiled 2 times") == 1


def test_two_threads(compiled: list[Any]) -> None:
    model = Net().eval()
    ours, failures = through_fxopt(model, dynamic=True), []

    def work(batch: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(20):
                    x = torch.randn(batch, 3, 8, 8)
                    same(ours(x), model(x))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(batch,)) for batch in (2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and compiled


@pytest.mark.parametrize(("options", "words"), [
    ({"backend": "onyx"}, "Did you mean 'onnx'"),
    ({"opset": 20}, "option for 'eager'"),
    ({"backend": "onnx", "opset": 3}, "opset=3 is not possible"),
    ({"precision": "bf16"}, "torch.autocast"),
    ({"dynamic_shapes": {0: "n"}}, "dynamic="),
    ({"training": "maybe"}, "training"),
    ({"fallback": 1}, "True or False"),
    ({"variants": 0}, "positive integer"),
    ({"passes": ["fuse-nothing"]}, "Unknown pass"),
    ({"passes": "default"}, "takes a list"),
    ({"verify": "often"}, "verify"),
], ids=str)  # fmt: skip
def test_options_are_checked(compiled: list[Any], options: dict[str, Any], words: str) -> None:
    graph = torch.fx.symbolic_trace(nn.ReLU())
    with pytest.raises(OptionError, match=words):
        fxopt.torch_compile_backend(graph, [torch.ones(1)], options=options)
    assert not compiled


def test_modes_are_inductors() -> None:
    with pytest.raises(OptionError, match="belongs to Inductor"):
        fxopt.torch_compile_backend(
            torch.fx.symbolic_trace(nn.ReLU()), [torch.ones(1)], mode="max-autotune"
        )


def test_a_graph_that_a_backend_refuses(compiled: list[Any], caplog: Any) -> None:
    model, x = Memory(), torch.ones(2)
    with pytest.raises(Exception, match="an ONNX model keeps no state"):
        through_fxopt(model, backend="onnx")(x)
    torch._dynamo.reset()
    with caplog.at_level(logging.WARNING, "fxopt"):
        same(through_fxopt(Memory(), backend="onnx", fallback=True)(x), (x, torch.ones(2)))
    assert "cannot be compiled" in caplog.text
