"""The pipeline: contract, story, verification, the search for the guilty rewrite, roll-back."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import fxopt
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter, fuel
from fxopt.testing import noisy, op_counts

aten = torch.ops.aten


class Chain(nn.Module):
    """Ten layers, each a linear and a relu."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[m for _ in range(10) for m in (nn.Linear(6, 6), nn.ReLU())])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@dataclass(frozen=True)
class BreakRelu:
    """Rewrites every relu to itself, but the seventh to a tanh: a planted bug."""

    wrong: int = 7
    name: ClassVar[str] = "break-relu"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        rewriter = Rewriter(graph)
        for count, node in enumerate(graph.find(aten.relu.default), 1):
            target = aten.tanh.default if count == self.wrong else aten.relu.default
            rewriter.replace(node, rewriter.insert(target, node.args[0], before=node))
        return rewriter.result()


@dataclass(frozen=True)
class Raises:
    """A pass that fails after it has changed something."""

    name: ClassVar[str] = "raises"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        BreakRelu().run(graph)
        raise ZeroDivisionError("planted")


@dataclass(frozen=True)
class MakesIllegal:
    """A pass that leaves an incomplete call in the graph."""

    name: ClassVar[str] = "makes-illegal"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        node = graph.find(aten.linear.default)[0]
        node.args = node.args[:2]
        return PassResult(changed=(node.name,))


@dataclass(frozen=True)
class Halve:
    """A lossy pass: halves the output of every relu."""

    name: ClassVar[str] = "halve"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        rewriter = Rewriter(graph)
        for node in graph.find(aten.relu.default):
            doubled = rewriter.insert(aten.mul.Tensor, node, 0.5, before=node.next)
            rewriter.replace(node, doubled)
        return rewriter.result()


@dataclass(frozen=True)
class NeedsConv:
    """A pass with a precondition."""

    name: ClassVar[str] = "needs-conv"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = (
        Precondition(
            "a convolution",
            lambda graph: None if graph.find(aten.conv2d.default) else "the graph has none",
        ),
    )

    def run(self, graph: GraphModule) -> PassResult:
        return Rewriter(graph).result()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return noisy(Chain()).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 6)


def test_final_verification_names_the_pass_and_the_first_wrong_rewrite(
    model: nn.Module, x: torch.Tensor
) -> None:
    passes = ["fold-constants", BreakRelu(), "remove-dead-nodes"]
    with pytest.raises(fxopt.VerifyError) as caught:
        fxopt.optimize(model, x, passes=passes)
    words = str(caught.value)
    assert "'break-relu'" in words and "number 7 of 10" in words
    assert "tanh" in words and "on_error='skip'" in words


def test_each_verifies_after_every_pass(model: nn.Module, x: torch.Tensor) -> None:
    with pytest.raises(fxopt.VerifyError, match="number 3 of 10"):
        fxopt.optimize(model, x, passes=[BreakRelu(wrong=3)], verify="each")
    graph = fxopt.optimize(model, x, passes=[BreakRelu(wrong=99), Halve()], verify="each")
    assert [v.what for v in graph.story.verifications] == ["after break-relu"]


def test_off_verifies_nothing(model: nn.Module, x: torch.Tensor) -> None:
    graph = fxopt.optimize(model, x, passes=[BreakRelu()], verify="off")
    assert graph.story.verifications == []
    assert op_counts(graph)["tanh"] == 1


@pytest.mark.parametrize("verify", ["final", "each"])
@pytest.mark.parametrize("bad", [BreakRelu(), Raises(), MakesIllegal()])
def test_skip_rolls_the_guilty_pass_back_and_goes_on(
    model: nn.Module, x: torch.Tensor, bad: Any, verify: str, caplog: pytest.LogCaptureFixture
) -> None:
    passes = [BreakRelu(wrong=99), bad, "remove-dead-nodes"]
    with caplog.at_level(logging.WARNING, "fxopt"):
        graph = fxopt.optimize(model, x, passes=passes, verify=verify, on_error="skip")
    torch.testing.assert_close(graph(x), model(x))
    assert [step.name for step in graph.story.steps] == [
        "break-relu",
        bad.name,
        "remove-dead-nodes",
    ]
    assert [step.skipped is not None for step in graph.story.steps] == [False, True, False]
    assert graph.story.steps[0].rewrites == 10
    assert bad.name in caplog.text
    assert "rolled back" in str(graph.report)


def test_a_pass_that_raises_is_named_with_those_before_it(
    model: nn.Module, x: torch.Tensor
) -> None:
    with pytest.raises(
        fxopt.FxoptError, match="'raises' failed with ZeroDivisionError: planted"
    ) as e:
        fxopt.optimize(model, x, passes=["fold-constants", Raises()])
    assert "Passes before it: fold-constants" in str(e.value)


def test_an_illegal_graph_is_found_after_the_pass_that_made_it(
    model: nn.Module, x: torch.Tensor
) -> None:
    with pytest.raises(fxopt.DialectError, match="makes-illegal"):
        fxopt.optimize(model, x, passes=[MakesIllegal()])


def test_preconditions_are_checked(model: nn.Module, x: torch.Tensor) -> None:
    with pytest.raises(fxopt.PreconditionError, match="needs a convolution: the graph has none"):
        fxopt.optimize(model, x, passes=[NeedsConv()])


