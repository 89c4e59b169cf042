"""Bisection: the guilty pass and rewrite, who else may be to blame, and in how many runs."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import fx, nn

import fxopt
from fxopt.backends.eager import Eager, EagerExecutable
from fxopt.cli import main
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.rules import apply_rules, rule
from fxopt.testing import noisy
from tests.models import Counter
from tests.planted import Planted, WrongTanh

aten = torch.ops.aten


# -- models ----------------------------------------------------------------------------------------


class Pools(nn.Module):
    """Pools and relus by turns; one pool is wider than the others."""

    def __init__(self, pools: int = 250, wide: int = 137) -> None:
        super().__init__()
        widths = [5 if count == wide else 3 for count in range(1, pools + 1)]
        self.pools = nn.ModuleList([nn.AvgPool1d(w, 1, w // 2) for w in widths])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for pool in self.pools:
            x = F.relu(pool(x))
        return x


class Chain(nn.Module):
    """Linear layers and relus by turns."""

    def __init__(self, layers: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *[m for _ in range(layers) for m in (nn.Linear(6, 6), nn.ReLU())]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Chooses(nn.Module):
    """Control flow with three relus in one of its branches."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def three(x: torch.Tensor) -> torch.Tensor:
            return ((x.relu() - 1).relu() - 2).relu()

        return torch.cond(x.sum() > 0, three, lambda x: x.relu() * 3, (x,)).relu()


@pytest.fixture
def chain() -> nn.Module:
    return noisy(Chain()).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 6)


# -- passes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CopyPools(Planted):
    """Rewrites every pool to itself; the wide one is told not to count its padding."""

    wrong: int = 5
    name: ClassVar[str] = "copy-pools"

    def run(self, graph: GraphModule) -> PassResult:
        rewriter = Rewriter(graph)
        for node in graph.find(aten.avg_pool1d.default):
            counts = node.args[1] != [self.wrong]
            args = (*node.args[:5], counts)
            rewriter.replace(node, rewriter.insert(node.target, *args, before=node))
        return rewriter.result()


@dataclass(frozen=True)
class CopyRelus(Planted):
    """Rewrites every relu to itself, but one: by another function of the same node."""

    wrong: int = 5
    kind: str = "tanh"
    name: ClassVar[str] = "copy-relus"

    def run(self, graph: GraphModule) -> PassResult:
        rewriter = Rewriter(graph)
        for count, node in enumerate(graph.find(aten.relu.default), 1):
            target = getattr(aten, self.kind).default if count == self.wrong else aten.relu.default
            rewriter.replace(node, rewriter.insert(target, node.args[0], before=node))
        return rewriter.result()


@dataclass(frozen=True)
class Halve(Planted):
    """Lossy: halves every relu."""

    name: ClassVar[str] = "halve"
    effect: ClassVar[Effect] = Effect.LOSSY

    def run(self, graph: GraphModule) -> PassResult:
        rewriter = Rewriter(graph)
        for node in graph.find(aten.relu.default):
            rewriter.replace(node, rewriter.insert(aten.mul.Tensor, node, 0.5, before=node.next))
        return rewriter.result()


# -- the search ------------------------------------------------------------------------------------


def test_a_wrong_rewrite_in_500_nodes_is_found_in_logarithmic_time() -> None:
    model, x = Pools(), torch.rand(1, 1, 16)
    passes = [CopyRelus(wrong=0), CopyPools(), "remove-dead-nodes", CopyRelus(wrong=0)]
    graph = fxopt.capture(model, x)
    assert sum(node.op == "call_function" for node in graph.graph.nodes) == 500
    found = fxopt.bisect(model, x, passes=passes)
    assert found.blame == "pass" and found.guilty == CopyPools()
    assert (found.number, found.total) == (137, 250)
    assert found.site is not None and found.site.place["path"] == "pools.136"
    assert found.site.erased == ("avg_pool1d_136",)
    assert "-%avg_pool1d_136: f32[1,1,16] = avg_pool1d(%relu_385, [5]" in found.fragment
    assert len(found.fragment.splitlines()) == 3
    confirmations = 2
    assert found.runs <= 2 + math.ceil(math.log2(3)) + math.ceil(math.log2(250)) + confirmations
    assert "number 387 of 750" in str(found)


