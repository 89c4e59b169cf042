"""The oracle agrees with weights cut by hand, and catches them cut in a wrong way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.dialect import retarget
from fxopt.graph_module import GraphModule
from tests.pruning.oracle_by_hand import Removed, Verdict, judge
from tests.pruning.subject import Net, conv
from tests.pruning.subjects import BY_NAME, captured


def cut(graph: GraphModule, removed: Removed) -> GraphModule:
    """Return a float64 copy of the graph with shorter constants; nothing else is adapted."""
    twin = retarget(graph, dtype=torch.float64)
    for name, cuts in removed.items():
        value = twin.constant(name).detach()
        for dim, indices in cuts.items():
            kept = [i for i in range(value.shape[dim]) if i not in set(indices)]
            value = value.index_select(dim, torch.tensor(kept))
        if isinstance(twin.constant(name), nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        twin.set_constant(name, value)
    return twin


def tried(
    model: nn.Module, inputs: Sequence[torch.Tensor], removed: Removed
) -> tuple[Verdict, float]:
    graph = fxopt.capture(model, tuple(inputs))
    verdict = judge(graph, removed, inputs)
    found = cut(graph, removed).run(*[x.double() for x in inputs])
    return verdict, verdict.error(found)


def subject(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return BY_NAME[name].model(), BY_NAME[name].inputs


Cuts = dict[str, Mapping[int, list[int]]]


def rows(layer: str, indices: Sequence[int], bias: bool = True) -> Cuts:
    found: Cuts = {f"{layer}.weight": {0: list(indices)}}
    return {**found, **({f"{layer}.bias": {0: list(indices)}} if bias else {})}


def norm(layer: str, indices: Sequence[int]) -> Cuts:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{layer}.{part}": {0: list(indices)} for part in parts}


@pytest.mark.parametrize("name", BY_NAME)
def test_nothing_removed_is_the_model_itself(name: str) -> None:
    graph = captured(name)
    wide = retarget(graph, dtype=torch.float64)
    flat = [x.double() if x.is_floating_point() else x for x in graph.info.example_inputs]
    verdict = judge(graph, {}, flat)
    assert not verdict.disagreements
    assert verdict.error(wide.run(*flat)) < 1e-12


def test_channels_behind_a_norm() -> None:
    removed = {**rows("a", [1, 6], bias=False), **norm("an", [1, 6]), "b.weight": {1: [1, 6]}}
    verdict, error = tried(*subject("conv_bn_relu"), removed)
    assert error < 1e-12 and not verdict.disagreements


def test_a_norm_cut_elsewhere_is_caught() -> None:
    removed = {**rows("a", [1, 6], bias=False), **norm("an", [1, 5]), "b.weight": {1: [1, 6]}}
    verdict, error = tried(*subject("conv_bn_relu"), removed)
    assert error > 1e-3
    assert verdict.disagreements == ["conv2d_1 reads removed channels: [5]"]


def test_a_channel_that_is_not_zero_at_zero_counts_as_zero() -> None:
    removed = {**rows("a", [0, 3]), "b.weight": {1: [0, 3]}}
    verdict, error = tried(*subject("not_zero_at_zero"), removed)
    assert error < 1e-12 and not verdict.disagreements


def test_columns_of_the_wrong_channels_are_caught() -> None:
    removed = {**rows("a", [0, 3]), "b.weight": {1: [0, 4]}}
    verdict, error = tried(*subject("not_zero_at_zero"), removed)
    assert error > 1e-3
    assert verdict.disagreements == [
        "conv2d_1 reads removed channels: [3]",
        "conv2d_1 has lost the columns of kept channels: [4]",
    ]


@pytest.mark.parametrize("name, places", [
    ("nchw_flatten", [12, 13, 14, 15]),
    ("nhwc_flatten", [3, 11, 19, 27]),
    ("transposed_flatten", [6, 7, 22, 23]),
])  # fmt: skip
@pytest.mark.parametrize("cut_at", [[12, 13, 14, 15], [3, 11, 19, 27], [6, 7, 22, 23]])
def test_each_flatten_has_its_own_columns(name: str, places: list[int], cut_at: list[int]) -> None:
    model, inputs = subject(name)
    removed = {**rows("a", [3]), "b.weight": {1: cut_at}}
    graph = fxopt.capture(model, inputs)
    verdict = judge(graph, removed, inputs)
    assert (not verdict.disagreements) == (cut_at == places)
    if name != "transposed_flatten":  # its reshape has the size baked in
        found = cut(graph, removed).run(*[x.double() for x in inputs])
        assert (verdict.error(found) < 1e-12) == (cut_at == places)


def test_columns_behind_a_permutation() -> None:
    model, inputs = subject("flip")
    right = {**rows("a", [0, 2]), "b.weight": {1: [7, 5]}}
    wrong = {**rows("a", [0, 2]), "b.weight": {1: [0, 2]}}
    assert tried(model, inputs, right)[1] < 1e-12
    verdict, error = tried(model, inputs, wrong)
    assert error > 1e-3 and len(verdict.disagreements) == 2


def test_products_of_activations_go_over_known_terms() -> None:
    """Dimensions of q and k go; behind a sigmoid each of them would be one half."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(m.q(x)) @ torch.sigmoid(m.k(x)).mT
    net = Net(forward, q=nn.Linear(6, 4), k=nn.Linear(6, 4)).eval()
    removed = {**rows("q", [1, 2]), **rows("k", [1, 2])}
    inputs = (torch.randn(2, 3, 6),)
    assert tried(net, inputs, removed)[1] < 1e-12
    apart = {**rows("q", [1, 2]), **rows("k", [0, 2])}
    assert tried(net, inputs, apart)[1] > 1e-3


