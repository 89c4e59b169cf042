"""The rewriter: what it records, what it refuses, and what it cleans up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

import fxopt
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Mend, Rewriter, fuel
from fxopt.text import graph_text

aten = torch.ops.aten


class Two(nn.Module):
    """Two linears with a relu between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu())


@pytest.fixture
def graph() -> GraphModule:
    return fxopt.capture(Two(), torch.randn(2, 4))


def test_insert_spells_canonically_and_knows_shape_and_provenance(graph: GraphModule) -> None:
    rewriter = Rewriter(graph)
    relu = graph.find(aten.relu.default)[0]
    node = rewriter.insert(aten.transpose.int, relu, -1, -2, before=relu.next, origin=relu)
    assert node.target is aten.permute.default and node.args[1] == [1, 0]
    assert tuple(node.meta["val"].shape) == (4, 2)
    assert node.meta["replaces"] == ("relu",)
    assert "self.b(self.a(x).relu())" in node.meta["source"]
    assert rewriter.insert(aten.squeeze.default, relu, before=relu.next) is relu


def test_replace_moves_users_and_erases_what_nobody_needs(graph: GraphModule) -> None:
    rewriter = Rewriter(graph)
    relu = graph.find(aten.relu.default)[0]
    tanh = rewriter.insert(aten.tanh.default, relu.args[0], before=relu)
    assert rewriter.replace(relu, tanh)
    result = rewriter.result()
    assert result.rewrites == 1 and result.modified
    assert result.created == ("tanh",) and result.erased == ("relu",)
    assert result.changed == ("linear_1",)
    assert result.origins == {"tanh": ("relu",)}
    fxopt.dialect.check(graph)


def test_a_node_that_uses_what_it_replaces_keeps_its_input(graph: GraphModule) -> None:
    rewriter = Rewriter(graph)
    relu = graph.find(aten.relu.default)[0]
    scaled = rewriter.insert(aten.mul.Tensor, relu, 2.0, before=relu.next)
    rewriter.replace(relu, scaled)
    rewriter.result()
    assert scaled.args[0] is relu and list(relu.users) == [scaled]
    fxopt.dialect.check(graph)


def test_replace_refuses_another_shape_or_dtype(graph: GraphModule) -> None:
    rewriter = Rewriter(graph)
    relu = graph.find(aten.relu.default)[0]
    other = rewriter.insert(aten.permute.default, relu.args[0], [1, 0], before=relu)
    with pytest.raises(ValueError, match=r"permute cannot replace relu: it is float32\[4, 2\]"):
        rewriter.replace(relu, other)
    half = rewriter.insert(aten.to.dtype, relu.args[0], torch.float16, before=relu)
    with pytest.raises(ValueError, match="float16"):
        rewriter.replace(relu, half)


def test_what_was_inserted_and_not_used_goes(graph: GraphModule) -> None:
    before = graph_text(graph)
    rewriter = Rewriter(graph)
    relu = graph.find(aten.relu.default)[0]
    weight = next(n for n in graph.graph.nodes if n.target == "a.weight")
    constant = rewriter.constant(lambda w: w * 2, [weight], name="a.doubled", before=relu)
    rewriter.insert(aten.linear.default, relu, constant, None, before=relu.next)
    result = rewriter.result()
    assert not result.modified
    assert graph_text(graph) == before and not graph.has_constant("a.doubled")


def test_update_changes_arguments_in_place(graph: GraphModule) -> None:
    rewriter = Rewriter(graph)
    linear = graph.find(aten.linear.default)[0]
    assert rewriter.update(linear, (*linear.args[:2], None))
    result = rewriter.result()
    assert result.changed == ("linear",) and result.erased == ("a_bias",)
    assert not graph.has_constant("a.bias")
    with pytest.raises(ValueError, match="shape or dtype"):
        Rewriter(graph).update(
            linear, (linear.args[0], graph.find(aten.linear.default)[1].args[1], None)
        )


def test_constants_are_registered_under_unique_names_and_remember(graph: GraphModule) -> None:
    rewriter = Rewriter(graph)
    weight = next(n for n in graph.graph.nodes if n.target == "a.weight")
    user = graph.find(aten.linear.default)[0]
    first = rewriter.constant(lambda w: w * 2, [weight], name="a.weight", before=user)
    second = rewriter.constant(lambda w: w, [weight], name="a.weight", before=user)
    assert (first.target, second.target) == ("a.weight_2", "a.weight_3")
    assert isinstance(graph.value(first), nn.Parameter)
    assert graph.value(second).data_ptr() != graph.value(weight).data_ptr()
    assert [r.name for r in graph.info.recipes] == ["a.weight_2", "a.weight_3"]
    frozen = rewriter.constant(lambda: torch.arange(3), [], name="index", before=user)
    assert not isinstance(graph.value(frozen), nn.Parameter)


def test_out_of_fuel_nothing_changes(graph: GraphModule) -> None:
    before = graph_text(graph)
    with fuel(0):
        rewriter = Rewriter(graph)
        relu = graph.find(aten.relu.default)[0]
        tanh = rewriter.insert(aten.tanh.default, relu.args[0], before=relu)
        assert not rewriter.replace(relu, tanh)
        assert rewriter.out_of_fuel
        assert not rewriter.result().modified
    assert graph_text(graph) == before