def test_the_number_is_the_first_of_several_or_another_that_breaks_a_right_graph(
    chain: nn.Module, x: torch.Tensor
) -> None:
    @dataclass(frozen=True)
    class Negates(Planted):
        """Negates at the rewrites 2, 4 and 5: after 4 the result is right again."""

        def run(self, graph: GraphModule) -> PassResult:
            rewriter, node = Rewriter(graph), graph.find(aten.relu.default)[-1]
            for count in range(1, 8):
                factor = -1.0 if count in (2, 4, 5) else 1.0
                new = rewriter.insert(aten.mul.Tensor, node, factor, before=graph.output_node)
                if rewriter.replace(node, new):
                    node = new
            return rewriter.result()

    found = fxopt.bisect(chain, x, passes=[Negates()])
    assert found.number in (2, 5)


@rule(lambda x: F.relu(x))
def relu_by_clamp(x: Any) -> Any:
    """relu(x) = max(x, 0); wrong behind a linear layer with 6 outputs and a name that ends in 4"""
    return x.clamp(min=0.5 if x.node.name.endswith("_4") else 0.0)


@dataclass(frozen=True)
class ReluByClamp(Planted):
    name: ClassVar[str] = "relu-by-clamp"

    def run(self, graph: GraphModule) -> PassResult:
        return apply_rules(graph, (relu_by_clamp,))


def test_a_rule_is_named(chain: nn.Module, x: torch.Tensor) -> None:
    found = fxopt.bisect(chain, x, passes=[ReluByClamp()])
    assert (found.number, found.rule) == (5, "relu_by_clamp")
    assert "by the rule relu_by_clamp, in layers.9." in str(found)


def test_nothing_is_wrong(chain: nn.Module, x: torch.Tensor, tmp_path: Path) -> None:
    found = fxopt.bisect(chain, x, passes=[CopyRelus(wrong=0)], script=tmp_path / "no.py")
    assert found.blame == "nothing" and found.guilty is None and found.runs == 1
    assert "Nothing is wrong after 8 rewrites in 1 pass: max |Δ|" in str(found)
    assert not list(tmp_path.iterdir())
    assert fxopt.bisect(chain, x).blame == "nothing"
    with pytest.raises(fxopt.FxoptError, match="nothing to reproduce"):
        found.write_script(tmp_path / "no.py")


