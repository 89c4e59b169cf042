"""The checker finds each broken invariant; `retarget` moves everything, or says what it cannot."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import fxopt
from fxopt import dialect
from fxopt.inputs import as_inputs
from fxopt.testing import relative_error
from tests.test_capture import Model, looped, nested_cond

aten = torch.ops.aten
X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Example(nn.Module):
    """A call, a constant, state and a branch: something to break of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        y = torch.cond(x.sum() > 0, lambda x: x.sin() + 1, lambda x: x.cos(), (x,))
        return self.fc(y).relu() + self.count


def call(graph: fxopt.GraphModule, target: Any) -> fx.Node:
    return graph.find(target)[0]


def append(graph: fxopt.GraphModule, target: Any, *args: Any, op: str = "call_function") -> fx.Node:
    """Add a node before the output, with a value, as a careless pass would."""
    with graph.graph.inserting_before(graph.output_node):
        node = graph.graph.create_node(op, target, args)
    node.meta["val"] = call(graph, aten.relu.default).meta["val"]
    return node


def use_before_definition(graph: fxopt.GraphModule) -> None:
    relu = call(graph, aten.relu.default)
    call(graph, aten.linear.default).append(relu)
    relu.append(call(graph, aten.linear.default))


def late_input(graph: fxopt.GraphModule) -> None:
    call(graph, aten.relu.default).append(graph.placeholders[0])
    graph.placeholders[0].replace_all_uses_with(call(graph, aten.relu.default))


def second_node_of_a_constant(graph: fxopt.GraphModule) -> None:
    append(graph, "fc.weight", op="get_attr").meta["val"] = graph.graph.find_nodes(
        op="get_attr", target="fc.weight"
    )[0].meta["val"]


def misspelled(graph: fxopt.GraphModule) -> None:
    relu = call(graph, aten.relu.default)
    append(graph, aten.permute.default, relu, [-1, 0]).target = aten.t.default


def incomplete(graph: fxopt.GraphModule) -> None:
    append(graph, aten.add.Tensor, call(graph, aten.relu.default), 1)


def other_dtype(graph: fxopt.GraphModule) -> None:
    graph.set_constant("fc.weight", nn.Parameter(torch.zeros(4, 4, dtype=torch.float64)))


def no_tuple(graph: fxopt.GraphModule) -> None:
    graph.output_node.args = (list(graph.output_node.args[0]),)


def in_a_branch(graph: fxopt.GraphModule) -> None:
    branch = next(iter(graph.subgraphs()))
    branch.find(aten.sin.default)[0].target = aten.sin_.default


def write_to_a_weight(graph: fxopt.GraphModule) -> None:
    weight = graph.graph.find_nodes(op="get_attr", target="fc.weight")[0]
    append(graph, aten.copy_.default, weight, weight, False)


def read_after_the_write_back(graph: fxopt.GraphModule) -> None:
    append(graph, aten.relu.default, call(graph, aten.linear.default))


BREAKS: list[tuple[Callable[[fxopt.GraphModule], Any], str]] = [
    (use_before_definition, "relu uses linear before it is defined"),
    (late_input, "input x stands behind a call"),
    (lambda g: append(g, "relu", g.placeholders[0], op="call_method"), "is a call_method"),
    (lambda g: append(g, "fc", g.placeholders[0], op="call_module"), "is a call_module"),
    (lambda g: append(g, F.relu, g.placeholders[0]), "which is not an operator"),
    (lambda g: append(g, "nowhere", op="get_attr"), "constant 'nowhere', which does not exist"),
    (lambda g: append(g, operator.getitem, g.placeholders[0], 0), "indexes a tensor; that"),
    (second_node_of_a_constant, "both stand for the constant 'fc.weight'"),
    (lambda g: append(g, aten.relu_.default, g.placeholders[0]), "is in place: aten.relu_.default"),
    (write_to_a_weight, "writes to 'fc.weight', which is not state"),
    (
        lambda g: append(g, aten.copy_.default, *[call(g, aten.relu.default)] * 2, False),
        "writes to relu, which is neither state nor an input",
    ),
    (read_after_the_write_back, "stands behind the state's write-back"),
    (misspelled, "whose canonical form is aten.permute.default"),
    (incomplete, "whose canonical form is aten.add.Tensor"),
    (lambda g: call(g, aten.relu.default).meta.pop("val"), "relu has no value"),
    (other_dtype, "constant 'fc.weight' is not what its node says"),
    (no_tuple, "the output must be a tuple"),
    (in_a_branch, "in a sub-graph: sin is in place"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), BREAKS)
def test_each_broken_invariant_is_found(damage: Callable[..., Any], message: str) -> None:
    graph = fxopt.capture(Example(), X)
    dialect.check(graph)
    damage(graph)
    with pytest.raises(fxopt.DialectError) as caught:
        dialect.check(graph)
    assert message in str(caught.value)


