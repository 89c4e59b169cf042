"""sparsify-weights: exactly the zeros that were asked for, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt import dialect
from fxopt.bisection import bisect
from fxopt.contract import PassResult
from fxopt.errors import FxoptError, OptionError, VerifyError
from fxopt.passes import DEFAULT, SparsifyWeights
from fxopt.pruning.sparsity import Blocks, keep_zeros, largest, shortfall, zeros
from fxopt.testing import noisy


class Net(nn.Module):
    """A convolution over 3 channels, one over 8, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(self.stem(x))).mean((2, 3)))


X = torch.randn(2, 3, 8, 8)
STEM, BODY, HEAD = 3 * 8 * 9, 8 * 4 * 9, 40


def sparsified(
    model: nn.Module, x: Any, **options: Any
) -> tuple[fxopt.GraphModule, PassResult]:
    """Run the pass on a noisy model; the graph is legal, and a second run does nothing."""
    graph = fxopt.capture(noisy(model).eval(), x)
    before = {name: t.detach().clone() for name, t in graph.constants().items()}
    one = SparsifyWeights(**options)
    result = one.run(graph)
    dialect.check(graph)
    again = one.run(graph)
    assert not again.modified
    if result.modified:
        kept = {name.removesuffix("_sparse") for name in graph.constants()}
        assert kept == set(before)
    for name, tensor in graph.constants().items():
        old = before[name.removesuffix("_sparse")]
        assert torch.equal(tensor.detach()[tensor != 0], old[tensor != 0]), name
        if not name.endswith("_sparse"):
            assert torch.equal(tensor.detach(), old)
    return graph, result


def counted(graph: fxopt.GraphModule) -> dict[str, int]:
    """How many zeros each weight has."""
    return {
        name.removesuffix("_sparse"): int((tensor == 0).sum())
        for name, tensor in graph.constants().items()
        if name.removesuffix("_sparse").endswith("weight")
    }


# -- shares ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_each_layer_gets_its_share_of_zeros(ratio: float) -> None:
    graph, result = sparsified(Net(), X, sparsity=ratio)
    expected = {"stem": STEM, "body.1": BODY, "head": HEAD}
    assert counted(graph) == {
        f"{name}.weight": int(ratio * size + 0.5) for name, size in expected.items()
    }
    assert result.rewrites == (3 if ratio else 0) and not result.misses


def test_the_smallest_go() -> None:
    graph, _ = sparsified(Net(), X, sparsity=0.3)
    original = noisy(Net()).head.weight.detach()  # type: ignore[union-attr]
    kept = graph.constant("head.weight_sparse").detach() != 0
    assert float(original[~kept].abs().max()) < float(original[kept].abs().min())


def test_all_layers_together() -> None:
    graph, _ = sparsified(Net(), X, sparsity=0.4, scope="global")
    found = counted(graph)
    assert sum(found.values()) == int(0.4 * (STEM + BODY + HEAD) + 0.5)
    limit = max(
        float(old.detach().abs()[graph.constant(f"{name}_sparse") == 0].max())
        for name, old in noisy(Net()).named_parameters() if name in found
    )  # fmt: skip
    for name in found:
        kept = graph.constant(f"{name}_sparse").detach()
        assert float(kept[kept != 0].abs().min()) >= limit


def test_equal_weights_go_in_order_and_no_more_than_asked_for() -> None:
    model = nn.Linear(10, 1, bias=False).eval()
    nn.init.constant_(model.weight, -2.0)
    graph = fxopt.capture(model, torch.randn(1, 10))
    SparsifyWeights(0.3).run(graph)
    assert graph.constant("weight_sparse").tolist() == [[0.0] * 3 + [-2.0] * 7]


def test_of_equal_scores_the_first_go() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0, 2.0, 2.0])
    for removed, kept in ((1, [1, 0, 1, 1, 1, 1]), (3, [1, 0, 0, 0, 1, 1]), (6, [0] * 6)):
        assert largest(scores, removed).int().tolist() == kept