def test_a_wrong_capture_is_to_blame(
    chain: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_capture(*args: Any, **kwargs: Any) -> GraphModule:
        graph = fxopt.capture(*args, **kwargs)
        CopyRelus().run(graph)
        return graph

    monkeypatch.setattr(sys.modules["fxopt.compile"], "capture", wrong_capture)
    found = fxopt.bisect(chain, x, passes=[CopyRelus(wrong=0)])
    assert found.blame == "capture" and "a bug of capture" in str(found)
    with pytest.raises(fxopt.FxoptError, match="No script can stand for the model"):
        found.write_script("no.py")


def test_it_leaves_the_model_as_it_was(chain: nn.Module, x: torch.Tensor) -> None:
    chain.train()
    before = {name: value.clone() for name, value in chain.state_dict().items()}
    fxopt.bisect(chain, x, passes=[CopyRelus()])
    assert chain.training
    for name, value in chain.state_dict().items():
        assert torch.equal(value, before[name])


def test_inputs_where_it_is_wrong_may_be_given(chain: nn.Module, x: torch.Tensor) -> None:
    zeros = torch.zeros(3, 6)

    @dataclass(frozen=True)
    class Clamps(Planted):
        def run(self, graph: GraphModule) -> PassResult:
            rewriter, (given,) = Rewriter(graph), graph.placeholders
            new = rewriter.insert(aten.clamp.default, given, -9.0, 9.0, before=given.next)
            rewriter.replace(given, new)
            return rewriter.result()

    assert fxopt.bisect(chain, zeros, passes=[Clamps()]).blame == "nothing"
    found = fxopt.bisect(chain, zeros, passes=[Clamps()], verify_inputs=[zeros, x * 100])
    assert found.number == 1


# -- oracles ---------------------------------------------------------------------------------------


def test_a_users_function_decides(chain: nn.Module, x: torch.Tensor) -> None:
    def has_no_tanh(graph: Any) -> bool:
        assert graph(x).shape == (3, 6)
        return not graph.find(aten.tanh.default)

    found = fxopt.bisect(chain, x, passes=[CopyRelus(wrong=3)], oracle=has_no_tanh)
    assert found.number == 3 and found.error is None and "the oracle says wrong" in found.reason


def test_a_users_metric_decides_about_a_lossy_pass(chain: nn.Module, x: torch.Tensor) -> None:
    expected = chain(x)

    def closeness(graph: Any) -> torch.Tensor:
        return 1 - (graph(x) - expected).abs().max() / expected.abs().max()

    found = fxopt.bisect(chain, x, passes=[Halve()], oracle=closeness, threshold=0.99)
    assert found.guilty == Halve() and found.number is not None
    assert found.reason.startswith("the metric is 0.") and "threshold is 0.99" in found.reason


def test_without_a_metric_a_lossy_pass_starts_a_new_reference(
    chain: nn.Module, x: torch.Tensor
) -> None:
    found = fxopt.bisect(chain, x, passes=[Halve()])
    assert found.blame == "nothing" and "'halve' changes, it changes by intent" in str(found)
    for passes in ([Halve(), CopyRelus(2)], [CopyRelus(2), Halve()], [CopyRelus(2), Halve()] * 2):
        found = fxopt.bisect(chain, x, passes=passes)
        assert (found.guilty, found.number) == (CopyRelus(2), 2)


def test_an_oracle_that_refuses_the_captured_graph(chain: nn.Module, x: torch.Tensor) -> None:
    found = fxopt.bisect(chain, x, passes=[CopyRelus()], oracle=lambda graph: False)
    assert found.blame == "oracle" and "even before the first pass" in str(found)
    found = fxopt.bisect(chain, x, passes=[CopyRelus()], oracle=lambda graph: 1 / 0)
    assert found.blame == "oracle" and "ZeroDivisionError" in str(found)


def test_an_oracle_that_fails_says_wrong(chain: nn.Module, x: torch.Tensor) -> None:
    def strict(graph: Any) -> bool:
        if graph.find(aten.tanh.default):
            raise KeyError("tanh")
        return True

    found = fxopt.bisect(chain, x, passes=[CopyRelus(4)], oracle=strict)
    assert found.number == 4 and "the oracle fails with KeyError: 'tanh'" in found.reason


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"oracle": lambda graph: 0.7}, "Say from which value on that is right: threshold="),
        ({"oracle": lambda graph: None}, "must return True or False"),
        ({"oracle": lambda graph: True, "threshold": 0.5}, "a number, because of threshold="),
        ({"threshold": 0.5}, "pass oracle="),
        ({"oracle": 3}, "must be a function"),
        ({"passes": ["fold-constant"]}, "Did you mean 'fold-constants'"),
        ({"backend": "onxx"}, "Did you mean 'onnx'"),
    ],
)
def test_wrong_options(
    chain: nn.Module, x: torch.Tensor, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(fxopt.OptionError, match=words):
        fxopt.bisect(chain, x, **options)


def test_an_oracle_that_is_not_deterministic_is_noticed(chain: nn.Module, x: torch.Tensor) -> None:
    answers = itertools.chain([False, True, False, False, False], itertools.repeat(True))
    found = fxopt.bisect(chain, x, passes=[CopyRelus()], oracle=lambda graph: next(answers))
    assert found.number is None and "judged right once, and wrong once" in found.obstacle


# -- passes that misbehave -------------------------------------------------------------------------


@dataclass(frozen=True)
class FailsAfterThree(Planted):
    """Fails once the third relu was rewritten."""

    def run(self, graph: GraphModule) -> PassResult:
        rewriter = Rewriter(graph)
        for node in graph.find(aten.relu.default):
            if rewriter.replace(node, rewriter.insert(aten.relu.default, *node.args, before=node)):
                if rewriter.rewrites == 3:
                    raise IndexError("planted")
        return rewriter.result()


@dataclass(frozen=True)
class FailsAlways(Planted):
    def run(self, graph: GraphModule) -> PassResult:
        raise ZeroDivisionError("planted")


@dataclass(frozen=True)
class MakesIllegal(Planted):
    """Leaves an incomplete call in the graph, from the fourth rewrite on."""

    def run(self, graph: GraphModule) -> PassResult:
        rewriter = Rewriter(graph)
        for count, node in enumerate(graph.find(aten.relu.default), 1):
            new = rewriter.insert(aten.clamp.default, node.args[0], 0.0, before=node)
            if rewriter.replace(node, new) and count == 4:
                new.args = new.args[:2]
        return rewriter.result()


@dataclass(frozen=True)
class MakesNan(Planted):
    """Divides nothing by nothing behind the second relu."""

    def run(self, graph: GraphModule) -> PassResult:
        rewriter = Rewriter(graph)
        for count, node in enumerate(graph.find(aten.relu.default), 1):
            factor = float("nan") if count == 2 else 1.0
            rewriter.replace(node, rewriter.insert(aten.mul.Tensor, node, factor, before=node.next))
        return rewriter.result()


@dataclass(frozen=True)
class NoRewriter(Planted):
    """Changes nodes by hand, one of them wrongly."""

    def run(self, graph: GraphModule) -> PassResult:
        graph.find(aten.relu.default)[4].target = aten.tanh.default
        graph.recompile()
        return PassResult()


@dataclass(frozen=True)
class PartlyByHand(Planted):
    """Rewrites properly, and wrongly without being asked."""

    def run(self, graph: GraphModule) -> PassResult:
        CopyRelus(wrong=0).run(graph)
        return NoRewriter().run(graph)


@dataclass(frozen=True)
class Dices(Planted):
    """Rewrites another number of relus each time."""

    def run(self, graph: GraphModule) -> PassResult:
        rewriter = Rewriter(graph)
        for node in graph.find(aten.relu.default)[: next(DICE)]:
            rewriter.replace(node, rewriter.insert(aten.tanh.default, *node.args, before=node))
        return rewriter.result()


DICE: Iterator[int] = itertools.cycle([3, 5, 4])


@dataclass(frozen=True)
class WritesInPlace(Planted):
    """Doubles a weight where it is, in the way of `nn.Module`s."""

    def run(self, graph: GraphModule) -> PassResult:
        node = graph.find(aten.linear.default)[2].args[1]
        assert isinstance(node, fx.Node)
        graph.value(node).data.mul_(2)
        return PassResult(changed=(node.name,))


@dataclass(frozen=True)
class NeverStops(Planted):
    """Asks until it gets what it wants."""

    def run(self, graph: GraphModule) -> PassResult:
        rewriter = Rewriter(graph)
        while graph.find(aten.relu.default):
            node = graph.find(aten.relu.default)[0]
            low = 0.1 if len(graph.find(aten.relu.default)) == 3 else 0.0
            new = rewriter.insert(aten.clamp.default, *node.args, low, before=node)
            rewriter.replace(node, new)
        return rewriter.result()


@dataclass(frozen=True)
class CannotStop(Planted):
    """Counts on each of its rewrites, and makes the sixth wrongly."""

    def run(self, graph: GraphModule) -> PassResult:
        CopyRelus(wrong=6).run(graph)
        if not graph.find(aten.tanh.default):
            raise RuntimeError("where is my tanh?")
        return PassResult()


def test_a_pass_that_fails_at_some_rewrite(chain: nn.Module, x: torch.Tensor) -> None:
    found = fxopt.bisect(chain, x, passes=[CopyRelus(0), FailsAfterThree()])
    assert (found.guilty, found.number) == (FailsAfterThree(), 3)
    assert "it fails after 3 rewrites with IndexError: planted, at " in found.reason
    assert "test_bisection.py" in found.reason and "raise IndexError" in found.reason


def test_a_pass_that_always_fails(chain: nn.Module, x: torch.Tensor) -> None:
    found = fxopt.bisect(chain, x, passes=[CopyRelus(0), FailsAlways()])
    assert found.guilty == FailsAlways() and found.number is None
    assert found.obstacle == "It fails before its first rewrite"


def test_an_error_before_the_pass_that_fails_comes_first(chain: nn.Module, x: torch.Tensor) -> None:
    found = fxopt.bisect(chain, x, passes=[CopyRelus(2), FailsAlways()])
    assert (found.guilty, found.number) == (CopyRelus(2), 2)


def test_an_illegal_graph(chain: nn.Module, x: torch.Tensor) -> None:
    found = fxopt.bisect(chain, x, passes=[MakesIllegal()])
    assert found.number == 4 and "The graph is not legal" in found.reason


def test_nan_is_said_in_words(chain: nn.Module, x: torch.Tensor) -> None:
    found = fxopt.bisect(chain, x, passes=[MakesNan()])
    assert found.number == 2 and found.error == math.inf
    assert found.reason == "output 0 is NaN in 18 of 18 elements, and the reference in 0"


def test_other_dtypes_and_shapes_are_said_in_words(chain: nn.Module, x: torch.Tensor) -> None:
    for make, words in (
        (lambda g, out: g.call_function(aten.to.dtype, (out, torch.float64, False, False, None)),
         "output 0 is torch.float64 instead of torch.float32"),
        (lambda g, out: g.call_function(aten.sum.dim_IntList, (out, [0], False), {"dtype": None}),
         "output 0 has the shape [6] instead of [3, 6]"),
    ):  # fmt: skip

        @dataclass(frozen=True)
        class Other(Planted):
            def run(self, graph: GraphModule, make: Any = make) -> PassResult:
                (out,) = graph.output_node.args[0]
                with graph.graph.inserting_before(graph.output_node):
                    new = make(graph.graph, out)
                new.meta["val"] = out.meta["val"]
                graph.output_node.args = ((new,),)
                graph.recompile()
                return PassResult()

        assert fxopt.bisect(chain, x, passes=[Other()]).reason == words


def test_a_pass_without_a_rewriter_is_found_as_a_whole(chain: nn.Module, x: torch.Tensor) -> None:
    for one, words in (
        (NoRewriter(), "It changes the graph without a Rewriter"),
        (PartlyByHand(), "it changes the graph without its Rewriter, too"),
    ):
        found = fxopt.bisect(chain, x, passes=[CopyRelus(0), one])
        assert found.guilty == one and found.number is None and words in found.obstacle
        assert found.node is not None and found.node.meta["path"] == "layers.9"  # the fifth relu


def test_a_pass_that_is_not_deterministic(chain: nn.Module, x: torch.Tensor) -> None:
    found = fxopt.bisect(chain, x, passes=[Dices()])
    assert found.guilty == Dices() and found.number is None
    assert "It is not deterministic: run twice, it made" in found.obstacle


def test_a_pass_that_writes_to_a_weight_does_not_reach_the_model(
    chain: nn.Module, x: torch.Tensor
) -> None:
    before = {name: value.clone() for name, value in chain.state_dict().items()}
    found = fxopt.bisect(chain, x, passes=[CopyRelus(0), WritesInPlace(), CopyRelus(0)])
    assert found.guilty == WritesInPlace() and found.number is None
    assert "writes to the constant 'layers.4.weight' itself" in found.reason
    assert all(torch.equal(value, before[n]) for n, value in chain.state_dict().items())
    found = fxopt.bisect(chain, x, passes=[CopyRelus(3), WritesInPlace()])
    assert (found.guilty, found.number) == (CopyRelus(3), 3)


def test_a_pass_that_asks_again_and_again_is_stopped(chain: nn.Module, x: torch.Tensor) -> None:
    assert fxopt.bisect(chain, x, passes=[NeverStops()]).number == 6


def test_a_pass_that_cannot_be_stopped(chain: nn.Module, x: torch.Tensor) -> None:
    found = fxopt.bisect(chain, x, passes=[CannotStop()])
    assert found.guilty == CannotStop() and found.number is None
    assert "where it may make none, it fails with RuntimeError: where is my tanh?" in found.obstacle


def test_preconditions_are_the_callers_matter(chain: nn.Module, x: torch.Tensor) -> None:
    @dataclass(frozen=True)
    class Needs(CopyRelus):
        requires: ClassVar[tuple[Precondition, ...]] = (
            Precondition("a convolution", lambda graph: "the graph has none"),
        )

    with pytest.raises(fxopt.PreconditionError, match="needs a convolution"):
        fxopt.bisect(chain, x, passes=[Needs()])


# -- what models do --------------------------------------------------------------------------------


@dataclass(frozen=True)
class AddsOne(Planted):
    """Adds a thousandth to the second of all additions."""

    name: ClassVar[str] = "adds-one"

    def run(self, graph: GraphModule) -> PassResult:
        rewriter = Rewriter(graph)
        for count, node in enumerate(graph.find(aten.add.Tensor), 1):
            more = 1e-3 if count == 2 else 0.0
            new = rewriter.insert(aten.add.Tensor, node, more, before=node.next)
            rewriter.replace(node, new)
        return rewriter.result()


def test_state_is_the_same_for_every_run(x: torch.Tensor) -> None:
    model = Counter()
    found = fxopt.bisect(model, x, passes=[AddsOne()])
    assert found.number == 2 and model.calls.item() == 0


def test_random_operators_are_seeded_alike(x: torch.Tensor) -> None:
    class Noise(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + torch.rand_like(x)).relu().tanh().relu()

    found = fxopt.bisect(Noise(), x, passes=[CopyRelus(2, "sigmoid")])
    assert found.number == 2
    assert fxopt.bisect(Noise(), x, passes=[CopyRelus(0)]).blame == "nothing"


def test_sizes_may_be_dynamic(chain: nn.Module, x: torch.Tensor) -> None:
    found = fxopt.bisect(chain, x, passes=[CopyRelus(3)], dynamic_shapes={0: "batch"})
    assert found.number == 3 and "f32[s" in found.fragment


def test_sub_graphs_share_the_fuel() -> None:
    x = torch.rand(3, 4) + 3

    @dataclass(frozen=True)
    class OneRelu(Planted):
        """Breaks the relu that a comparison with 2 stands before: the third of the branch."""

        def run(self, graph: GraphModule) -> PassResult:
            rewriter = Rewriter(graph)
            for node in graph.find(aten.relu.default):
                (given,) = node.all_input_nodes
                wrong = given.target is aten.sub.Tensor and given.args[1] == 2
                target = aten.tanh.default if wrong else aten.relu.default
                rewriter.replace(node, rewriter.insert(target, given, before=node))
            return rewriter.result()

    found = fxopt.bisect(Chooses(), x, passes=[OneRelu()])
    assert found.total == 5 and found.number is not None
    assert found.site is not None and found.site.part[0] == "true_graph_0"
    assert "= tanh(%sub_1)" in found.fragment


def test_a_precision_has_its_own_bound(chain: nn.Module, x: torch.Tensor) -> None:
    found = fxopt.bisect(chain, x, passes=[CopyRelus(3)], precision="fp64", tolerance=1e-12)
    assert found.number == 3 and found.bound == 1e-12


def test_a_captured_graph_may_be_given(chain: nn.Module, x: torch.Tensor) -> None:
    graph = fxopt.capture(chain, x)
    assert fxopt.bisect(graph, passes=[CopyRelus(3)]).number == 3


# -- backends --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoTanh(Eager):
    """A backend that knows no tanh."""

    name: ClassVar[str] = "no-tanh"

    def lower(self, graph: GraphModule) -> EagerExecutable:
        if graph.find(aten.tanh.default):
            raise fxopt.LoweringError("no tanh here")
        return EagerExecutable(graph)


@dataclass(frozen=True)
class RightTanh(Planted):
    """Writes a relu as a relu and a tanh that its result does not depend on."""

    name: ClassVar[str] = "right-tanh"

    def run(self, graph: GraphModule) -> PassResult:
        rewriter = Rewriter(graph)
        for count, node in enumerate(graph.find(aten.relu.default), 1):
            new = rewriter.insert(aten.relu.default, node.args[0], before=node)
            if count == 3:
                bounded = rewriter.insert(aten.tanh.default, new, before=node)
                small = rewriter.insert(aten.sub.Tensor, bounded, bounded, before=node)
                still = rewriter.insert(aten.sub.Tensor, bounded, small, before=node)
                new = rewriter.insert(aten.atanh.default, still, before=node)
            rewriter.replace(node, new)
        return rewriter.result()


class Small(Chain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * 0.1)


def test_a_rewrite_that_a_backend_gets_wrong(x: torch.Tensor) -> None:
    model = Small().double()
    found = fxopt.bisect(model, x.double(), passes=[RightTanh()], backend=WrongTanh())
    assert (found.guilty, found.number) == (RightTanh(), 3)
    assert found.backend_is_wrong and "'wrong-tanh' is to blame" in str(found)
    assert found.node is not None and found.node.target is aten.tanh.default


def test_a_rewrite_that_is_wrong_on_any_backend(chain: nn.Module, x: torch.Tensor) -> None:
    found = fxopt.bisect(chain, x, passes=[CopyRelus(3, "sigmoid")], backend="eager")
    assert found.number == 3 and not found.backend_is_wrong
    assert "the rewrite is to blame, not the backend" in str(found)


def test_a_backend_that_is_wrong_before_any_pass(x: torch.Tensor) -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.relu().tanh() * 2).exp()

    found = fxopt.bisect(Two(), x, passes=[CopyRelus(0)], backend=WrongTanh())
    assert found.blame == "backend" and found.guilty is None
    assert found.node is not None and found.node.name == "tanh"
    assert "%tanh: f32[3,6] = tanh(%relu)" in str(found)
    found = fxopt.bisect(Two(), x, passes=[CopyRelus(0)], backend=NoTanh())
    assert found.blame == "backend" and "LoweringError: no tanh here" in found.reason


