"""What the eager backend's own passes make of a graph: `compiled.graph` stays as it was."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.testing import op_counts, relative_error


class Attention(nn.Module):
    """Attention by hand, of any rank."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def test_attention_with_a_fused_kernel_stays_one_call() -> None:
    inputs = tuple(torch.randn(2, 4, 16, 8) for _ in range(3))
    compiled = fxopt.compile(Attention(), inputs)
    assert op_counts(compiled.graph) == {"scaled_dot_product_attention": 1}
    assert op_counts(compiled.executable.graph) == {"scaled_dot_product_attention": 1}


def test_attention_without_a_fused_kernel_is_taken_apart() -> None:
    inputs = tuple(torch.randn(4, 16, 8) for _ in range(3))
    compiled = fxopt.compile(Attention(), inputs)
    assert op_counts(compiled.graph) == {"scaled_dot_product_attention": 1}
    assert op_counts(compiled.executable.graph) == {
        "mul": 1, "permute": 1, "matmul": 2, "softmax": 1
    }  # fmt: skip
    assert relative_error(compiled(*inputs), Attention()(*inputs)) <= 1e-6


class Inception(nn.Module):
    """Two 1×1 convolutions of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.a(x)) + F.relu(self.b(x)).sum(1, keepdim=True)


def test_convolutions_of_one_input_are_computed_as_one() -> None:
    model, x = Inception(), torch.randn(2, 8, 5, 5)
    compiled = fxopt.compile(model, x)
    assert op_counts(compiled.graph)["conv2d"] == 2
    assert op_counts(compiled.executable.graph)["conv2d"] == 1
    assert relative_error(compiled(x), model(x)) <= 1e-6


def test_new_weights_reach_layers_that_are_computed_as_one() -> None:
    model, x = Inception(), torch.randn(2, 8, 5, 5)
    compiled = fxopt.compile(model, x)
    trained = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    compiled.update(trained)
    model.load_state_dict(trained)
    assert relative_error(compiled(x), model(x)) <= 1e-6
