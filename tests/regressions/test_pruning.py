"""Pruned wrongly, refused or misreported once: the smallest models that showed it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt.dialect import retarget
from fxopt.errors import OptionError, VerifyError
from fxopt.passes import PruneChannels
from fxopt.pruning.stepwise import pruning_record
from fxopt.testing import noisy, relative_error


class Net(nn.Module):
    """Layers by name, and a function of them and of the input."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def net(function: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> nn.Module:
    torch.manual_seed(0)
    return noisy(Net(function, **layers).eval())


def widths(model: nn.Module, x: torch.Tensor, **options: Any) -> dict[str, int]:
    graph = retarget(fxopt.capture(model, x), dtype=torch.float64)
    record = PruneChannels(**options).run(graph).details
    assert record.error <= 1e-11
    return {one.name: one.after for one in record.widths}


@pytest.mark.parametrize(
    "weight",
    [
        lambda w: w / w.abs().sum(),
        lambda w: w / (w * w).sum(0).sqrt(),
        lambda w: w - w.sum(0, keepdim=True) / 8,
        lambda w: w @ w.T @ w,
        lambda w: w / torch.einsum("ij,ij->", w, w),
        lambda w: F.linear(w, w.T @ w),
    ],
)
def test_a_weight_computed_by_a_sum_is_cut_by_its_value(weight: Any) -> None:
    """Its sum was taken for a contraction that reads the channels, and lost some of its terms."""
    model = net(lambda m, x: m.b(F.relu(F.linear(x, weight(m.w)))),
                w=nn.Parameter(torch.randn(8, 6)), b=nn.Linear(8, 3))  # fmt: skip
    x = torch.randn(4, 6)
    graph = retarget(fxopt.capture(model, x), dtype=torch.float64)
    PruneChannels(ratio=0.5, importance=lambda graph, family: torch.arange(8.0)).run(graph)
    model.double()
    with torch.no_grad():
        hidden = F.relu(F.linear(x.double(), weight(model.w)))
        hidden[:, :4] = 0
        expected = model.b(hidden)
    assert relative_error(graph(x.double()), expected) < 1e-12


def test_a_dynamic_size_that_equals_a_width_by_chance() -> None:
    """A reshape was followed at the example's sizes, and was wrong for others."""

    def turned(m: Any, x: torch.Tensor) -> Any:
        y = m.a(x).transpose(1, 2)  # [batch, 8, length]
        return m.o(y.reshape(y.shape[0], y.shape[2], 8))

    model = net(turned, a=nn.Linear(4, 8), o=nn.Linear(8, 3))
    for length in (2, 4, 8):
        graph = fxopt.prune(
            model, torch.randn(2, length, 4), dynamic_shapes={"x": {1: "length"}}
        )
        assert pruning_record(graph).channels == (0, 0)
        x = torch.randn(2, 5, 4)
        assert torch.equal(graph(x), model(x))


def test_two_heads_of_keys_for_eight_of_queries() -> None:
    def heads(y: torch.Tensor, count: int) -> torch.Tensor:
        return y.view(y.shape[0], y.shape[1], count, -1).transpose(1, 2)

    model = net(
        lambda m, x: m.o(F.scaled_dot_product_attention(
            heads(m.q(x), 8), heads(m.k(x), 2), heads(m.v(x), 2), enable_gqa=True
        ).transpose(1, 2).flatten(2)),
        q=nn.Linear(8, 32), k=nn.Linear(8, 8), v=nn.Linear(8, 8), o=nn.Linear(32, 8),
    )  # fmt: skip
    assert widths(model, torch.randn(2, 5, 8)) == {"q": 1}


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.mix @ F.scaled_dot_product_attention(m.rows @ x, x, x, is_causal=True),
        lambda m, x: m.o(torch.roll(m.a(x), (1, 2), (2, 2))[..., :3]),
        lambda m, x: m.o(torch.cat([m.a(x), m.a(x)[..., 8:]], -1)[..., :3]),
        lambda m, x: m.o(m.a(x).repeat_interleave(2, dim=2, output_size=16)[..., :3]),
        lambda m, x: m.o(torch.frexp(m.a(x))[0][..., :3]),
        lambda m, x: m.o(F.linear(m.a(x), m.b.weight[0]).unsqueeze(-1).expand(-1, -1, 3)),
        lambda m, x: m.o(F.linear(m.a(x), m.b.weight, x[0, :1, :3].expand(5, 3))),
        lambda m, x: m.o(torch.fft.rfft2(m.a(x), dim=(1, 2)).real[..., :3]),
        lambda m, x: m.o(F.dropout(m.a(x), 0.5, True)[..., :3]),
        lambda m, x: m.o(m.a(x).var(0)[..., :3]),
    ],
)  # fmt: skip
def test_rare_calls_are_followed_or_frozen(function: Any) -> None:
    model = net(
        function, a=nn.Linear(3, 8), b=nn.Linear(8, 3), o=nn.Linear(3, 2),
        rows=nn.Parameter(torch.randn(6, 5)), mix=nn.Parameter(torch.randn(4, 6)),
    )  # fmt: skip
    widths(model, torch.randn(2, 5, 3))