def test_a_rewrite_that_a_backend_cannot_lower(chain: nn.Module, x: torch.Tensor) -> None:
    found = fxopt.bisect(chain, x, passes=[CopyRelus(6)], backend=NoTanh())
    assert found.number == 6 and "cannot lower it: LoweringError: no tanh here" in found.reason


def test_an_oracle_judges_what_a_backend_computes(chain: nn.Module, x: torch.Tensor) -> None:
    expected = chain(x)

    def closeness(compiled: Any) -> float:
        assert isinstance(compiled, fxopt.CompiledModel)
        return -float((compiled(x) - expected).detach().abs().max())

    found = fxopt.bisect(
        chain, x, passes=[CopyRelus(6)], backend="onnx", oracle=closeness, threshold=-1e-6
    )
    assert found.number == 6 and not found.backend_is_wrong


# -- what is printed -------------------------------------------------------------------------------


def test_it_can_be_printed_and_taken_as_json(chain: nn.Module, x: torch.Tensor) -> None:
    found = fxopt.bisect(chain, x, passes=[CopyRelus(0), CopyRelus(5)])
    text = str(found)
    for words in (
        "The pass 'tests.test_bisection:CopyRelus' makes the result wrong: max |Δ|",
        "The first wrong rewrite is number 5 of 8, in layers.9.",
        "test_bisection.py:",
        "Over all passes it is number 13 of 16.",
        "-%relu_",
        "+%tanh: f32[3,6] = tanh(%linear_4)",
        "graphs judged in",
    ):
        assert words in text
    data = json.loads(json.dumps(found.to_json()))
    assert data["blame"] == "pass" and data["guilty"]["rewrite"] == 5
    assert data["guilty"]["created"] == ["tanh"] and data["guilty"]["path"] == "layers.9"
    assert data["passes"] == ["tests.test_bisection:CopyRelus(wrong=0)",
                              "tests.test_bisection:CopyRelus"]  # fmt: skip
    assert "CopyRelus" in repr(found)


