"""Capture: from whatever counts as a model to a graph that computes what it computes."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fxopt
from fxopt.inputs import as_inputs
from fxopt.testing import relative_error

aten = torch.ops.aten
X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Model(nn.Module):
    """A model whose forward is a function of itself, with the given parts."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            is_buffer = isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter)
            self.register_buffer(name, part) if is_buffer else setattr(self, name, part)
        self.forward = function.__get__(self)


def same(model: nn.Module, inputs: Any, **options: Any) -> fxopt.GraphModule:
    """Capture and optimize, and compare both with the model: structure and numbers, twice."""
    model.eval()
    graph = fxopt.capture(model, copy.deepcopy(inputs), **options)
    fxopt.dialect.check(graph)
    for tried in (graph, fxopt.optimize(graph)):
        eager = copy.deepcopy(model)
        for _ in range(2):
            ours, theirs = as_inputs(copy.deepcopy(inputs)), as_inputs(copy.deepcopy(inputs))
            with torch.no_grad():
                found = tried(*ours.args, **ours.kwargs)
                expected = eager(*theirs.args, **theirs.kwargs)
            assert type(found) is type(expected)
            bound = 1e-6 if tried is graph else max(1e-6, _rounding(found))
            assert relative_error(found, expected) <= bound, graph
    return graph


def _rounding(outputs: Any) -> float:
    """The coarsest rounding among the outputs: two layers that become one round elsewhere."""
    tensors = [t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]
    return max((torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()), default=0.0)


# -- what goes in and comes out -------------------------------------------------------------------


class Pair(NamedTuple):
    p: Any
    q: Any


@dataclass
class Record:
    p: Any
    q: Any = None


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: x,
        lambda self, x: None,
        lambda self, x: 3,
        lambda self, x: (),
        lambda self, x: torch.ones(3),
        lambda self, x: (x, x, x + 1, None, 5, "text", 2.5, True),
        lambda self, x: (x.shape[0], x.sum()),
        lambda self, x: (self.w, self.w * 2),
        lambda self, x: (self.b, x, self.b),
        lambda self, x: {"b": x + 1, "a": [x, (x * 2,)]},
        lambda self, x: collections.OrderedDict(z=x, a=x + 1),
        lambda self, x: Pair(x, [x * 2]),
    ],
)
def test_outputs_of_any_structure_come_back(function: Callable[..., Any]) -> None:
    same(Model(function, w=nn.Parameter(torch.ones(2)), b=torch.zeros(2)), (X,))


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda self, x: x["a"] - x["b"], ({"a": X, "b": 2 * X},)),
        (lambda self, x: x["a"] - x["b"], (collections.OrderedDict(b=X, a=X),)),
        (lambda self, x: x.p + x.q[0], (Pair(X, [X]),)),
        (lambda self, *xs: sum(xs), (X, X, X)),
        (lambda self, a, *xs, **kw: a + sum(xs) - kw["z"], ((X, X), {"z": X})),
        (lambda self, x, *, y=None: x if y is None else x * y, (X,)),
        (lambda self, x, *, y=None: x if y is None else x * y, ((X,), {"y": X})),
        (lambda self, x, flag, n, mode, f: (x * n if flag else x) * f, (X, True, 3, "sum", 0.5)),
        (lambda self, x, mask=None: x if mask is None else x * mask, (X, None)),
        (lambda self: self.b * 2, ()),
    ],
)
def test_inputs_of_any_structure_go_in(function: Callable[..., Any], inputs: Any) -> None:
    same(Model(function, b=torch.ones(2)), inputs)


def test_dataclasses_need_no_registration() -> None:
    model = Model(lambda self, x: {"out": Record(x.p + 1, Record(x.q.p, None))})
    graph = fxopt.capture(model, (Record(X, Record(X, None)),))
    found = graph(Record(X, Record(2 * X, None)))["out"]
    assert isinstance(found, Record) and isinstance(found.q, Record)
    assert torch.equal(found.p, X + 1) and torch.equal(found.q.p, 2 * X) and found.q.q is None