def test_many_problems_are_counted() -> None:
    graph = fxopt.capture(Model(lambda self, x: [x + i for i in range(30)]), X)
    for node in graph.find(aten.add.Tensor):
        del node.meta["val"]
    with pytest.raises(fxopt.DialectError, match="and 20 more"):
        dialect.check(graph)


# -- retarget --------------------------------------------------------------------------------------


def factories(self: Any, x: Any) -> Any:
    made = [
        torch.arange(4, dtype=x.dtype), torch.zeros(4, dtype=x.dtype), torch.ones_like(x),
        torch.linspace(0, 1, 4, dtype=x.dtype), torch.full((4,), 2.0, dtype=x.dtype),
        torch.eye(4, dtype=x.dtype), x.new_zeros(2), torch.tensor([1.5, 2.5], dtype=x.dtype),
        torch.hann_window(4, dtype=x.dtype), torch.scalar_tensor(2.0, dtype=x.dtype),
    ]  # fmt: skip
    return made, x.softmax(0, dtype=x.dtype), x.sum(dtype=x.dtype), x > 0, x.long()


def state(self: Any, x: Any) -> Any:
    self.sum.add_(x.sum(0))
    x.mul_(2)
    return x + self.sum


INDEX = torch.tensor([0, 2])
MOVED: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "layers": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.GELU()), (X,)),
    "factories": (lambda: Model(factories), (X,)),
    "state and written inputs": (lambda: Model(state, sum=torch.zeros(4)), (X,)),
    "integers": (
        lambda: Model(lambda self, x, i: x[i] + self.b, b=torch.arange(4)), (X, INDEX)
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4)), (INDEX,)),
    "recurrent": (lambda: nn.LSTM(4, 5), (X[None],)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (X[None],)),
    "branches": (lambda: Model(nested_cond, layer=nn.Linear(4, 4)), (X + 2,)),
    "a loop": (lambda: Model(looped, layer=nn.Linear(4, 4)), (X,)),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.bfloat16, 0.05)])
def test_retarget_is_the_model_in_that_dtype(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    make, inputs = MOVED[name]
    model = make().eval()
    graph = fxopt.capture(model, inputs)
    moved = dialect.retarget(graph, dtype=dtype)
    dialect.check(moved)
    cast = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    call = as_inputs(tuple(x.clone() for x in cast))
    with torch.no_grad():
        expected = model.to(dtype)(*[x.clone() for x in cast])
        error = relative_error(moved(*call.args), expected)
    assert error <= tolerance
    assert [x.dtype for x in moved.info.example_inputs] == [x.dtype for x in cast]


def test_retarget_leaves_the_graph_and_the_model_as_they_are() -> None:
    model = nn.Linear(4, 4)
    graph = fxopt.capture(model, X, dynamic_shapes={0: "n"})
    moved = dialect.retarget(graph, dtype=torch.float64)
    assert model.weight.dtype == graph.weight.dtype == graph(X).dtype == torch.float32
    assert moved(torch.randn(7, 4, dtype=torch.float64)).shape == (7, 4)
    with pytest.raises(fxopt.ShapeError, match="has dtype torch.float32, captured with"):
        moved(X)


@pytest.mark.parametrize("method", ["half", "double", "bfloat16"])
def test_methods_that_know_no_nodes_are_refused_before_any_change(method: str) -> None:
    graph = fxopt.capture(model := MOVED["branches"][0](), MOVED["branches"][1])
    with pytest.raises(fxopt.FxoptError, match="retarget"):
        getattr(graph, method)()
    assert {x.dtype for x in [*graph.parameters(), *model.parameters()]} == {torch.float32}


def test_a_graph_can_change_its_memory_format() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    graph = fxopt.capture(model, torch.randn(1, 3, 8, 8))
    before = graph(x := torch.randn(1, 3, 8, 8))
    assert graph.to("cpu").float() is graph
    graph.to(memory_format=torch.channels_last)
    weight = graph.get_parameter("0.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight.is_contiguous()
    assert relative_error(graph(x.contiguous(memory_format=torch.channels_last)), before) < 1e-6


def test_casts_inside_become_casts_to_the_new_dtype() -> None:
    model = Model(lambda self, x: (x.half().float() * 2, x.to(torch.int32)))
    moved = dialect.retarget(fxopt.capture(model, X), dtype=torch.float64)
    assert [out.dtype for out in moved(X.double())] == [torch.float64, torch.int32]
    assert relative_error(moved(X.double())[0], X.double() * 2) == 0  # no rounding to half is left


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"dtype": torch.int8}, "not to torch.int8"),
        ({"dtype": torch.complex64}, "not to torch.complex64"),
        ({"dtype": "float64"}, "not to 'float64'"),
        ({"device": "nonsense"}, "'nonsense' cannot be used here"),
        ({"device": "meta"}, "its weights would be lost"),
    ],
)
def test_retarget_refuses_what_it_cannot_do(options: dict[str, Any], part: str) -> None:
    with pytest.raises(fxopt.OptionError) as caught:
        dialect.retarget(fxopt.capture(nn.Linear(4, 4), X), **options)
    assert part in str(caught.value)