def test_a_lossy_pass_starts_a_new_reference(model: nn.Module, x: torch.Tensor) -> None:
    graph = fxopt.optimize(model, x, passes=[Halve(), "merge-duplicates", "remove-dead-nodes"])
    assert not torch.allclose(graph(x), model(x))
    with pytest.raises(fxopt.VerifyError, match="break-relu"):
        fxopt.optimize(model, x, passes=[Halve(), BreakRelu()])
    with pytest.raises(fxopt.VerifyError, match="break-relu"):
        fxopt.optimize(model, x, passes=[BreakRelu(), Halve()])


def test_the_users_own_acceptance_decides(model: nn.Module, x: torch.Tensor) -> None:
    seen: list[Any] = []

    def accept(candidate: Any) -> bool:
        seen.append(candidate)
        return "tanh" not in op_counts(candidate)

    fxopt.optimize(model, x, passes=[BreakRelu(wrong=99)], verify=accept)
    assert seen
    with pytest.raises(fxopt.VerifyError, match="break-relu"):
        fxopt.optimize(model, x, passes=[BreakRelu()], verify=accept, tolerance=1e9)


def test_verify_inputs_are_used(model: nn.Module, x: torch.Tensor) -> None:
    @dataclass(frozen=True)
    class WrongForLarge:
        name: ClassVar[str] = "wrong-for-large"
        effect: ClassVar[Effect] = Effect.EXACT
        requires: ClassVar[tuple[Precondition, ...]] = ()

        def run(self, graph: GraphModule) -> PassResult:
            rewriter = Rewriter(graph)
            node = graph.placeholders[0]
            user = next(iter(node.users))
            clamped = rewriter.insert(aten.clamp.default, node, -9.0, 9.0, before=user)
            rewriter.replace(node, clamped)
            return rewriter.result()

    small = torch.zeros(3, 6)
    fxopt.optimize(model, small, passes=[WrongForLarge()])
    with pytest.raises(fxopt.VerifyError, match="wrong-for-large"):
        fxopt.optimize(model, small, passes=[WrongForLarge()], verify_inputs=[small, x * 100])


def test_the_story_records_steps_and_shares_what_did_not_change(
    model: nn.Module, x: torch.Tensor
) -> None:
    graph = fxopt.optimize(model, x, passes=[BreakRelu(wrong=99), "remove-dead-nodes"])
    first, second = graph.story.steps
    assert first.rewrites == 10 and len(first.created) == 10 and len(first.erased) == 10
    assert set(first.origins.values()) == {(name,) for name in first.erased}
    shared = set(map(id, first.before.records)) & set(map(id, first.after.records))
    assert len(shared) >= 11  # the input and the weights, at least
    assert second.before is first.after
    assert first.diff().count("\n-%relu") == 10
    assert first.before.text != first.after.text
    assert graph.story.captured.counts.macs == 10 * 3 * 6 * 6
    assert graph.story.captured.counts.parameters == 10 * (36 + 6)


def test_fuel_stops_a_pass_after_n_rewrites(model: nn.Module, x: torch.Tensor) -> None:
    for wanted in (0, 3, 10, 50):
        graph = fxopt.capture(model, x)
        with fuel(wanted):
            result = BreakRelu(wrong=99).run(graph)
        assert result.rewrites == min(wanted, 10)
        fxopt.dialect.check(graph)
        torch.testing.assert_close(graph(x), model(x))


def test_bisection_takes_a_logarithmic_number_of_runs() -> None:
    model = nn.Sequential(*[nn.ReLU() for _ in range(1)])

    class Long(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(300):
                x = (x * 1.001).relu()
            return x

    runs = 0

    @dataclass(frozen=True)
    class Counted(BreakRelu):
        name: ClassVar[str] = "counted"

        def run(self, graph: GraphModule) -> PassResult:
            nonlocal runs
            runs += 1
            return super().run(graph)

    del model
    with pytest.raises(fxopt.VerifyError, match="number 123 of 300"):
        fxopt.optimize(Long(), torch.rand(4) + 0.5, passes=[Counted(wrong=123)])
    assert runs <= 16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"passes": ["fold-constant"]}, "Did you mean 'fold-constants'"),
        ({"passes": ["fold-constants(grow=2)"]}, "Did you mean 'growth'"),
        ({"passes": ["fold-constants(growth='x')"]}, "wants float, not 'x'"),
        ({"passes": ["fold-constants(growth=)"]}, "Cannot read the pass"),
        ({"passes": "fold-constants"}, "takes a list"),
        ({"passes": [BreakRelu]}, "is a class"),
        ({"passes": [3]}, "is not a pass"),
        ({"verify": "sometimes"}, "verify must be one of"),
        ({"on_error": "ignore"}, "on_error must be one of"),
        ({"precision": "int3"}, "precision must be one of"),
    ],
)
def test_wrong_options_get_an_error_that_helps(
    model: nn.Module, x: torch.Tensor, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(fxopt.OptionError, match=words):
        fxopt.optimize(model, x, **options)


def test_the_report_says_what_was_done_and_how_to_do_it_again(
    model: nn.Module, x: torch.Tensor
) -> None:
    graph = fxopt.optimize(model, x, passes=["fold-constants(growth=2.0)", "remove-dead-nodes"])
    text = str(graph.report)
    assert "fold-constants" in text and "verified: optimized graph" in text
    assert 'passes = ["fold-constants(growth=2.0)", "remove-dead-nodes"]' in text
    data = graph.report.to_json()
    assert data["final"]["nodes"] == 20 and data["verifications"][0]["passed"] is True