def test_verification_says_the_same(chain: nn.Module, x: torch.Tensor) -> None:
    with pytest.raises(fxopt.VerifyError) as caught:
        fxopt.optimize(chain, x, passes=[ReluByClamp()])
    words = str(caught.value)
    assert "Pass 'relu-by-clamp' changed what the model computes: max |Δ|" in words
    assert "number 5 of 8, by the rule relu_by_clamp, in layers.9." in words
    assert "+%clamp" in words and "fxopt.bisect" in words and len(words.splitlines()) < 10


def test_verification_says_what_is_not_deterministic(chain: nn.Module, x: torch.Tensor) -> None:
    @dataclass(frozen=True)
    class Once(Planted):
        """Wrong in the first run only."""

        def run(self, graph: GraphModule) -> PassResult:
            return CopyRelus(next(WRONG)).run(graph)

    WRONG = itertools.chain([3], itertools.repeat(0))
    with pytest.raises(fxopt.VerifyError, match="one of them is not deterministic"):
        fxopt.optimize(chain, x, passes=[Once()])


# -- from the command line -------------------------------------------------------------------------

MINE = '''
import torch
from dataclasses import dataclass
from typing import ClassVar
from fxopt.contract import Effect
from fxopt.rewrite import Rewriter

def make():
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Softplus())

@dataclass(frozen=True)
class ReluByTanh:
    right: bool = False
    name: ClassVar[str] = "relu-by-tanh"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple] = ()
    def run(self, graph):
        rewriter = Rewriter(graph)
        for node in graph.find(torch.ops.aten.relu.default):
            new = torch.ops.aten.relu.default if self.right else torch.ops.aten.tanh.default
            rewriter.replace(node, rewriter.insert(new, node.args[0], before=node))
        return rewriter.result()

def positive(graph):
    return bool((graph(torch.ones(1, 4)) >= 0).all())

def count(graph):
    return -float(len(graph.find(torch.ops.aten.tanh.default)))
'''


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"mine_{random.randrange(10**9)}"
    Path(f"{name}.py").write_text(MINE)

    def call(*arguments: str, code: int) -> Any:
        words = [argument.replace("mine.py", f"{name}.py") for argument in arguments]
        result = CliRunner().invoke(main, words)
        assert result.exit_code == code, result.output
        return result

    return call