def test_effects_are_never_erased_with_a_cone() -> None:
    class Draws(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + torch.rand(3)).relu()

    graph = fxopt.capture(Draws(), torch.randn(3))
    rewriter = Rewriter(graph)
    relu = graph.find(aten.relu.default)[0]
    rewriter.replace(relu, rewriter.insert(aten.tanh.default, graph.placeholders[0], before=relu))
    result = rewriter.result()
    assert set(result.erased) == {"relu", "add"}
    assert graph.find(aten.rand.default)


def test_a_constant_that_is_made_in_vain_goes_with_its_record(graph: GraphModule) -> None:
    rewriter = Rewriter(graph)
    linear = graph.find(aten.linear.default)[0]
    weight = linear.args[1]
    assert isinstance(weight, torch.fx.Node)
    fixed = rewriter.constant(lambda: torch.ones(4), [], name="ones", before=linear)
    assert graph.fixed_tensor(str(fixed.target)) is not None
    rewriter.discard()
    rewriter.result()
    assert not graph.info.recipes and "ones" not in graph.constants()
    scaled = Rewriter(graph).constant(lambda w: w * 2, [weight], name="ones", before=linear)
    assert graph.fixed_tensor(str(scaled.target)) is None  # new weights reach it


def test_a_constant_that_another_node_reads_stays(graph: GraphModule) -> None:
    rewriter = Rewriter(graph)
    linear, relu = graph.find(aten.linear.default)[0], graph.find(aten.relu.default)[0]
    ones = rewriter.constant(lambda: torch.ones(4), [], name="ones", before=linear)
    with graph.graph.inserting_before(linear):
        again = graph.graph.create_node("get_attr", ones.target)
    again.meta.update(ones.meta)
    rewriter.discard()
    total = rewriter.insert(aten.add.Tensor, relu, again, before=relu.next)
    assert rewriter.replace(relu, total)
    rewriter.result()
    assert again.target in graph.constants() and len(graph.info.recipes) == 1


def test_how_a_constant_was_made_is_kept_for_those_made_of_it(graph: GraphModule) -> None:
    rewriter = Rewriter(graph)
    linear = graph.find(aten.linear.default)[0]
    x, weight, bias = linear.args
    assert isinstance(weight, torch.fx.Node)
    half = rewriter.constant(lambda w: w / 2, [weight], name="half", before=linear)
    whole = rewriter.constant(lambda h: h * 2, [half], name="whole", before=linear)
    names = [str(half.target), str(whole.target)]
    new = rewriter.insert(aten.linear.default, x, whole, bias, before=linear)
    rewriter.prune([new])
    assert half._erased and rewriter.replace(linear, new)
    rewriter.result()
    assert [recipe.name for recipe in graph.info.recipes] == names
    assert names[0] not in graph.constants() and names[1] in graph.constants()


def narrow(rewriter: Rewriter, graph: GraphModule, width: int) -> Mend:
    """Cut the first linear's outputs, and what the second reads."""

    def cut(dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda tensor: tensor.narrow(dim, 0, width)

    def mend(node: fx.Node) -> fx.Node | None:
        dims = {"a.weight": 0, "a.bias": 0, "b.weight": 1}
        if node.op != "get_attr" or node.target not in dims:
            return None
        return rewriter.constant(cut(dims[str(node.target)]), [node], name="cut", before=node)

    return mend


def test_resize_changes_sizes_through_the_graph(graph: GraphModule) -> None:
    rewriter = Rewriter(graph)
    assert rewriter.resize(narrow(rewriter, graph, 2))
    result = rewriter.result()
    assert result.rewrites == 1
    assert set(result.changed) >= {"linear", "relu"}
    assert result.erased == ("a_weight", "a_bias", "b_weight")
    assert [tuple(node.meta["val"].shape) for node in graph.find(aten.relu.default)] == [(2, 2)]
    fxopt.dialect.check(graph)
    assert graph(torch.randn(2, 4)).shape == (2, 3)


def test_resize_refuses_another_output(graph: GraphModule) -> None:
    rewriter = Rewriter(graph)

    def mend(node: fx.Node) -> fx.Node | None:
        if node.target not in ("b.weight", "b.bias"):
            return None
        return rewriter.constant(lambda tensor: tensor[:2], [node], name="cut", before=node)

    with pytest.raises(ValueError, match="linear_1, which the graph returns, would change"):
        rewriter.resize(mend)


def test_resize_obeys_fuel(graph: GraphModule) -> None:
    text = graph_text(graph)
    with fuel(0):
        rewriter = Rewriter(graph)
        assert not rewriter.resize(narrow(rewriter, graph, 2))
        assert not rewriter.result().modified
    assert graph_text(graph) == text


def test_some_users_alone_get_what_replaces_a_node() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = x.sin()
            return y.cos(), y.exp(), y

    graph = fxopt.capture(Model(), torch.randn(3))
    rewriter = Rewriter(graph)
    (sine,), (cosine,) = graph.find(aten.sin.default), graph.find(aten.cos.default)
    new = rewriter.insert(aten.mul.Tensor, sine, 2.0, before=cosine)
    assert rewriter.replace(sine, new, users=[cosine])
    result = rewriter.result()
    assert result.rewrites == 1 and result.changed == ("cos",) and not result.erased
    x = torch.randn(3)
    cos, exp, y = graph(x)
    assert torch.equal(cos, (2 * x.sin()).cos()) and torch.equal(y, x.sin())
    assert torch.equal(exp, x.sin().exp())