# -- patterns --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "3:4", "1:2"])
def test_patterns_run_along_the_inputs(pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 24))
    graph, result = sparsified(model, torch.randn(2, 8, 4, 4), sparsity=pattern)
    conv, linear = graph.constant("0.weight_sparse"), graph.constant("2.weight_sparse")
    blocks = (conv != 0).reshape(16, -1, m, 3, 3).sum(2)
    assert (blocks == n).all()
    assert ((linear != 0).reshape(24, -1, m).sum(2) == n).all()
    assert result.rewrites == 2 and not result.misses


def test_a_pattern_keeps_the_largest_of_each_block() -> None:
    model = nn.Linear(8, 1, bias=False).eval()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -4, 3, 2, 5, 5, 5, 5]]))
    graph = fxopt.capture(model, torch.randn(1, 8))
    SparsifyWeights("2:4").run(graph)
    assert graph.constant("weight_sparse").tolist() == [[0, -4, 3, 0, 5, 5, 0, 0]]


def test_inputs_that_are_no_multiple_stay_dense_and_say_so() -> None:
    graph, result = sparsified(Net(), X, sparsity="2:4")
    assert counted(graph) == {"stem.weight": 0, "body.1.weight": BODY // 2, "head.weight": 20}
    (miss,) = result.misses
    assert miss.node == "stem_weight"
    assert miss.reason == (
        "'stem.weight' stays dense: its 3 inputs are no multiple of 4, as 2:4 needs"
    )


class Products(nn.Module):
    """Products with a constant on either side, and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.right, self.left = nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.randn(3, 4))
        self.up = nn.ConvTranspose1d(4, 3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x @ self.right @ self.left @ torch.ones(4, 5))


def test_products_and_transposed_convolutions_have_their_inputs_elsewhere() -> None:
    graph, result = sparsified(Products(), torch.randn(2, 4, 8), sparsity="2:4")
    right, up = graph.constant("right_sparse"), graph.constant("up.weight_sparse")
    assert ((right != 0).reshape(2, 4, 3).sum(1) == 2).all()
    assert ((up != 0).reshape(1, 4, 3, 2).sum(1) == 2).all()
    assert [miss.reason for miss in result.misses if "'left'" in miss.reason] == [
        "'left' stays dense: its 3 inputs are no multiple of 4, as 2:4 needs"
    ]


def test_a_product_from_the_left() -> None:
    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight @ x

    graph, _ = sparsified(Left(), torch.randn(2, 8, 5), sparsity="1:4")
    assert ((graph.constant("weight_sparse") != 0).reshape(3, 2, 4).sum(2) == 1).all()


# -- which layers ----------------------------------------------------------------------------------


def test_overrides_and_keep_choose_layers_by_path() -> None:
    options = {"overrides": {"body.*": 0.9, "[bs]*": 0.25}, "keep": ("head",)}
    graph, _ = sparsified(Net(), X, sparsity=0.5, **options)
    assert counted(graph) == {
        "stem.weight": STEM // 4, "body.1.weight": int(0.9 * BODY + 0.5), "head.weight": 0,
    }  # fmt: skip


def test_a_layer_with_a_share_of_its_own_is_no_part_of_the_whole() -> None:
    options: dict[str, Any] = {"overrides": {"stem": 0.0, "head": "2:4"}, "scope": "global"}
    graph, _ = sparsified(Net(), X, sparsity=0.5, **options)
    assert counted(graph) == {"stem.weight": 0, "body.1.weight": BODY // 2, "head.weight": 20}


def test_a_pattern_that_fits_no_layer_is_an_error() -> None:
    graph = fxopt.capture(Net().eval(), X)
    with pytest.raises(OptionError, match=r"'hed'. Did you mean 'head'\? Known: body.1, head"):
        SparsifyWeights(keep=("hed",)).run(graph)
    with pytest.raises(OptionError, match=r"'blocks.\*'"):
        SparsifyWeights(overrides={"blocks.*": 0.1}).run(graph)


def test_a_module_that_is_called_twice_is_pruned_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.relu(self.layer(x)))

    graph, result = sparsified(Twice(), torch.randn(2, 8), sparsity=0.5)
    assert counted(graph) == {"layer.weight": 32} and result.rewrites == 1


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(x))


def test_a_weight_that_an_embedding_reads_stays() -> None:
    _, result = sparsified(Tied(), torch.tensor([[1, 2]]), sparsity=0.5)
    assert not result.modified
    assert [m.reason for m in result.misses] == [
        "'table.weight' stays dense: embedding reads it, too, as something else than the weight of "
        "a layer"
    ]


def test_a_weight_that_two_layers_read_along_different_dimensions_stays() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight) @ self.weight

    _, result = sparsified(Both(), torch.randn(2, 4), sparsity="2:4")
    assert not result.modified and "different dimensions" in result.misses[0].reason


def test_computed_and_recurrent_weights_stay_and_say_so() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.rnn = nn.Parameter(torch.randn(4, 4)), nn.LSTM(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(x @ self.weight.t())[0]

    _, result = sparsified(Turned(), torch.randn(2, 2, 4))
    reasons = [miss.reason for miss in result.misses]
    assert any("its weight is computed from 'weight' by permute" in reason for reason in reasons)
    assert any("recurrent layers stay dense" in reason for reason in reasons)
    assert not result.modified


# -- importance ------------------------------------------------------------------------------------


def test_a_function_of_the_users_own_scores_each_weight() -> None:
    seen = []

    def by_position(graph: Any, name: str, weight: torch.Tensor) -> torch.Tensor:
        seen.append(name)
        weight.zero_()  # a copy: the graph keeps its own
        return torch.arange(weight.numel()).reshape(weight.shape)

    graph, _ = sparsified(Net(), X, sparsity=0.5, importance=by_position)
    assert counted(graph)["head.weight"] == 20
    assert (graph.constant("head.weight_sparse").flatten()[20:] != 0).all()
    assert seen[:3] == ["stem.weight", "body.1.weight", "head.weight"]


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (lambda g, n, w: w.sum(0), r"scores of shape \[3, 3, 3\] for 'stem.weight'"),
        (lambda g, n, w: w * float("nan"), "'stem.weight', has scores that are no finite numbers"),
        (lambda g, n, w: 1 / 0, "failed for 'stem.weight' with ZeroDivisionError"),
    ],
)
def test_a_function_that_returns_no_scores_is_an_error(own: Any, words: str) -> None:
    graph = fxopt.capture(Net().eval(), X)
    with pytest.raises(FxoptError, match=words):
        SparsifyWeights(importance=own).run(graph)
    assert set(zeros(graph).values()) == {0.0}


def test_weights_that_are_no_numbers_are_an_error() -> None:
    model = Net().eval()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(FxoptError, match=r"'head.weight' has scores that are no finite"):
        SparsifyWeights().run(fxopt.capture(model, X))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 1.5}, "a share between 0 and 1, or a pattern"),
        ({"sparsity": True}, "sparsity=True"),
        ({"sparsity": "4:2"}, "'4:2' is no pattern"),
        ({"sparsity": "half"}, "'half' is no pattern"),
        ({"overrides": {"a": -0.1}}, "sparsity=-0.1"),
        ({"scope": "model"}, r"scope='model': it is one of 'layer', 'global'"),
        ({"importance": "l2"}, "importance='l2'"),
        ({"keep": "head"}, r"write keep=\('head',\)"),
    ],
)
def test_wrong_options_are_errors(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        SparsifyWeights(**options)


# -- its own verification --------------------------------------------------------------------------


def test_a_mask_that_keeps_too_much_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "fxopt.passes.sparsify_weights"
    monkeypatch.setattr(f"{module}.largest", lambda scores, removed: torch.ones_like(scores) > 0)
    monkeypatch.setattr(
        f"{module}.largest_in_blocks", lambda scores, blocks, dim: torch.ones_like(scores) > 0
    )
    with pytest.raises(VerifyError, match="0 of its weights are 0, not 108"):
        SparsifyWeights(0.5).run(fxopt.capture(noisy(Net()).eval(), X))
    with pytest.raises(VerifyError, match="72 blocks keep more than 2:4"):
        SparsifyWeights("2:4").run(fxopt.capture(noisy(Net()).eval(), X))
    with pytest.raises(VerifyError, match="lose 0 weights, not 272"):
        SparsifyWeights(0.5, scope="global").run(fxopt.capture(noisy(Net()).eval(), X))


def test_what_is_counted() -> None:
    weight = torch.tensor([[1.0, 0, 2, 3], [0, 0, 0, 1]])
    assert shortfall(weight, 1, Blocks(3, 4)) is None
    assert shortfall(weight, 1, Blocks(2, 4)) == "1 blocks keep more than 2:4"
    assert shortfall(weight, 0, Blocks(1, 2)) == "1 blocks keep more than 1:2"
    assert shortfall(weight, 1, 4) is None and shortfall(weight, 1, 5) is not None


def test_the_result_says_what_became_sparse() -> None:
    _, result = sparsified(Net(), X, sparsity="2:4")
    record = result.details
    assert str(record) == "in 2 layers 164 of 328 weights are 0 (50.00%); 1 stayed dense"
    assert record.table().splitlines() == [
        "body.1  144 of 288 weights are 0 (50.00%)", "head    20 of 40 weights are 0 (50.00%)",
    ]  # fmt: skip
    graph = fxopt.optimize(noisy(Net()).eval(), X, passes=[SparsifyWeights(0.1, scope="global")])
    (step,) = graph.story.steps
    assert str(step.details) == "in 3 layers 54 of 544 weights are 0 (9.93%)"
    assert str(step.details) in str(graph.report)
    assert sum(share.zeros for share in step.details.shares) == 54
    assert sparsified(Net(), X, sparsity=0.0)[1].details is None


# -- the graph around it ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_half_precision(dtype: torch.dtype, sparsity: Any) -> None:
    graph, _ = sparsified(nn.Linear(64, 32).to(dtype), torch.randn(2, 64).to(dtype),
                          sparsity=sparsity)  # fmt: skip
    weight = graph.constant("weight_sparse")
    assert weight.dtype is dtype and int((weight == 0).sum()) == 1024


def test_in_the_pipeline_with_the_default_passes_and_new_weights() -> None:
    model = noisy(Net()).eval()
    compiled = fxopt.compile(model, X, passes=[SparsifyWeights("1:2", keep=("stem",)), "default"])
    assert "sparsify-weights" not in {one.name for one in DEFAULT}
    pruned = copy.deepcopy(model)
    mask = {}
    for name, layer in (("body.1", pruned.body[1]), ("head", pruned.head)):  # type: ignore[index]
        first, second = layer.weight.data.unflatten(1, (-1, 2)).abs().unbind(2)
        mask[name] = torch.stack([first >= second, second > first], 2).flatten(1, 2)
        layer.weight.data *= mask[name]
    torch.testing.assert_close(compiled(X), pruned(X))
    other = noisy(copy.deepcopy(model), seed=5)
    compiled.update(other.state_dict())
    for name, layer in (("body.1", other.body[1]), ("head", other.head)):  # type: ignore[index]
        layer.weight.data *= mask[name]
    torch.testing.assert_close(compiled(X), other(X))


def test_the_model_stays_as_it_is() -> None:
    model = noisy(Net()).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fxopt.optimize(model, X, passes=["sparsify-weights(sparsity='2:4')"])
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_requires_grad_stays() -> None:
    model = noisy(Net()).eval()
    model.stem.weight.requires_grad_(False)
    graph = fxopt.optimize(model, X, passes=[SparsifyWeights()])
    trainable = {name for name, p in graph.named_parameters() if p.requires_grad}
    assert "head.weight_sparse" in trainable
    assert not graph.constant("stem.weight_sparse").requires_grad


def test_it_can_be_stopped_at_any_rewrite() -> None:
    """Bisection over a user's metric needs that each weight is one rewrite."""
    found = bisect(
        noisy(Net()).eval(), X, passes=[SparsifyWeights(0.5)],
        oracle=lambda graph: zeros(graph).get("body.1.weight_sparse", 0.0) == 0.0,
    )  # fmt: skip
    assert found.guilty is not None and found.guilty.name == "sparsify-weights"
    assert (found.number, found.total) == (2, 3)


# -- training on -----------------------------------------------------------------------------------


OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    lambda p: torch.optim.Adam(p, 0.01),
    lambda p: torch.optim.AdamW(p, 0.01),
    lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9),
]


