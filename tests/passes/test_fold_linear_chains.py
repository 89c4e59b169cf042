"""fold-linear-chains: which layers in a row become one, which do not, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxopt.capture import capture
from fxopt.passes.fold_linear_chains import FoldLinearChains
from fxopt.testing import check_pass, op_counts


class Calls(nn.Module):
    """A model made of named layers and a function of them and the input."""

    def __init__(self, call: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.call(self, *inputs)


def conv(inputs: int, outputs: int, kernel: Any = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **options)


# -- what folds ------------------------------------------------------------------------------------

FOLDED: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "linear": ([nn.Linear(4, 6), nn.Linear(6, 3)], (5, 4)),
    "linear of a sequence": ([nn.Linear(4, 4), nn.Linear(4, 4)], (2, 5, 4)),
    "as much work": ([nn.Linear(4, 2), nn.Linear(2, 4)], (5, 4)),
    "first without bias": ([nn.Linear(4, 6, bias=False), nn.Linear(6, 3)], (5, 4)),
    "second without bias": ([nn.Linear(4, 6), nn.Linear(6, 3, bias=False)], (5, 4)),
    "neither has a bias": (
        [nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)], (5, 4)
    ),
    "three": ([nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)], (5, 4)),
    "two, then the first": ([nn.Linear(8, 2), nn.Linear(2, 8), nn.Linear(8, 1)], (5, 8)),
    "1×1": ([conv(4, 6), conv(6, 3)], (2, 4, 5, 5)),
    "3×3, then 1×1": ([conv(4, 6, 3, padding=1), conv(6, 4)], (2, 4, 5, 5)),
    "strided 3×3, then strided 1×1": (
        [conv(4, 6, 3, padding=1, stride=(1, 2)), conv(6, 4, stride=2)], (2, 4, 8, 9)
    ),
    "dilated 3×3, then 1×1": ([conv(4, 6, 3, dilation=2), conv(6, 4)], (2, 4, 7, 8)),
    "1×1 without bias, then padded 3×3": (
        [conv(4, 6, bias=False), conv(6, 3, 3, padding=1, dilation=1)], (2, 4, 5, 5)
    ),
    "1×1, then 3×3 without padding": ([conv(4, 6), conv(6, 3, 3)], (2, 4, 5, 5)),
    "strided 1×1, then 3×3 without padding": (
        [conv(4, 6, stride=2), conv(6, 3, 3, dilation=2, stride=2)], (2, 4, 13, 14)
    ),
    "padded 1×1, then 3×3 without padding": ([conv(4, 6, padding=1), conv(6, 3, 3)], (2, 4, 5, 5)),
    "1×3, then 3×1": (
        [conv(1, 9, (1, 3), padding=(0, 1)), conv(9, 1, (3, 1))], (2, 1, 5, 5)
    ),
    "groups, then all": ([conv(4, 4, groups=2), conv(4, 2)], (2, 4, 5, 5)),
    "all, then groups": ([conv(4, 12), conv(12, 3, groups=3)], (2, 4, 5, 5)),
    "groups of groups": ([conv(8, 8, groups=4), conv(8, 4, 3, groups=2)], (2, 8, 5, 5)),
    "depthwise, then depthwise": (
        [conv(4, 4, bias=False, groups=4), conv(4, 8, 3, groups=4, padding=1)], (2, 4, 5, 5)
    ),
    "1d": ([nn.Conv1d(4, 6, 3, padding=1), nn.Conv1d(6, 4, 1)], (2, 4, 7)),
    "3d": ([nn.Conv3d(2, 4, 2), nn.Conv3d(4, 2, 1)], (1, 2, 3, 4, 5)),
    "not batched": ([conv(4, 6), conv(6, 3)], (4, 5, 5)),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDED)
def test_folds_into_one(case: str) -> None:
    layers, shape = FOLDED[case]
    graph, result = check_pass(
        FoldLinearChains(), nn.Sequential(*layers), torch.randn(shape), misses=[]
    )
    assert sum(op_counts(graph).values()) == 1
    assert result.rewrites == len(layers) - 1


def test_the_new_graph_reads_as_expected() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    check_pass(FoldLinearChains(), model, torch.randn(2, 4), text="""
%input_1: f64[2,4] = input
%_1_weight_product: f64[3,4] = constant '1.weight_product'
%_1_bias_product: f64[3] = constant '1.bias_product'
%linear_2: f64[2,3] = linear(%input_1, %_1_weight_product, %_1_bias_product)
return (%linear_2)
""")


def test_sizes_may_be_symbolic() -> None:
    model = nn.Sequential(conv(4, 6, 3, padding=1), conv(6, 4, stride=2))
    sizes = {0: "batch", 2: "height"}
    check_pass(
        FoldLinearChains(), model, torch.randn(2, 4, 7, 7), dynamic_shapes=sizes, rewrites=1
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_keep_their_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).to(dtype)
    x = torch.randn(5, 4).to(dtype)
    check_pass(
        FoldLinearChains(), model, x, rewrites=1, double=False, gradients=False,
        tolerance=20 * torch.finfo(dtype).eps,
    )


# -- what does not ---------------------------------------------------------------------------------

KEPT: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "a bottleneck": (
        nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8)), (5, 8),
        "the product has 64 weights, and the two have 16 + 16",
    ),
    "depthwise, then 1×1": (
        nn.Sequential(conv(4, 4, 3, groups=4), conv(4, 6)), (2, 4, 5, 5), "the product has 216"
    ),
    "a bias under zeros": (
        nn.Sequential(conv(4, 6), conv(6, 3, 3, padding=1)), (2, 4, 5, 5), "the first has a bias"
    ),
    "a stride under zeros": (
        nn.Sequential(conv(4, 6, stride=2, bias=False), conv(6, 3, 3, padding=1)), (2, 4, 5, 5),
        "pads what the first computes",
    ),
    "a padded 1×1": (
        nn.Sequential(conv(4, 6, bias=False), conv(6, 3, padding=1)), (2, 4, 5, 5),
        "more positions",
    ),
    "3×3, then 3×3": (
        nn.Sequential(conv(4, 6, 3), conv(6, 3, 3)), (2, 4, 7, 7), "several taps along an axis"
    ),
    "two groups, then three": (
        nn.Sequential(conv(6, 6, groups=2), conv(6, 6, groups=3)), (2, 6, 5, 5), "the groups"
    ),
    "one side more": (
        nn.Sequential(conv(4, 6, 2, padding="same"), conv(6, 3)), (2, 4, 5, 5), "one side more"
    ),
    "the same weight twice": (
        Calls(lambda m, x: m.a(m.a(x)), a=nn.Linear(4, 4)), (5, 4), "weight is used elsewhere"
    ),
    "another user": (
        Calls(lambda m, x: (m.b(y := m.a(x)), y), a=nn.Linear(4, 4), b=nn.Linear(4, 4)), (5, 4),
        "linear is used elsewhere too",
    ),
    "an activation": (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), (5, 4), ""),
    "a reshape": (
        nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2)), nn.Linear(2, 2)), (5, 4), ""
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_stays_two(case: str) -> None:
    model, shape, reason = KEPT[case]
    misses = [reason] if reason else []
    check_pass(FoldLinearChains(), model, torch.randn(shape), rewrites=0, misses=misses)


def test_weights_that_are_computed_prevent_it() -> None:
    def call(m: Calls, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return m.a(torch.nn.functional.linear(x, w))  # type: ignore[no-any-return, operator]

    inputs = (torch.randn(5, 4), torch.randn(4, 4))
    model = Calls(call, a=nn.Linear(4, 4))
    check_pass(FoldLinearChains(), model, inputs, rewrites=0, misses=["weight of linear is not"])


def test_a_weight_of_another_layer_prevents_it() -> None:
    def call(m: Calls, x: torch.Tensor) -> Any:
        return m.b(m.a(x)), m.a(x.relu())  # type: ignore[operator]

    model = Calls(call, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    check_pass(FoldLinearChains(), model, torch.randn(5, 4), rewrites=0, misses=["used elsewhere"])


def test_hundreds_of_layers_in_a_row() -> None:
    graph = capture(nn.Sequential(*(nn.Linear(2, 2) for _ in range(300))), torch.randn(1, 2))
    assert FoldLinearChains().run(graph).rewrites == 299
    assert len(graph.info.recipes) <= 600
