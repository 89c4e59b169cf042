"""Scores of channels from weights alone, against plain loops over families built by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import fxopt
from fxopt.channels.groups import Family, Member, Role
from fxopt.errors import FxoptError, OptionError
from fxopt.pruning.importance import (
    L1,
    L2,
    BnScale,
    GeometricMedian,
    Importance,
    Lamp,
    Random,
    importance_of,
    score,
)
from fxopt.pruning.importance.naming import BY_NAME
from fxopt.pruning.importance.normalization import NORMALIZATIONS, normalized
from fxopt.testing import noisy
from tests.work import lines_run

WITHOUT_DATA = ("l1", "l2", "lamp", "geometric-median", "bn-scale", "random")


def member(constant: str, dim: int, role: Role, positions: Any) -> Member:
    return Member(constant, dim, role, np.asarray(positions).reshape(len(positions), -1))


class Convs(nn.Module):
    """conv → bn → relu → conv → flatten → linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 4, 3)
        self.head = nn.Linear(4 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.last(torch.relu(self.bn(self.conv(x))))
        return self.head(y.flatten(1))


INNER = Family(
    "conv", ("conv",), 6,
    (
        member("conv.weight", 0, Role.OUTPUT, np.arange(6)),
        member("conv.bias", 0, Role.SHIFT, np.arange(6)),
        member("bn.weight", 0, Role.SCALE, np.arange(6)),
        member("bn.bias", 0, Role.SHIFT, np.arange(6)),
        member("bn.running_mean", 0, Role.STATISTIC, np.arange(6)),
        member("bn.running_var", 0, Role.STATISTIC, np.arange(6)),
        member("last.weight", 1, Role.INPUT, np.arange(6)),
    ),
)  # fmt: skip
FLAT = Family(  # a channel of the image is 4 columns of the linear layer
    "last", ("last",), 4,
    (
        member("last.weight", 0, Role.OUTPUT, np.arange(4)),
        member("head.weight", 1, Role.INPUT, np.arange(16).reshape(4, 4)),
    ),
)  # fmt: skip


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 1)
        self.block = nn.Conv2d(5, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return torch.relu(x + self.norm(self.block(x)))


RESIDUAL = Family(
    "stem", ("stem", "block"), 5,
    (
        member("stem.weight", 0, Role.OUTPUT, np.arange(5)),
        member("block.weight", 1, Role.INPUT, np.arange(5)),
        member("block.weight", 0, Role.OUTPUT, np.arange(5)),
        member("norm.weight", 0, Role.SCALE, np.arange(5)),
    ),
)  # fmt: skip


class Heads(nn.Module):
    """Attention over 3 heads of 4, from one projection to queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 36)
        self.out = nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).reshape(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(2, 5, 12))


HEADS = Family(
    "qkv", ("qkv",), 3,
    (
        member("qkv.weight", 0, Role.OUTPUT, np.arange(36).reshape(3, 3, 4).transpose(1, 0, 2)),
        member("out.weight", 1, Role.INPUT, np.arange(12).reshape(3, 4)),
    ),
)  # fmt: skip


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 7, bias=False)
        self.down = nn.Linear(7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


HIDDEN = Family(
    "up", ("up",), 7,
    (
        member("up.weight", 0, Role.OUTPUT, np.arange(7)),
        member("down.weight", 1, Role.INPUT, np.arange(7)[::-1].copy()),
    ),
)  # fmt: skip

IMAGE = torch.randn(2, 3, 6, 6)
CASES: list[tuple[Callable[[], nn.Module], torch.Tensor, Family]] = [
    (Convs, IMAGE, INNER),
    (Convs, IMAGE, FLAT),
    (Residual, IMAGE, RESIDUAL),
    (Heads, torch.randn(2, 5, 6), HEADS),
    (Mlp, torch.randn(2, 4), HIDDEN),
]
each_case = pytest.mark.parametrize(
    ("build", "x", "family"), CASES, ids=["convs", "flat", "residual", "heads", "mlp"]
)


def captured(build: Callable[[], nn.Module], x: torch.Tensor) -> fxopt.GraphModule:
    return fxopt.capture(noisy(build()).eval(), x)


def weights(graph: fxopt.GraphModule, family: Family, channel: int, *roles: Role) -> torch.Tensor:
    """All weights of one channel in members of these roles, one after the other."""
    parts = []
    for one in family.members:
        if one.role in roles:
            tensor = graph.constant(one.constant).detach().double()
            parts += [tensor.select(one.dim, int(p)).flatten() for p in one.positions[channel]]
    return torch.cat(parts)


GROUP = (Role.OUTPUT, Role.INPUT, Role.SCALE)


# -- each kind, against its equation ---------------------------------------------------------------


@each_case
def test_l1_and_l2_are_norms_over_the_group(build: Any, x: Any, family: Family) -> None:
    graph = captured(build, x)
    groups = [weights(graph, family, c, *GROUP) for c in range(family.channels)]
    (l1,) = L1(normalize=None).scores(graph, [family])
    (l2,) = L2(normalize=None).scores(graph, [family])
    torch.testing.assert_close(l1, torch.stack([w.abs().sum() for w in groups]))
    torch.testing.assert_close(l2, torch.stack([w.norm() for w in groups]))
    assert l1.dtype == l2.dtype == torch.float64
    assert l1.argsort().tolist() != list(range(family.channels))  # the noise tells them apart


@each_case
def test_roles_choose_the_members_that_count(build: Any, x: Any, family: Family) -> None:
    graph = captured(build, x)
    (found,) = L2(normalize=None, roles=("output",)).scores(graph, [family])
    expected = [weights(graph, family, c, Role.OUTPUT).norm() for c in range(family.channels)]
    torch.testing.assert_close(found, torch.stack(expected))


@each_case
def test_geometric_median_is_the_sum_of_distances(build: Any, x: Any, family: Family) -> None:
    graph = captured(build, x)
    points = [weights(graph, family, c, Role.OUTPUT) for c in range(family.channels)]
    expected = [sum((a - b).norm() for b in points) for a in points]
    (found,) = GeometricMedian(normalize=None).scores(graph, [family])
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-9)  # type: ignore[arg-type]


def test_geometric_median_takes_wide_rows_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = captured(Convs, IMAGE)
    whole = GeometricMedian().scores(graph, [INNER])
    monkeypatch.setattr("fxopt.pruning.importance.median._COLUMNS", 7)
    torch.testing.assert_close(GeometricMedian().scores(graph, [INNER]), whole)


def test_a_channel_between_the_others_has_the_smallest_geometric_median() -> None:
    model = Mlp().eval()
    with torch.no_grad():
        model.up.weight.zero_()
        model.up.weight[:, 0] = torch.tensor([-9.0, -4.0, -1.0, 0.5, 1.0, 4.0, 9.0])
    (found,) = GeometricMedian().scores(fxopt.capture(model, torch.randn(2, 4)), [HIDDEN])
    assert int(found.argmin()) == 3  # though its norm is far from the largest or the smallest


@each_case
def test_lamp_divides_by_all_that_is_at_least_as_large(
    build: Any, x: Any, family: Family
) -> None:
    graph = captured(build, x)
    squares = [float(weights(graph, family, c, *GROUP).square().sum())
               for c in range(family.channels)]  # fmt: skip
    expected = [s / sum(t for t in squares if t >= s) for s in squares]
    (found,) = Lamp().scores(graph, [family])
    assert found.tolist() == pytest.approx(expected)
    assert float(found.max()) == pytest.approx(1)


def test_lamp_scores_equal_channels_alike_and_zeros_0() -> None:
    model = Mlp().eval()
    with torch.no_grad():
        for weight in (model.up.weight, model.down.weight):
            weight.fill_(1.0)
        model.up.weight[2] = 0
        model.down.weight[:, 4] = 0  # HIDDEN reads it backwards: column 4 is channel 2
    (found,) = Lamp().scores(fxopt.capture(model, torch.randn(2, 4)), [HIDDEN])
    assert found.tolist() == pytest.approx([1 / 6, 1 / 6, 0, 1 / 6, 1 / 6, 1 / 6, 1 / 6])


def test_bn_scale_is_the_mean_factor_of_the_norms() -> None:
    graph = captured(Convs, IMAGE)
    (found,) = BnScale().scores(graph, [INNER])
    torch.testing.assert_close(found, graph.constant("bn.weight").detach().abs().double())
    two = replace(INNER, members=(*INNER.members, member("bn.bias", 0, Role.SCALE, np.arange(6))))
    (mean,) = BnScale().scores(graph, [two])
    both = graph.constant("bn.weight").detach().abs() + graph.constant("bn.bias").detach().abs()
    torch.testing.assert_close(mean, both.double() / 2)


def test_bn_scale_without_a_norm_is_an_error_or_what_was_asked_for() -> None:
    graph = captured(Convs, IMAGE)
    with pytest.raises(FxoptError, match=r"1 of 2 families have none: 'last'.*fallback='l2'"):
        BnScale().scores(graph, [INNER, FLAT])
    flat, inner = BnScale(fallback="l1(normalize='max')").scores(graph, [FLAT, INNER])
    torch.testing.assert_close(flat, L1(normalize="max").scores(graph, [FLAT])[0])
    torch.testing.assert_close(inner, BnScale().scores(graph, [INNER])[0])
    with pytest.raises(OptionError, match="Unknown importance 'l3'"):
        BnScale(fallback="l3")


def test_random_is_the_same_for_a_seed_and_a_family() -> None:
    graph = captured(Convs, IMAGE)
    inner, flat = Random(seed=3).scores(graph, [INNER, FLAT])
    (again,) = Random(seed=3).scores(graph, [FLAT])
    assert torch.equal(flat, again)
    assert not torch.equal(Random(seed=4).scores(graph, [FLAT])[0], flat)
    assert len(set(inner.tolist())) == 6
    assert not torch.equal(inner[:4], flat)  # no family's draw is another's
    state = torch.random.get_rng_state()
    Random().scores(graph, [INNER])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_the_graph_stays_as_it_is(name: str) -> None:
    graph = captured(Convs, IMAGE)
    before = {key: tensor.detach().clone() for key, tensor in graph.constants().items()}
    importance_of(name).scores(graph, [INNER])
    assert all(torch.equal(before[key], now) for key, now in graph.constants().items())
    assert graph.info.shares_storage  # nobody asked for parameters() and copied them


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_scores_are_summed_in_float64(name: str, dtype: torch.dtype) -> None:
    model = noisy(Convs()).eval().to(dtype)
    narrow = fxopt.capture(model, IMAGE.to(dtype))
    wide = fxopt.capture(model.double(), IMAGE.double())
    kind = replace(importance_of(name), normalize=None)  # type: ignore[type-var]
    (found,), (expected,) = kind.scores(narrow, [INNER]), kind.scores(wide, [INNER])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


# -- normalisations --------------------------------------------------------------------------------


def test_normalizations() -> None:
    scores = torch.tensor([1.0, 2.0, 2.0, 5.0], dtype=torch.float64)
    expected = {
        "mean": [0.4, 0.8, 0.8, 2.0],
        "max": [0.2, 0.4, 0.4, 1.0],
        "sum": [0.1, 0.2, 0.2, 0.5],
        "gaussian": [-1.5 / 1.5, -0.5 / 1.5, -0.5 / 1.5, 2.5 / 1.5],
        "rank": [0.125, 0.5, 0.5, 0.875],
    }
    assert set(expected) == set(NORMALIZATIONS)
    for how, numbers in expected.items():
        assert normalized(scores, how).tolist() == pytest.approx(numbers), how
    assert normalized(scores, None).tolist() == scores.tolist()


@pytest.mark.parametrize("how", NORMALIZATIONS)
def test_normalizations_keep_the_order_and_know_zeros_and_one_channel(how: str) -> None:
    scores = torch.rand(50, dtype=torch.float64)
    assert torch.equal(normalized(scores, how).argsort(), scores.argsort())
    for few in (torch.zeros(3), torch.full((3,), 2.0), torch.ones(1), torch.zeros(0)):
        found = normalized(few.double(), how)
        assert len(found) == len(few) and torch.isfinite(found).all()
        assert len(set(found.tolist())) <= 1


def test_normalized_scores_of_wide_and_narrow_layers_compare() -> None:
    graph = captured(Convs, IMAGE)
    inner, flat = L2(normalize="mean").scores(graph, [INNER, FLAT])
    assert float(inner.mean()) == pytest.approx(1) and float(flat.mean()) == pytest.approx(1)


def test_an_unknown_normalization_or_role_is_an_error() -> None:
    with pytest.raises(OptionError, match=r"normalize='median'.*'mean', 'max', 'sum'"):
        L1(normalize="median")
    with pytest.raises(OptionError, match=r"roles=\('rows',\).*output, input, scale"):
        L1(roles=("rows",))
    with pytest.raises(OptionError, match="roles='output'"):
        L1(roles="output")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"roles=\(\)"):
        GeometricMedian(roles=())


def test_a_family_without_such_weights_is_an_error_that_names_it() -> None:
    graph = captured(Convs, IMAGE)
    with pytest.raises(FxoptError, match=r"family 'last' has none.*input, output"):
        L1(roles=("scale",)).scores(graph, [INNER, FLAT])


def test_weights_that_are_no_numbers_are_an_error_that_names_the_family() -> None:
    model = noisy(Convs()).eval()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    graph = fxopt.capture(model, IMAGE)
    with pytest.raises(FxoptError, match=r"1 scores that are no finite numbers.*'last'"):
        L2().scores(graph, [INNER, FLAT])


# -- names, objects, functions ---------------------------------------------------------------------


@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_names_resolve(name: str) -> None:
    one = importance_of(name)
    assert one.name == name and isinstance(one, Importance)


def test_options_are_written_as_those_of_passes() -> None:
    assert importance_of("l1(roles=('output',), normalize=None)") == L1(("output",), normalize=None)
    assert importance_of("random(seed=7)") == Random(seed=7)
    assert importance_of(L2()) == L2()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("l11", r"Unknown importance 'l11'. Did you mean 'l1'\? Known: .*bn-scale.*random"),
        ("l1(p=2)", r"Unknown option for 'l1': 'p'.*normalize, roles"),
        ("l1(", "Cannot read the importance"),
        (L1, "L1 is a class; pass an object"),
        (3, r"3 is no importance: give a name \(.*l1, l2.*\)"),
        (lambda graph: 0, "must take two arguments"),
    ],
)
def test_what_is_no_importance_is_an_error(spec: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        importance_of(spec)


def test_an_importance_in_a_file_is_named_by_its_place(tmp_path: Any) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import torch\ndef ones(graph, family):\n    return [1.0] * family.channels\n")
    (found,) = importance_of(f"{file}:ones").scores(captured(Mlp, torch.randn(2, 4)), [HIDDEN])
    assert found.tolist() == [1.0] * 7
    with pytest.raises(OptionError, match="no class and takes no options: leave out seed"):
        importance_of(f"{file}:ones(seed=1)")


def test_a_function_of_the_users_own() -> None:
    graph = captured(Convs, IMAGE)

    def biases(graph: fxopt.GraphModule, family: Family) -> torch.Tensor:
        return graph.constant(f"{family.layers[0]}.bias").abs()

    (found,) = importance_of(biases).scores(graph, [INNER])
    torch.testing.assert_close(found, graph.constant("conv.bias").detach().abs().double())


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda: torch.ones(5), r"shape \[5\] for the family 'conv'.*6 channels.*\[6\]"),
        (lambda: torch.ones(6, 1), r"shape \[6, 1\]"),
        (lambda: torch.tensor([1.0, float("nan"), 1, 1, 1, 1]), r"1 scores.*family 'conv'"),
        (lambda: torch.full((6,), float("inf")), "6 scores that are no finite numbers"),
        (lambda: None, "returned a NoneType for the family 'conv'"),
        (lambda: ["a"] * 6, "returned a list for the family 'conv'"),
        (lambda: 1 / 0, "failed for the family 'conv' with ZeroDivisionError"),
    ],
)
def test_a_function_that_returns_no_scores_is_an_error(returned: Any, words: str) -> None:
    graph = captured(Convs, IMAGE)

    def own(graph: Any, family: Any) -> Any:
        return returned()

    with pytest.raises(FxoptError, match=words):
        importance_of(own).scores(graph, [INNER])


@dataclass(frozen=True)
class Half:
    name: ClassVar[str] = "half"

    def scores(self, graph: Any, families: Any) -> list[torch.Tensor]:
        return [torch.ones(one.channels) for one in families][:1]


def test_the_scores_of_somebody_elses_importance_are_checked() -> None:
    graph = captured(Convs, IMAGE)
    (found,) = score(importance_of(Half()), graph, [INNER])
    assert found.dtype == torch.float64
    with pytest.raises(FxoptError, match="'half' returned 1 tensors of scores for 2 families"):
        score(Half(), graph, [INNER, FLAT])


def test_every_importance_has_its_name_and_its_words() -> None:
    for name, kind in BY_NAME.items():
        assert kind.name == name  # type: ignore[attr-defined]
        assert kind.__doc__


# -- large models ----------------------------------------------------------------------------------


def layers(width: int) -> tuple[fxopt.GraphModule, list[Family]]:
    model = nn.Sequential(
        nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
    )
    places = np.arange(width)
    families = [
        Family(
            str(place), (str(place),), width,
            (
                member(f"{place}.weight", 0, Role.OUTPUT, places),
                member(f"{place + 1}.weight", 1, Role.INPUT, places),
            ),
        )
        for place in (0, 1)
    ]  # fmt: skip
    return fxopt.capture(model.eval(), torch.randn(1, 3, 2, 2)), families


@pytest.mark.parametrize("kind", [L1(), L2(), Lamp(), Random()], ids=lambda kind: kind.name)
def test_no_python_runs_per_channel(kind: Importance) -> None:
    """A model of 8 million weights takes as many steps of Python as a small one."""
    small, large = layers(16), layers(2048)
    kind.scores(*small)  # what is done once for all
    few = lines_run(lambda: kind.scores(*small))
    assert lines_run(lambda: kind.scores(*large)) <= few + 50
