"""What cannot work is refused in words, by the one who is to blame."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import fxopt
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter

aten = torch.ops.aten


class DividesByZero(nn.Module):
    """A channel divided by zero is infinite, or NaN where a folded weight would be 0 · ∞."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.register_buffer("divisor", torch.tensor([1.0, 0.0])[:, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) * (1 / self.divisor)


def test_infinite_coefficients_stay() -> None:
    model, x = DividesByZero().eval(), torch.randn(1, 3, 4, 4)
    compiled = fxopt.compile(model, x)
    assert torch.equal(compiled(x).isinf(), model(x).isinf())
    assert "not finite" in str([step.misses for step in compiled.story.steps])


def test_variance_of_zero_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, eps=0.0)).eval()
    model[1].running_var.zero_()
    graph = fxopt.optimize(model, torch.randn(1, 3, 4, 4))
    assert graph.find(aten.batch_norm.default)


@dataclass(frozen=True)
class ReluToSigmoid:
    name: ClassVar[str] = "relu-to-sigmoid"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        rewriter = Rewriter(graph)
        for node in graph.find(aten.relu.default):
            rewriter.replace(node, rewriter.insert(aten.sigmoid.default, node.args[0], before=node))
        return rewriter.result()


@pytest.mark.parametrize("verify", ["final", "each"])
def test_lossy_pass_is_no_error_of_the_backend(verify: str) -> None:
    x = torch.randn(2, 3)
    compiled = fxopt.compile(nn.ReLU(), x, passes=[ReluToSigmoid()], verify=verify)
    torch.testing.assert_close(compiled(x), x.sigmoid())


def test_update_with_another_architecture() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    compiled = fxopt.compile(model, torch.randn(1, 3, 4, 4))
    with pytest.raises(fxopt.FxoptError, match="same architecture"):
        compiled.update({**model.state_dict(), "0.weight": torch.zeros(1)})
    with pytest.raises(fxopt.FxoptError, match="state_dict"):
        compiled.update(None)  # type: ignore[arg-type]


def test_file_name_of_another_backend(tmp_path: Path) -> None:
    compiled = fxopt.compile(nn.ReLU(), torch.randn(2, 3))
    with pytest.raises(fxopt.FxoptError, match="suffix of the backend 'onnx'"):
        compiled.save(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