def train(graph: fxopt.GraphModule, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        graph(torch.randn_like(X)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_keep_zeros_keeps_them_through_training(build: Any) -> None:
    graph = fxopt.optimize(noisy(Net()).eval(), X, passes=[SparsifyWeights(0.5)])
    train(graph.train(), build(graph.parameters()))
    assert max(zeros(graph).values()) < 0.1  # without it they are gone after a step

    graph = fxopt.optimize(noisy(Net()).eval(), X, passes=[SparsifyWeights(0.5)])
    weight = graph.constant("head.weight_sparse")
    gone, start = weight == 0, weight.detach().clone()
    optimizer = build(graph.parameters())
    with keep_zeros(graph) as kept:
        train(graph, optimizer)
        assert (graph.constant("head.weight_sparse")[gone] == 0).all()
    assert set(kept.weights) == {f"{n}.weight_sparse" for n in ("stem", "body.1", "head")}
    assert set(zeros(graph).values()) == {0.5}
    assert not torch.equal(graph.constant("head.weight_sparse").detach(), start)
    train(graph, optimizer, 1)
    assert max(zeros(graph).values()) < 0.5  # and no longer, once the block is left


def test_keep_zeros_leaves_other_models_and_layers_alone() -> None:
    graph = fxopt.optimize(noisy(Net()).eval(), X, passes=[SparsifyWeights(0.5)])
    other = nn.Linear(4, 4)
    with torch.no_grad():
        other.weight[:2] = 0
    optimizer = torch.optim.SGD([*graph.parameters(), *other.parameters()], 0.1)
    with keep_zeros(graph, ("head",)) as kept:
        assert set(kept.weights) == {"head.weight_sparse"} and len(kept) == 1
        other(torch.ones(4)).sum().backward()
        train_once = graph(X).square().sum()
        train_once.backward()
        optimizer.step()
    assert (other.weight != 0).all()
    found = zeros(graph)
    assert found["head.weight_sparse"] == 0.5 and found["body.1.weight_sparse"] < 0.3


def test_keep_zeros_restores_by_hand_and_at_the_end() -> None:
    graph = fxopt.optimize(noisy(Net()).eval(), X, passes=[SparsifyWeights(0.5)])
    weight = graph.constant("head.weight_sparse")
    with keep_zeros(graph) as kept:
        with torch.no_grad():
            weight.add_(1)
        kept.restore()
        assert int((graph.constant("head.weight_sparse") == 0).sum()) == 20
        with torch.no_grad():
            graph.constant("head.weight_sparse").add_(1)
    assert int((graph.constant("head.weight_sparse") == 0).sum()) == 20


def test_keep_zeros_without_zeros_is_an_error_and_leaves_initial_zeros() -> None:
    model = noisy(Net()).eval()
    with torch.no_grad():
        model.head.weight.zero_()
    graph = fxopt.capture(model, X)
    error = pytest.raises(OptionError, match=r"No trainable weight of the layers \* has zeros")
    with error, keep_zeros(graph):
        pass


def test_keep_zeros_does_not_touch_the_captured_model() -> None:
    model = noisy(Net()).eval()
    with torch.no_grad():
        model.head.weight[:2] = 0
    graph = fxopt.capture(model, X)
    with keep_zeros(graph):
        with torch.no_grad():
            model.head.weight.fill_(3)
        graph.constant("head.weight").data.fill_(2)
    assert (model.head.weight == 3).all()
    assert (graph.constant("head.weight")[:2] == 0).all()