def test_a_strided_part_is_overwritten() -> None:
    def overwrite(m: Any, x: torch.Tensor) -> Any:
        y = m.a(x).clone()
        y[:, ::2] = m.b(x)
        return m.o(y)

    model = net(overwrite, a=nn.Linear(3, 8), b=nn.Linear(3, 4), o=nn.Linear(8, 2))
    assert widths(model, torch.randn(2, 3)) == {}


def test_the_proof_does_not_rest_on_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an image of zeros a wrong cut of what reads it looks right."""
    from fxopt.pruning import mending

    def wrong(self: mending.Kept, tensor: torch.Tensor) -> torch.Tensor:
        ((dim, places),) = self.kept  # rows from the end, columns from the beginning
        return tensor.narrow(dim, 0 if dim else 4, len(places))

    monkeypatch.setattr(mending.Kept, "__call__", wrong)
    model = nn.Sequential(nn.Linear(3, 8, bias=False), nn.ReLU(), nn.Linear(8, 2))
    graph = fxopt.capture(model.eval(), torch.zeros(2, 3))
    with pytest.raises(VerifyError, match="not the original"):
        PruneChannels(importance=lambda graph, family: torch.arange(8.0)).run(graph)


def test_frozen_parameters_stay_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).requires_grad_(False)
    graph = fxopt.prune(model, torch.randn(2, 4))
    parameters = list(graph.parameters())
    left = pruning_record(graph).parameters[1]
    assert left == sum(p.numel() for p in parameters) == 4 * 5 + 2 * 5
    assert not any(p.requires_grad for p in parameters)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("options", "after"),
    [
        ({"ratio": 0.5, "overrides": {"0": 0.25}}, [48, 32]),
        ({"ratio": 0.5, "keep": ("0",)}, [64, 32]),
        ({"ratio": 0.9, "max_ratio": 0.5}, [32, 32]),
        ({"ratio": 0.5, "round_to": 8}, [32, 32]),
        ({"ratio": 0.5, "scope": "global"}, None),
    ],
)
def test_steps_end_where_one_step_does(steps: int, options: Any, after: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    )
    graph = fxopt.prune(model, torch.randn(2, 8), steps=steps, **options)
    found = [graph.constants()[name].shape[0] for name in graph.constants() if "weight" in name]
    kept = sorted(found)[1:]  # without the output's
    assert kept == sorted(after) if after else sum(kept) == 64
    assert len(graph.story.steps) == steps
    compiled = fxopt.compile(graph, torch.randn(2, 8))
    before = compiled(torch.ones(2, 8))
    compiled.update(model.state_dict())  # names that come again once made this recurse
    assert torch.allclose(compiled(torch.ones(2, 8)), before)


@pytest.mark.parametrize("kind", ["macs", "params", "bytes"])
def test_a_cost_that_cannot_be_saved_is_an_error(kind: str) -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 64))
    with pytest.raises(OptionError, match=f"ratio=0.99 of the {kind} cannot go"):
        fxopt.prune(model, torch.randn(2, 64), ratio=0.99, of=kind)


def test_wrong_words_are_refused() -> None:
    model, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 3)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"ratio": float("nan")}, "ratio must be"), ({"ratio": -0.1}, "ratio must be"),
        ({"ratio": "half"}, "ratio must be"), ({"steps": 2.5}, "steps must be"),
        ({"schedule": lambda p: 2 * p}, "A schedule rises"),
        ({"schedule": lambda p: p / 2}, "A schedule rises"),
        ({"between": 3}, "between must be"), ({"overrides": ["0"]}, "overrides must map"),
    ]  # fmt: skip
    for options, words in wrong:
        with pytest.raises(OptionError, match=words):
            fxopt.prune(model, x, **options)


def test_nothing_pruned_is_a_record_too() -> None:
    graph = fxopt.prune(nn.Linear(3, 2), torch.randn(2, 3))
    assert str(pruning_record(graph)).splitlines()[0] == "nothing was pruned"


def test_sensitivity_of_a_model_with_computed_weights() -> None:
    """It measured other families than those that it pruned."""
    model = net(
        lambda m, x: m.o(F.relu(F.linear(F.relu(m.a(x)), m.w - m.w.mean(1, keepdim=True)))),
        a=nn.Linear(4, 8), w=nn.Parameter(torch.randn(12, 8)), o=nn.Linear(12, 2),
    )  # fmt: skip
    seen: list[int] = []

    def evaluate(graph: fxopt.GraphModule) -> float:
        seen.append(sum(p.numel() for p in graph.parameters()))
        return 1.0

    fxopt.sensitivity(model, [0.5], evaluate, example_inputs=torch.randn(2, 4), progress=False)
    full = 4 * 8 + 8 + 12 * 8 + 2 * 12 + 2
    assert sorted(seen[1:]) == sorted([full - 4 * 5 - 4 * 12, full - 6 * 8 - 6 * 2])
