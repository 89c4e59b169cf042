"""remove-residual-blocks: what is a block, which go, and that the rest computes what it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt import dialect
from fxopt.blocks import residual_blocks
from fxopt.contract import PassResult
from fxopt.difference import relative_error
from fxopt.errors import OptionError, VerifyError
from fxopt.graph_module import GraphModule
from fxopt.passes import RemoveResidualBlocks
from fxopt.rewrite import Rewriter
from fxopt.testing import noisy, op_counts
from fxopt.vision import import_torchvision
from tests.models import Function
from tests.work import lines_run

aten = torch.ops.aten
models = import_torchvision().models


class Block(nn.Module):
    """x + a branch of two layers, as a module of its own."""

    def __init__(self, width: int = 6, scale: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(torch.ones(width)) if scale else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b(F.gelu(self.a(x)))
        return x + (y if self.gamma is None else self.gamma * y)


class Layers(nn.Module):
    """A stem, blocks one after the other, a head."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(3, 6), nn.ModuleList(blocks), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def removed(model: nn.Module, *inputs: Any, **options: Any) -> tuple[GraphModule, PassResult]:
    """Return the graph of a model without the blocks asked for; it is legal, and shorter."""
    graph = fxopt.capture(noisy(model.eval()), inputs)
    before = len(graph.graph.nodes)
    result = RemoveResidualBlocks(**options).run(graph)
    dialect.check(graph)
    assert (len(graph.graph.nodes) < before) == result.modified
    return graph, result


def blocks_of(model: nn.Module, *inputs: Any) -> tuple[list[str], list[str]]:
    found, misses = residual_blocks(fxopt.capture(model.eval(), inputs))
    return [block.name for block in found[::-1]], [miss.reason for miss in misses]


# -- whole models ----------------------------------------------------------------------------------


def test_resnet18_without_the_second_block_of_each_stage() -> None:
    model = models.resnet18(weights=None)
    x = torch.randn(1, 3, 32, 32)
    graph, result = removed(model, x, blocks=("layer?.1",))
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        layer[1] = nn.ReLU()
    assert relative_error(graph(x), model(x)) < 1e-5
    counts = op_counts(graph)
    assert (counts["conv2d"], counts["add"], counts["batch_norm"]) == (12, 4, 12)
    assert result.rewrites == 4 and not any("layer2.1" in name for name in graph.constants())
    reasons = [miss.reason for miss in result.misses]
    assert len(reasons) == 3  # the first block of layer1 has no projection
    assert "in layer2.0.downsample.1, from float32[1, 64, 8, 8] to float32[1, 128, 4, 4]" in (
        reasons[0]
    )


def test_resnet50_by_count() -> None:
    model = models.resnet50(weights=None)
    x = torch.randn(1, 3, 32, 32)
    graph = fxopt.capture(model.eval(), x)
    found, misses = residual_blocks(graph)
    assert (len(found), len(misses)) == (12, 4)
    result = RemoveResidualBlocks(count=3).run(graph)
    gone = [row.name for row in result.details.blocks if row.removed]
    assert sorted(row.score for row in result.details.blocks)[:3] == sorted(
        row.score for row in result.details.blocks if row.removed
    )
    for name in gone:
        stage, index = name.split(".")
        getattr(model, stage)[int(index)] = nn.ReLU()
    assert relative_error(graph(x), model(x)) < 1e-5
    assert op_counts(graph)["conv2d"] == 53 - 9


def small_vit() -> nn.Module:
    return models.VisionTransformer(
        image_size=8, patch_size=4, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=16,
        num_classes=5,
    )  # fmt: skip


@pytest.mark.parametrize("pattern, attentions, mlps", [
    ("encoder.layers.encoder_layer_1", 2, 2),
    ("encoder.layers.encoder_layer_1#1", 2, 3),
    ("encoder.layers.encoder_layer_?.mlp", 3, 0),
    ("*.self_attention", 0, 3),
])  # fmt: skip
def test_a_transformer_has_two_blocks_per_layer(pattern: str, attentions: int, mlps: int) -> None:
    model = small_vit()
    x = torch.randn(2, 3, 8, 8)
    graph, _ = removed(model, x, blocks=(pattern,))
    counts = op_counts(graph)
    assert (counts.get("scaled_dot_product_attention", 0), counts.get("gelu", 0)) == (
        attentions, mlps,
    )  # fmt: skip
    for name, layer in model.encoder.layers.named_children():
        if attentions == 0 or (attentions < 3 and name.endswith("1")):
            layer.self_attention.out_proj.weight.data.zero_()
            layer.self_attention.out_proj.bias.data.zero_()
        if mlps == 0 or (mlps < 3 and name.endswith("1")):
            layer.mlp[3].weight.data.zero_()
            layer.mlp[3].bias.data.zero_()
    assert relative_error(graph(x), model(x)) < 1e-5