def test_hugging_face_outputs_keep_their_class() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")

    def forward(self: Any, x: Any) -> Any:
        return outputs.BaseModelOutput(last_hidden_state=x + 1, hidden_states=(x, x))

    found = fxopt.capture(Model(forward), X)(X)
    assert isinstance(found, outputs.BaseModelOutput) and found.attentions is None
    assert torch.equal(found[0], X + 1)


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.int32, torch.bool],
)
def test_every_dtype_of_weights(dtype: torch.dtype) -> None:
    weight = (X * 3).to(dtype)
    same(Model(lambda self, x: torch.where(x > 0, self.w, self.w[0]), w=weight), (X,))


def test_tied_weights_are_one_constant_under_the_models_first_name() -> None:
    embedding, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(collections.OrderedDict(embedding=embedding, head=head))
    graph = same(model, (torch.tensor([0, 3]),))
    assert list(graph.constants()) == [name for name, _ in model.named_parameters()]
    assert graph.info.ties == {"embedding.weight": ("embedding.weight", "head.weight")}
    graph.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()})
    assert not graph(torch.tensor([1, 2])).any() and embedding.weight.any()


def test_names_that_python_or_the_graph_itself_uses() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("class", "graph", "meta", "a b", "ünï", "x-y", "0", "info", "_code"):
                self.register_buffer(name, torch.randn(4))
            self.add_module("lambda", nn.Linear(4, 4))

        def forward(self, torch: Any, operator: Any, graph: Any, input: Any) -> Any:
            for buffer in self._buffers.values():
                torch = torch + buffer
            return self._modules["lambda"](torch) + operator + graph + input

    same(Odd(), (X, X, X, X))


# -- what counts as a model -----------------------------------------------------------------------


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5))


def test_an_fx_graph_module_an_exported_program_and_a_graph_are_models() -> None:
    model = net().eval()
    expected = model(X)
    program = torch.export.export(model, (X,))
    graph = fxopt.capture(model, X)
    for one in (torch.fx.symbolic_trace(model), program, program.run_decompositions(), graph):
        assert relative_error(fxopt.capture(one, X)(X), expected) < 1e-6
    assert fxopt.capture(graph) is not graph
    assert fxopt.capture(torch.compile(model), X).info.state == graph.info.state


def test_what_was_captured_before_says_when_new_inputs_do_not_fit() -> None:
    graph = fxopt.capture(net(), X)
    with pytest.raises(fxopt.ShapeError, match="dimension 0 is 5"):
        fxopt.capture(graph, torch.randn(5, 4))
    with pytest.raises(fxopt.CaptureError, match="captured already"):
        fxopt.capture(torch.export.export(net().eval(), (X,)), dynamic_shapes={0: "n"})


def test_hooks_and_parametrizations_are_part_of_the_model() -> None:
    hooked = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    hooked[0].register_forward_hook(lambda module, args, out: out * 10)
    hooked.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    same(hooked, (X,))
    parametrize = nn.utils.parametrizations
    same(parametrize.weight_norm(nn.Linear(4, 4)), (X,))
    same(parametrize.spectral_norm(nn.Linear(4, 4)), (X,))


def test_nodes_know_their_module_and_source_line() -> None:
    class Inner(nn.Module):
        def forward(self, x: Any) -> Any:
            return x.relu()

    graph = fxopt.capture(nn.Sequential(nn.Linear(4, 4), Inner()), X)
    (linear,), (relu,) = graph.find(aten.linear.default), graph.find(aten.relu.default)
    assert linear.meta["path"] == "0" and linear.meta["module"].endswith("Linear")
    assert relu.meta["path"] == "1" and "test_capture.py" in relu.meta["source"]
    assert "x.relu()" in relu.meta["source"]


def test_a_very_deep_model() -> None:
    graph = fxopt.capture(nn.Sequential(*[nn.Identity() for _ in range(1500)], nn.ReLU()), X)
    copy.deepcopy(graph)
    assert torch.equal(graph(X), X.relu())


# -- regions and control flow ---------------------------------------------------------------------