def test_dimensions_of_one_head_and_values() -> None:
    removed = {
        **rows("q", [1, 2]), **rows("k", [1, 2], bias=False), **rows("v", [0]),
        "out.weight": {1: [0]},
    }  # fmt: skip
    verdict, error = tried(*subject("one_head"), removed)
    assert error < 1e-12 and not verdict.disagreements


def test_a_whole_head_of_one_operator() -> None:
    """A head's scores have no known term, its values are gone: the output's columns must be."""
    model, inputs = subject("separate_projections")
    removed = {**rows("q", [2, 3]), **rows("k", [2, 3], bias=False), **rows("v", [2, 3])}
    graph = fxopt.capture(model, inputs)
    verdict = judge(graph, {**removed, "out.weight": {1: [2, 3]}}, inputs)
    assert not verdict.leaks and not verdict.disagreements
    assert judge(graph, {**removed, "out.weight": {1: [4, 5]}}, inputs).disagreements


@pytest.mark.parametrize("name", ["softmax_over_channels", "mean_over_channels",
                                  "local_response_norm",
                                  "fourier_over_channels", "batch_statistics_of_everything"])
def test_behind_an_operator_that_mixes_channels_every_reader_reads_removed_ones(name: str) -> None:
    model, inputs = subject(name)
    graph = fxopt.capture(model, inputs)
    removed = {**rows("b", [2]), "c.weight": {1: [2]}}
    assert "reads removed channels" in judge(graph, removed, inputs).disagreements[-1]


def test_a_convolution_over_channels_has_other_neighbours_without_them() -> None:
    removed = {**rows("b", [2]), "c.weight": {1: [2]}}
    assert tried(*subject("efficient_channel_attention"), removed)[1] > 1e-3


def test_a_sum_over_channels_goes_over_the_rest() -> None:
    net = Net(lambda m, x: torch.sigmoid(m.a(x)).sum(1), a=conv(3, 8)).eval()
    assert tried(net, (torch.randn(2, 3, 5, 5),), rows("a", [1, 4]))[1] < 1e-12


def test_outputs_that_are_removed_leak() -> None:
    verdict, error = tried(*subject("conv_chain"), rows("c", [0]))
    assert verdict.leaks and error == float("inf")


def test_grouped_and_transposed_layers() -> None:
    model, inputs = subject("transposed")
    removed = {
        **rows("a", [7]), "up.weight": {0: [7], 1: [2, 3]}, "up.bias": {0: [2, 3]},
        "head.weight": {1: [2, 3]},
    }  # fmt: skip
    verdict, error = tried(model, inputs, removed)
    assert error < 1e-12 and not verdict.disagreements
    graph = fxopt.capture(*subject("depthwise"))
    removed = {
        **rows("a", [7]), **rows("d", [7], bias=False), **norm("dn", [7]), "b.weight": {1: [7]},
    }  # fmt: skip
    verdict = judge(graph, removed, BY_NAME["depthwise"].inputs)
    assert not verdict.leaks and not verdict.disagreements


def test_a_weight_that_is_computed_in_the_graph() -> None:
    removed = {**rows("a", [0]), "w": {0: [5], 1: [0]}, "b.weight": {1: [5]}}
    verdict, error = tried(*subject("transposed_weight"), removed)
    assert error < 1e-12 and not verdict.disagreements


def test_padding_alone_is_known() -> None:
    """A kernel's border places meet only padding: their value is the bias, and known."""
    net = Net(lambda m, x: m.b(F.relu(m.a(x))),
              a=conv(3, 4), b=nn.Conv2d(4, 2, 1, padding=1)).eval()
    removed = {**rows("a", [0]), "b.weight": {1: [0]}}
    assert tried(net, (torch.randn(1, 3, 4, 4),), removed)[1] < 1e-12