# -- what is a block -------------------------------------------------------------------------------


def test_layer_scale_drop_path_and_an_activation_behind() -> None:
    class Scaled(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu(x)
            y = self.gamma * self.b(F.gelu(self.a(x)))
            return F.relu(x + F.dropout(y, 0.2, self.training))

    model, x = Layers(Scaled(scale=True), Block(scale=True)), torch.randn(2, 3)
    graph, _ = removed(model, x, blocks=("blocks.*",))
    assert relative_error(graph(x), model.head(F.relu(model.stem(x)))) < 1e-6
    assert op_counts(graph) == {"linear": 2, "relu": 2}
    assert not any("gamma" in name for name in graph.constants())


def test_a_branch_may_read_other_values() -> None:
    def masked(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x.tanh()
        return (x + x.exp() * y.sigmoid()).cos()

    graph, _ = removed(Function(masked), torch.randn(4), torch.randn(4), count=1)
    assert op_counts(graph) == {"cos": 1, "tanh": 1}
    assert len(graph.placeholders) == 2


def test_a_block_may_be_the_whole_model_or_broadcast_its_branch() -> None:
    graph, _ = removed(Function(lambda x: x + x.mean(1, keepdim=True).exp()), torch.randn(2, 4),
                       count=1)
    assert op_counts(graph) == {}
    x = torch.randn(2, 4)
    assert torch.equal(graph(x), x)


@pytest.mark.parametrize("function, reason", [
    (lambda x: (x + (y := x.exp()).cos(), y), "its branch is used elsewhere, too: exp"),
    (lambda x: ((y := x.exp().cos()) + x, y), "its branch is used elsewhere, too: cos"),
    (lambda x: x.mean(1, True) + x.mean(1, True).exp().expand(2, 4), "computes something, too"),
    (lambda x: (y := x.mean(1, True)) + (y.exp() * torch.ones(4)), "its input is float32[2, 1]"),
    (lambda x: torch.add(x.exp(), x, alpha=2), "its shortcut is scaled"),
    (lambda x: x.exp() + x.cos(), "its shortcut computes something, too"),
    (lambda x: x + x, None),
    (lambda x: x + 1, None),
    (lambda x: x.exp() + torch.ones(4), None),
    (lambda x: x.double() + x.exp(), "its shortcut computes something, too"),
    (lambda x: x.half() + x.half().exp().float(), "its"),
])  # fmt: skip
def test_sums_that_are_no_blocks(function: Callable[..., Any], reason: str | None) -> None:
    names, reasons = blocks_of(Function(function), torch.randn(2, 4))
    assert not names
    assert reasons == [] if reason is None else reason in reasons[0], reasons


def test_scaled_branches_are_blocks() -> None:
    scaled = Function(lambda x: torch.add(x, x.exp(), alpha=3))
    assert len(blocks_of(scaled, torch.randn(4))[0]) == 1


def test_what_has_an_effect_in_a_branch_holds_it_back() -> None:
    def draws(x: torch.Tensor) -> torch.Tensor:
        return x + torch.bernoulli(x.sigmoid()).exp()

    names, _ = blocks_of(Function(draws), torch.randn(4))
    assert names == []


def test_state_that_a_branch_writes_holds_it_back() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.exp()
            self.seen += y
            return x + y.cos()

    names, reasons = blocks_of(Counts(), torch.randn(4))
    assert not names and reasons == ["its branch is used elsewhere, too: exp"]


def test_tied_weights_stay_for_whoever_else_uses_them() -> None:
    shared = Block()
    last = Block()
    last.a = shared.a
    graph, _ = removed(Layers(shared, last), torch.randn(2, 3), blocks=("blocks.0",))
    assert {"blocks.0.a.weight", "blocks.1.b.weight"} <= set(graph.constants())
    assert "blocks.0.b.weight" not in graph.constants()
    assert op_counts(graph)["gelu"] == 1


def test_inputs_of_blocks_may_be_outputs() -> None:
    def several(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a = x.tanh()
        b = a + a.exp()
        c = b + b.cos()
        return a, b, c

    x = torch.randn(4)
    graph, result = removed(Function(several), x, ratio=1.0)
    assert op_counts(graph) == {"tanh": 1} and result.rewrites == 2
    assert all(torch.equal(out, x.tanh()) for out in graph(x))


class Nested(nn.Module):
    """A block around a block."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.inner, self.up = nn.Linear(6, 4), Block(4), nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(self.inner(F.relu(self.down(x))))


def test_nested_blocks() -> None:
    model, x = Layers(Nested(), Block()), torch.randn(2, 3)
    found, _ = residual_blocks(fxopt.capture(model.eval(), x))
    named = {block.name: block for block in found}
    assert list(named) == ["blocks.1", "blocks.0", "blocks.0.inner"]
    assert named["blocks.0.inner"].outer == 1 and named["blocks.0"].outer is None
    assert named["blocks.0"].parts == ("blocks.0.down", "blocks.0.up")
    assert named["blocks.0.inner"].parts == ("blocks.0.inner.a", "blocks.0.inner.b")

    graph, result = removed(model, x, blocks=("blocks.0.inner",))
    assert result.rewrites == 1 and op_counts(graph)["add"] == 2
    graph, result = removed(model, x, blocks=("blocks.0", "blocks.0.inner"))
    assert result.rewrites == 1 and op_counts(graph) == {"add": 1, "gelu": 1, "linear": 4}
    gone = {row.name: row.removed for row in result.details.blocks}
    assert gone == {"blocks.0": True, "blocks.0.inner": True, "blocks.1": False}
    graph, _ = removed(model, x, ratio=1.0, keep=("blocks.0.inner",))  # and so what is around it
    assert op_counts(graph)["add"] == 2


def nested(count: int) -> GraphModule:
    """Two chains of `count` nested blocks each, whose sums are far from their inputs."""
    graph = fxopt.capture(Function(torch.exp), torch.randn(4))
    rewriter = Rewriter(graph)
    (start,), end = graph.find(aten.exp.default), graph.output_node
    for _ in range(2):
        inputs, y = [], start
        for _ in range(count):
            inputs.append(y)
            y = rewriter.insert(aten.cos.default, y, before=end, like=start)
        for one in reversed(inputs):
            y = rewriter.insert(aten.add.Tensor, one, y, before=end, like=start)
        end.args = ((y,),)
        start = y
    return graph


def skipping(count: int) -> GraphModule:
    """Values that are each read in one half of the graph, and again in the other."""
    graph = fxopt.capture(Function(torch.exp), torch.randn(4))
    (y,), end = graph.find(aten.exp.default), graph.output_node
    value = y.meta["val"]

    def call(target: Any, *args: Any) -> Any:
        node = graph.graph.call_function(target, args)
        node.meta["val"] = value
        return node

    with graph.graph.inserting_before(end):
        ends = [call(aten.cos.default, y) for _ in range(count)]
        for one in (*ends, *reversed(ends)):
            y = call(aten.mul.Tensor, y, one)
    end.args = ((y,),)
    return graph


def test_all_of_deeply_nested_blocks_are_found() -> None:
    found, misses = residual_blocks(nested(3000))
    assert len(found) == 6000 and not misses
    assert sum(block.outer is None for block in found) == 2


@pytest.mark.parametrize("build", [nested, skipping])
def test_work_grows_in_proportion_to_the_graph(build: Any) -> None:
    small, large = (build(count) for count in (400, 1600))
    assert residual_blocks(skipping(50)) == ((), ())
    few = lines_run(lambda: residual_blocks(small))
    many = lines_run(lambda: residual_blocks(large))
    assert many < 5.5 * few  # four times as many nodes, and a logarithm; quadratic is 16 times


# -- which go --------------------------------------------------------------------------------------


def test_scores_are_what_the_papers_define() -> None:
    model, data = Layers(Block(), Block()), [torch.randn(5, 3), (torch.randn(4, 3), None)]
    graph = fxopt.capture(noisy(model.eval()), torch.randn(2, 3), dynamic_shapes={0: "batch"})

    def score(**options: Any) -> float:
        result = RemoveResidualBlocks(count=0, data=data, **options).run(graph)
        assert not result.modified
        return float(result.details.blocks[0].score)

    x = model.stem(torch.cat([data[0], data[1][0]]))
    y = model.blocks[0](x)
    influence = 1 - F.cosine_similarity(x, y, dim=1)
    norm = (y - x).norm(dim=1) / x.norm(dim=1)
    assert score() == pytest.approx(influence.mean().item(), abs=1e-6)
    assert score(importance="norm") == pytest.approx(norm.mean().item(), rel=1e-5)
    assert score(importance="norm", batches=1) == pytest.approx(norm[:5].mean().item(), rel=1e-5)


def test_scores_of_tokens_are_taken_for_each_token() -> None:
    model, x = Layers(Block()), torch.randn(2, 7, 3)
    _, result = removed(model, x, count=0)
    a = model.stem(x)
    influence = 1 - F.cosine_similarity(a, model.blocks[0](a), dim=-1).mean().item()
    assert result.details.blocks[0].score == pytest.approx(influence, abs=1e-6)


def test_the_least_important_go_first_and_data_decides() -> None:
    model = Layers(Block(), Block(), Block())
    noisy(model)
    model.blocks[1].b.weight.data.mul_(1e-3)
    model.blocks[1].b.bias.data.mul_(1e-3)
    graph = fxopt.capture(model.eval(), torch.randn(2, 3))
    result = RemoveResidualBlocks(ratio=0.34).run(graph)
    assert [row.removed for row in result.details.blocks] == [False, True, False]
    text = str(result.details)
    assert "1 of 3 removed" in text and "error" in text and "blocks.1  0.0000  removed" in text
    assert "blocks.1.a.weight" not in graph.constants()


def test_half_precision_and_dynamic_sizes() -> None:
    model, x = noisy(Layers(Block(), Block()).eval()).bfloat16(), torch.randn(2, 3).bfloat16()
    graph = fxopt.capture(model, x, dynamic_shapes={0: "batch"})
    result = RemoveResidualBlocks(blocks=("blocks.1",)).run(graph)
    assert result.details.bound == pytest.approx(1e-11)  # compared in float64
    wide = torch.randn(7, 3).bfloat16()
    assert torch.equal(graph(wide), model.head(model.blocks[0](model.stem(wide))))


def test_in_the_pipeline_with_a_report() -> None:
    model, x = noisy(Layers(Block(), Block()).eval()), torch.randn(2, 3)
    passes = [RemoveResidualBlocks(count=1), *fxopt.default_passes()]
    graph = fxopt.optimize(model, x, passes=passes)
    assert op_counts(graph)["add"] == 1
    assert "residual blocks: 1 of 2 removed, by influence" in str(graph.report)
    assert fxopt.optimize(model, x, passes=["remove-residual-blocks(ratio=0.5)"]).story.steps


# -- what cannot be asked --------------------------------------------------------------------------


@pytest.mark.parametrize("options, words", [
    ({}, "one of blocks=, count= and ratio="),
    ({"count": 1, "ratio": 0.5}, "got 2 of them"),
    ({"count": 5}, "has 2 residual blocks, of which 0 are kept"),
    ({"count": 2, "keep": ("blocks.0",)}, "of which 1 are kept"),
    ({"count": -1}, "not -1"),
    ({"ratio": 1.5}, "between 0 and 1"),
    ({"blocks": ("blocks.7",)}, "Did you mean 'blocks.1'"),
    ({"blocks": "blocks.0"}, "blocks=('blocks.0',)"),
    ({"ratio": 0.5, "keep": ("nothing",)}, "Unknown residual block 'nothing'"),
    ({"count": 1, "importance": "influenze"}, "Did you mean 'influence'"),
    ({"count": 1, "batches": 0}, "at least 1"),
])  # fmt: skip
def test_impossible_options(options: dict[str, Any], words: str) -> None:
    graph = fxopt.capture(Layers(Block(), Block()).eval(), torch.randn(2, 3))
    before = str(graph)
    with pytest.raises(OptionError) as caught:
        RemoveResidualBlocks(**options).run(graph)
    assert words in str(caught.value)
    assert str(graph) == before


def test_a_model_without_blocks_is_left_alone() -> None:
    _, result = removed(nn.Linear(3, 4), torch.randn(2, 3), ratio=0.5)
    assert not result.modified and "0 of 0 removed" in str(result.details)


def test_a_wrong_removal_is_refused_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = fxopt.capture(noisy(Layers(Block(), Block()).eval()), torch.randn(2, 3))
    before, constants = str(graph), set(graph.constants())
    right = Rewriter.replace

    def wrong(self: Rewriter, old: Any, new: Any = None) -> bool:
        return right(self, old, old.args[1])  # the branch in place of the shortcut

    monkeypatch.setattr(Rewriter, "replace", wrong)
    with pytest.raises(VerifyError, match="The graph is as it was"):
        RemoveResidualBlocks(count=1).run(graph)
    assert str(graph) == before and set(graph.constants()) == constants


def test_bisection_may_stop_it_after_any_block() -> None:
    from fxopt.rewrite import fuel

    graph = fxopt.capture(Layers(Block(), Block()).eval(), torch.randn(2, 3))
    with fuel(1):
        result = RemoveResidualBlocks(ratio=1.0).run(graph)
    assert result.rewrites == 1 and sum(row.removed for row in result.details.blocks) == 1
    assert op_counts(graph)["add"] == 1