def test_no_grad_regions_are_inlined_and_still_block_gradients() -> None:
    def forward(self: Any, x: Any) -> Any:
        with torch.no_grad():
            frozen = self.layer(x)
            frozen.add_(1)
            with torch.enable_grad():
                shift = x * 2
        return frozen * x + shift.detach()

    model = Model(forward, layer=nn.Linear(4, 4))
    graph = same(model, (X,))
    gradients = []
    for one in (model, copy.deepcopy(graph)):
        x = X.clone().requires_grad_()
        one(x).sum().backward()
        gradients.append(x.grad)
        assert all(p.grad is None for p in one.parameters())
    assert relative_error(*gradients) < 1e-6


def autocast(dtype: torch.dtype, function: Callable[..., Any], enabled: bool = True) -> Any:
    def forward(self: Any, x: Any) -> Any:
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            return function(self, x)

    return forward


PLAIN_PRODUCT = autocast(torch.float16, lambda self, x: x @ x.t(), enabled=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: self.layer(x),
        lambda self, x: self.layer(x).softmax(-1) + x,
        lambda self, x: torch.cat([self.layer(x), x]),
        lambda self, x: F.linear(self.layer(x), self.layer.weight.bfloat16(), self.layer.bias),
        lambda self, x: self.layer(x.double().float()).float() @ x.t(),
        lambda self, x: F.layer_norm(self.layer(x), (4,)) * x,
        lambda self, x: (x.double() @ x.double().t(), torch.where(x > 0, x, self.layer(x))),
        lambda self, x: F.scaled_dot_product_attention(x[None], self.layer(x)[None], x[None]),
        autocast(torch.float16, lambda self, x: self.layer(x)),
        autocast(torch.float16, lambda self, x: self.layer(x.float()), enabled=False),
        lambda self, x: self.layer(PLAIN_PRODUCT(self, x) @ x),
    ],
)
def test_autocast_becomes_explicit_casts(dtype: torch.dtype, function: Callable[..., Any]) -> None:
    same(Model(autocast(dtype, function), layer=nn.Linear(4, 4)), (X,))


def test_autocast_over_a_recurrent_layer_is_refused() -> None:
    model = Model(autocast(torch.bfloat16, lambda self, x: self.rnn(x)[0]), rnn=nn.LSTM(4, 5))
    with pytest.raises(fxopt.CaptureError, match="recurrent layer"):
        fxopt.capture(model, X[None])


def looped(self: Any, x: Any) -> Any:
    from torch._higher_order_ops.while_loop import while_loop

    return while_loop(
        lambda i, x: i < 3, lambda i, x: (i + 1, self.layer(x).relu()), (torch.tensor(0), x)
    )


def nested_cond(self: Any, x: Any) -> Any:
    def inner(x: Any) -> Any:
        return torch.cond(x[0, 0] > 0.5, lambda x: x.sin(), lambda x: self.layer(x), (x,))

    return torch.cond(x.sum() > 0, inner, lambda x: x * 2, (x,)).add_(1)


def writing_cond(self: Any, x: Any) -> Any:
    def branch(x: Any) -> Any:
        y = x.clone()
        y[0] = 1
        return y.relu_()

    return torch.cond(x.sum() > 0, branch, lambda x: x * 1, (x,))


def mapped(self: Any, x: Any) -> Any:
    from torch._higher_order_ops.map import map as map_

    return map_(lambda row: self.layer(row) + 1, x)


def scanned(self: Any, x: Any) -> Any:
    from torch._higher_order_ops.scan import scan

    return scan(lambda carry, row: (carry + row, carry * row), torch.zeros(4), x)


@pytest.mark.parametrize("function", [looped, nested_cond, writing_cond, mapped, scanned])
def test_control_flow_stays_one_node_over_dialect_subgraphs(function: Callable[..., Any]) -> None:
    model = Model(function, layer=nn.Linear(4, 4))
    for x in (X + 2, X - 2, X):
        graph = same(model, (x,))
        assert list(graph.subgraphs())
    other = copy.deepcopy(graph)
    assert relative_error(pytree.tree_leaves(other(X)), pytree.tree_leaves(graph(X))) == 0