def test_the_command_finds_a_users_own_pass(run: Callable[..., Any]) -> None:
    bisect = ("bisect", "mine.py:make", "--input", "2x4")
    result = run(*bisect, "--passes", "default,mine.py:ReluByTanh", code=1)
    assert "ReluByTanh' makes the result wrong" in result.stdout and "tanh" in result.stdout
    assert "number 1 of 1" in result.stdout
    good = run(*bisect, "--passes", "default,mine.py:ReluByTanh(right=True)", code=0)
    assert "Nothing is wrong after 1 rewrite" in good.stdout
    assert "Nothing is wrong" in run(*bisect, code=0).stdout


def test_the_command_asks_a_users_function(run: Callable[..., Any]) -> None:
    bisect = ("bisect", "mine.py:make", "--input", "2x4", "--passes", "mine.py:ReluByTanh")
    found = run(*bisect, "--json", "--oracle", "mine.py:count", "--threshold", "-0.5", "-q", code=1)
    assert json.loads(found.stdout)["guilty"]["rewrite"] == 1
    assert "max |Δ|" not in json.loads(found.stdout)["reason"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--passes", "mine.py:ReluByTan"), "Did you mean 'ReluByTanh'"),
        (("--passes", "mine.py:make"), "is not a pass"),
        (("--passes", "mine.py:ReluByTanh(wrong=1)"), "Unknown option"),
        (("--passes", "no.py:ReluByTanh"), "There is no file 'no.py'"),
        (("--passes", "no_such_module:ReluByTanh"), "There is no module"),
        (("--oracle", "mine.py:MINE"), "has no 'MINE'"),
        (("--oracle", "mine.py:torch.__name__"), "not a function"),
        (("--threshold", "1"), "pass oracle="),
    ],
)
def test_wrong_usage(run: Callable[..., Any], arguments: tuple[str, ...], words: str) -> None:
    result = run("bisect", "mine.py:make", "--input", "2x4", *arguments, code=2)
    assert words in result.stderr and result.stdout == ""


def test_other_commands_take_a_users_pass_too(run: Callable[..., Any]) -> None:
    model = ("mine.py:make", "--input", "2x4")
    shown = run("show", *model, "--diff", "--passes", "mine.py:ReluByTanh", code=0)
    assert "relu-by-tanh: 1 rewrite" in shown.stdout
    assert "1 rewrite" in run("explain", model[0], "mine.py:ReluByTanh", *model[1:], code=0).stdout
    passes = ("--passes", "mine.py:ReluByTanh(right=True)")
    report = run("compile", *model, *passes, code=0).stdout
    recipe = report.split("recipe that reproduces this (a file for --recipe):\n")[1]
    Path("again.toml").write_text(recipe)
    assert "ReluByTanh(right=True)" in recipe
    assert recipe in run("compile", "--recipe", "again.toml", code=0).stdout
