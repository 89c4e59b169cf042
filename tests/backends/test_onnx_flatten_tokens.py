"""flatten-tokens: which calls become matrices, which must not, and that the numbers stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxopt.backends.onnx import Onnx
from fxopt.backends.onnx.flatten_tokens import FlattenTokens
from fxopt.capture import capture
from fxopt.compile import compile
from fxopt.graph_module import GraphModule
from fxopt.passes.expand_attention import ExpandAttention
from fxopt.rewrite import fuel
from fxopt.shapes import rank_of
from fxopt.testing import check_pass, noisy, relative_error

WIDE = 8
aten = torch.ops.aten


class Calls(nn.Module):
    """A model made of named layers and a function of them and the inputs."""

    def __init__(self, call: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.call(self, *inputs)


def mlp(call: Callable[..., Any], **layers: nn.Module) -> Calls:
    """A model that has two linear layers, a and b, beside others."""
    return Calls(call, a=nn.Linear(WIDE, WIDE), b=nn.Linear(WIDE, WIDE), **layers)


def tokens(*leading: int) -> torch.Tensor:
    return torch.randn(*(leading or (2, 5)), WIDE)


def ranks(graph: GraphModule, *targets: Any) -> list[int]:
    return [rank_of(node.args[0]) for node in graph.find(*(targets or (aten.linear.default,)))]


def onnx_nodes(model: nn.Module, inputs: Any, **options: Any) -> tuple[int, int]:
    """How many ONNX nodes a model has without this pass and with it."""
    graph = capture(noisy(model.eval()), inputs, **options)
    ExpandAttention().run(graph)  # as the backend does
    plain = sum(Onnx().lower(graph.copy()).op_counts().values())
    FlattenTokens().run(graph)
    return plain, sum(Onnx().lower(graph).op_counts().values())


# -- runs that become matrices ---------------------------------------------------------------------

RUNS: dict[str, tuple[nn.Module, int]] = {  # how many reshapes there are afterwards
    "two layers": (mlp(lambda m, x: m.b(F.gelu(m.a(x))) + x), 2),
    "a norm": (mlp(lambda m, x: m.b(m.n(m.a(x))).relu() * 2, n=nn.LayerNorm(WIDE)), 2),
    "a norm of the root mean square": (
        mlp(lambda m, x: m.b(m.n(m.a(x))) + 1, n=nn.RMSNorm(WIDE)), 2
    ),
    "softmax over the features": (mlp(lambda m, x: m.b(m.a(x).softmax(-1)) + x), 2),
    "the mean of the features": (
        mlp(lambda m, x: m.b(m.a(x) - m.a(x).mean(-1, keepdim=True)) + x), 2
    ),
    "parts of the features": (
        mlp(lambda m, x: m.b(torch.cat([*m.a(x).split([3, 5], -1)][::-1], -1)) + x), 2
    ),
    "a gate": (Calls(lambda m, x: m.b(F.glu(m.a(x), -1)) + x, a=nn.Linear(8, 16),
                     b=nn.Linear(8, 8)), 2),
    "a slice of the features": (
        Calls(lambda m, x: m.b(m.a(x)[..., 2:6]) + x, a=nn.Linear(8, 8), b=nn.Linear(4, 8)), 2
    ),
    "one number per feature": (mlp(lambda m, x: m.b(m.a(x) * m.a.bias) + x), 2),
    "one number for all": (mlp(lambda m, x: m.b(m.a(x) * x.max()) + x), 2),
    "dropout": (mlp(lambda m, x: m.b(m.d(m.a(x))) + x, d=nn.Dropout()), 2),
    "a cast": (mlp(lambda m, x: m.b(m.a(x).float().double()) + x), 2),
    "a layer called twice": (mlp(lambda m, x: m.a(m.a(x)) + x), 2),
    "three layers and two outputs": (mlp(lambda m, x: (m.b(y := m.a(x)), m.b(y.relu()))), 3),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_layers_computes_on_matrices(name: str) -> None:
    model, reshapes = RUNS[name]
    graph, _ = check_pass(
        FlattenTokens(), model, tokens(), before={"reshape": 0}, after={"reshape": reshapes},
        rewrites=1, tolerance=1e-6 if "cast" in name else 1e-10,
    )  # fmt: skip
    assert set(ranks(graph)) == {2}


@pytest.mark.parametrize("leading", [(5, 1), (1, 1), (2, 3, 4), (1, 2, 3, 4)])
def test_tokens_may_have_any_number_of_leading_dimensions(leading: tuple[int, ...]) -> None:
    model = mlp(lambda m, x: m.b(F.gelu(m.a(x))) + x)
    graph, _ = check_pass(FlattenTokens(), model, tokens(*leading), rewrites=1)
    assert ranks(graph) == [2, 2]


def test_reshapes_that_are_there_anyway_serve_as_borders() -> None:
    def attend(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).reshape(2, 5, 2, 4).transpose(1, 2) for f in (m.a, m.b, m.c))
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + m.d(heads.reshape(2, 5, WIDE))

    layers = {name: nn.Linear(WIDE, WIDE) for name in "cd"}
    model = mlp(attend, **layers)
    # one Reshape comes in, one goes out, and four Adds are gone
    graph, _ = check_pass(FlattenTokens(), model, tokens(), before={"reshape": 4},
                          after={"reshape": 6}, rewrites=2)  # fmt: skip
    assert ranks(graph) == [2, 2, 2, 2]
    plain, flat = onnx_nodes(model, tokens())
    assert flat == plain - 2


def test_a_reshape_between_leading_dimensions_vanishes() -> None:
    model = mlp(lambda m, x: m.b(m.a(x).reshape(2, 15, WIDE)).relu())
    graph, _ = check_pass(
        FlattenTokens(), model, tokens(2, 3, 5), before={"reshape": 1}, after={"reshape": 2}
    )
    assert ranks(graph) == [2, 2]


def test_matrices_that_come_in_and_go_out_need_no_reshape() -> None:
    model = mlp(lambda m, x: m.b(m.a(x.reshape(2, 5, WIDE)).relu()).reshape(10, WIDE))
    check_pass(FlattenTokens(), model, tokens(10), before={"reshape": 2}, after={"reshape": 0})


@pytest.mark.parametrize("early", [True, False])
def test_a_matrix_that_is_there_already_serves_as_well(early: bool) -> None:
    def call(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.cumsum(1)
        first = y.reshape(10, WIDE).cumsum(0) if early else None
        z = m.b(m.a(y).relu()) + y
        return z.relu(), y.reshape(10, WIDE).cumsum(0) if first is None else first

    check_pass(FlattenTokens(), mlp(call), tokens(), before={"reshape": 1}, after={"reshape": 2})


def test_a_matrix_that_is_made_and_taken_apart_again() -> None:
    def call(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.cumsum(0)
        z = F.gelu(y) + y.reshape(10, WIDE).reshape(2, 5, WIDE)
        w = m.a(z)
        return m.b(w), w + w.mean(0, keepdim=True)

    graph, _ = check_pass(FlattenTokens(), mlp(call), tokens(), before={"reshape": 2},
                          after={"reshape": 3, "gelu": 1, "linear": 2})  # fmt: skip
    assert ranks(graph) == [2, 2]


def test_what_nobody_needs_is_not_computed_once_more() -> None:
    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.b(F.gelu(m.a(x)))
        m.a(y).relu()
        return y.relu()

    check_pass(FlattenTokens(), mlp(call), tokens(), before={"linear": 3}, after={"linear": 3})


def test_a_reshape_that_others_read_too_stays_for_them() -> None:
    def call(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.reshape(2, 5, WIDE)
        return m.b(m.a(y).relu()).relu().reshape(2, 5, 2, 4), y.mean(1)

    graph, _ = check_pass(FlattenTokens(), mlp(call), torch.randn(2, 5, 2, 4), rewrites=1)
    assert ranks(graph) == [2, 2]


def test_transpositions_of_a_dimension_of_size_one_are_reshapes() -> None:
    model = mlp(lambda m, x: m.b(m.a(x).relu().transpose(0, 1)).transpose(0, 1) + x)
    check_pass(FlattenTokens(), model, tokens(1, 5), before={"permute": 2},
               after={"permute": 0, "reshape": 2})  # fmt: skip
    check_pass(FlattenTokens(), model, tokens(2, 5), rewrites=0)


def test_heads_of_their_own_layers_are_the_same_run() -> None:
    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.b(F.gelu(m.a(x))).reshape(2, 5, 2, 4)
        return m.d(F.gelu(m.c(y))).relu()

    model = mlp(call, c=nn.Linear(4, 4), d=nn.Linear(4, 4))
    graph, _ = check_pass(FlattenTokens(), model, tokens(), rewrites=1, before={"linear": 4},
                          after={"linear": 4, "reshape": 3, "gelu": 2})  # fmt: skip
    assert ranks(graph) == [2, 2, 2, 2]


def test_a_memory_layout_is_a_border() -> None:
    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x).relu().clone(memory_format=torch.channels_last)
        return m.b(F.gelu(m.a(y))).relu()

    graph, _ = check_pass(FlattenTokens(), mlp(call), tokens(2, 3, 5), rewrites=1)
    assert sorted(ranks(graph)) == [2, 2, 4]


def test_positions_are_added_to_the_matrix_where_there_is_one_picture() -> None:
    class Positions(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE)
            self.p = nn.Parameter(torch.randn(*shape, WIDE))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b((self.a(x) + self.p).relu()).relu()

    one = tokens(1, 5)
    for shape in ((1, 5), (5,), (1, 1)):
        graph, _ = check_pass(FlattenTokens(), Positions(*shape), one, after={"reshape": 2})
        assert ranks(graph) == [2, 2]
    graph, _ = check_pass(FlattenTokens(), Positions(1, 5), tokens(2, 5), rewrites=0)
    assert ranks(graph) == [3, 3]


def test_half_precision_stays_half() -> None:
    model = mlp(lambda m, x: m.b(F.gelu(m.a(x))) + x).half()
    graph, _ = check_pass(
        FlattenTokens(), model, tokens().half(), double=False, tolerance=1e-2, gradients=False,
        rewrites=1,
    )  # fmt: skip
    assert {n.meta["val"].dtype for n in graph.find(aten.linear.default)} == {torch.float16}


# -- symbolic sizes --------------------------------------------------------------------------------


def test_one_symbolic_size_costs_nothing() -> None:
    model = mlp(lambda m, x: m.b(F.gelu(m.a(x))) + x)
    graph, _ = check_pass(
        FlattenTokens(), model, tokens(), rewrites=1, dynamic_shapes={0: "batch"}
    )
    assert ranks(graph) == [2, 2]
    plain, flat = onnx_nodes(model, (tokens(),), dynamic_shapes={0: "batch"})
    assert flat <= plain
    compiled = compile(model, (tokens(),), backend="onnx", dynamic_shapes={0: "batch"})
    for size in (1, 3, 7):
        x = tokens(size, 5)
        assert relative_error(compiled(x), model(x)) < 1e-5


def test_several_symbolic_sizes_are_taken_from_an_input_where_that_pays() -> None:
    both = {0: "batch", 1: "length"}

    def few(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.b(F.gelu(m.a(x))) + x

    def many(m: Any, x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = m.b(F.gelu(m.a(x))) + x
        return x

    check_pass(FlattenTokens(), mlp(few), tokens(), rewrites=0, dynamic_shapes=both)
    graph, _ = check_pass(FlattenTokens(), mlp(many), tokens(), rewrites=1, dynamic_shapes=both)
    assert set(ranks(graph)) == {2}
    plain, flat = onnx_nodes(mlp(many), (tokens(),), dynamic_shapes=both)
    assert flat < plain
    model = noisy(mlp(many).eval())
    compiled = compile(model, (tokens(),), backend="onnx", dynamic_shapes=both)
    for leading in ((1, 1), (3, 2), (4, 9)):
        x = tokens(*leading)
        assert relative_error(compiled(x), model(x)) < 1e-5


def test_sizes_that_only_the_data_knows() -> None:
    model = mlp(lambda m, x: m.b(F.gelu(m.a(x[x.sum((1, 2)) > 0]))))
    graph = capture(model.eval(), (tokens(6, 5),))
    FlattenTokens().run(graph)
    x = tokens(6, 5)
    assert relative_error(graph(x), model(x)) < 1e-5


# -- what stays ------------------------------------------------------------------------------------

LEFT_ALONE: dict[str, nn.Module] = {
    "one layer": mlp(lambda m, x: m.a(x)),
    "layers without bias": Calls(
        lambda m, x: m.b(F.gelu(m.a(x))), a=nn.Linear(8, 8, bias=False),
        b=nn.Linear(8, 8, bias=False),
    ),
    "no layer": Calls(lambda m, x: F.gelu(m.n(x)), n=nn.LayerNorm(WIDE)),
    "a sum over tokens between": mlp(lambda m, x: m.b(m.a(x) + m.a(x).mean(1, keepdim=True))),
    "a norm over tokens and features": mlp(
        lambda m, x: m.b(m.n(m.a(x))), n=nn.LayerNorm([5, WIDE])
    ),
    "a softmax over tokens": mlp(lambda m, x: m.b(m.a(x).softmax(1))),
    "a slope per token": Calls(
        lambda m, x: m.b(m.p(m.a(x))), a=nn.Linear(8, 8), b=nn.Linear(8, 8), p=nn.PReLU(5)
    ),
    "a product of tokens": mlp(lambda m, x: m.b(m.a(x) @ m.a(x).transpose(1, 2) @ m.a(x))),
    "matrices": mlp(lambda m, x: m.b(m.a(x[0]).relu())),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_would_need_more_nodes_stays(name: str) -> None:
    check_pass(FlattenTokens(), LEFT_ALONE[name], tokens(), rewrites=0)


def test_a_dropout_that_draws_stays_a_border() -> None:
    model = mlp(lambda m, x: m.b(m.d(m.a(x))), d=nn.Dropout())
    graph = capture(model.eval(), (tokens(),))
    graph.train()
    assert not FlattenTokens().run(graph).modified


def test_without_fuel_nothing_changes() -> None:
    graph = capture(mlp(lambda m, x: m.b(F.gelu(m.a(x))) + x).eval(), (tokens(),))
    text = str(graph)
    with fuel(0):
        result = FlattenTokens().run(graph)
    assert not result.modified and str(graph) == text


def test_symbolic_sizes_of_runs_that_are_not_connected() -> None:
    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            for _ in range(4):
                x = m.b(F.gelu(m.a(x))) + x
            x = x.cumsum(1)
        return x

    both = {0: "batch", 1: "length"}
    graph, _ = check_pass(FlattenTokens(), mlp(call), tokens(), rewrites=2, dynamic_shapes=both)
    assert set(ranks(graph)) == {2}
    graph = capture(mlp(call).eval(), (tokens(),), dynamic_shapes=both)
    with fuel(1):
        assert FlattenTokens().run(graph).rewrites == 1
    assert sorted(set(ranks(graph))) == [2, 3]


def test_runs_that_are_not_connected_are_rewrites_of_their_own() -> None:
    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = m.b(F.gelu(m.a(x))).cumsum(1)
        return m.a(x)

    graph, _ = check_pass(FlattenTokens(), mlp(call), tokens(), rewrites=2)
    assert ranks(graph) == [2, 2, 2, 2, 3]


def test_a_weight_of_matrices_and_tokens_is_stored_once_and_not_transposed_at_run_time() -> None:
    model = mlp(lambda m, x: m.a(m.b(F.gelu(m.a(x))).relu().cumsum(1)))
    graph = capture(noisy(model.eval()), (tokens(),))
    FlattenTokens().run(graph)
    assert ranks(graph) == [2, 2, 3]
    executable = Onnx().lower(graph)
    assert "Transpose" not in executable.op_counts()
    stored = [v for v in executable.ir_model.graph.initializers.values() if len(v.shape) == 2]
    assert len(stored) == 2
    x = tokens()
    assert relative_error(executable.run(x)[0], model(x)) < 1e-5


@pytest.mark.parametrize("leading", [(1, 6), (2, 6)])
def test_a_transformer_has_fewer_nodes_and_the_same_numbers(leading: tuple[int, int]) -> None:
    layer = nn.TransformerEncoderLayer(WIDE, 2, 16, batch_first=True, norm_first=True)
    model = noisy(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval())
    x = tokens(*leading)
    compiled = compile(model, x, backend="onnx")
    assert relative_error(compiled(x), model(x)) < 1e-5
    assert compiled.executable.op_counts()["Gemm"] == len(compiled.graph.find(aten.linear.default))
