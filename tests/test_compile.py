"""fxopt.compile as a user meets it: one line in, something callable out."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.testing import noisy, relative_error
from tests.models import ConvBnRelu, Counter, Residual, SharedLayer, Tokens


def test_compile_without_inputs_infers_them(caplog: pytest.LogCaptureFixture) -> None:
    model = noisy(ConvBnRelu()).eval()
    with caplog.at_level(logging.INFO, "fxopt"):
        compiled = fxopt.compile(model)
    assert "inferred from the first layer" in caplog.text
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_compile_waits_for_the_first_call_where_nothing_can_be_inferred() -> None:
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a @ b

    compiled = fxopt.compile(Two())
    with pytest.raises(
        fxopt.FxoptError,
        match="pass example_inputs= or call it once|Pass example_inputs= or call it once",
    ):
        compiled.graph
    a, b = torch.randn(2, 3), torch.randn(3, 4)
    torch.testing.assert_close(compiled(a, b), a @ b)
    assert compiled.graph is not None
    torch.testing.assert_close(compiled(b.mT, a.mT), b.mT @ a.mT)
    with pytest.raises(fxopt.FxoptError, match="2 input shapes.*dynamic_shapes"):
        compiled.save("never.fxopt")


def test_calls_take_arguments_like_the_model() -> None:
    model = noisy(Tokens()).eval()
    ids, mask = torch.randint(0, 9, (2, 5)), torch.ones(2, 5)
    compiled = fxopt.compile(model, {"ids": ids, "mask": mask})
    for out in (compiled(ids, mask), compiled(ids, mask=mask), compiled(mask=mask, ids=ids)):
        assert relative_error(out, model(ids, mask)) < 1e-6
    without = fxopt.compile(model, ids)
    assert relative_error(without(ids=ids), model(ids)) < 1e-6
    assert relative_error(without(ids, mask=None), model(ids)) < 1e-6
    with pytest.raises(fxopt.ShapeError, match="'mask' was not given"):
        without(ids, mask)
    with pytest.raises(fxopt.ShapeError, match="dimension 1 is 4"):
        compiled(ids[:, :4], mask[:, :4])


def test_dynamic_shapes_run_at_other_sizes_and_others_do_not() -> None:
    model = noisy(ConvBnRelu()).eval()
    compiled = fxopt.compile(model, torch.randn(1, 3, 16, 16), dynamic_shapes={0: "batch"})
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 16, 16)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(fxopt.ShapeError, match="dimension 2 is 8.*dynamic_shapes"):
        compiled(torch.randn(2, 3, 8, 16))


def test_the_users_model_is_never_touched() -> None:
    model = noisy(Residual())
    model.train()
    model.stem.eval()
    hook = model.register_forward_hook(lambda *_: None)
    flags = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    tensors = [id(p) for p in (*model.parameters(), *model.buffers())]
    compiled = fxopt.compile(model, torch.randn(2, 3, 8, 8))
    compiled(torch.randn(2, 3, 8, 8))
    graph = fxopt.optimize(model, torch.randn(2, 3, 8, 8))
    graph.train()
    torch.optim.SGD(graph.parameters(), 0.1).zero_grad()
    graph(torch.randn(2, 3, 8, 8)).sum().backward()
    torch.optim.SGD(graph.parameters(), 0.1).step()
    assert [m.training for m in model.modules()] == flags
    assert [id(p) for p in (*model.parameters(), *model.buffers())] == tensors
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert all(p.grad is None for p in model.parameters())
    assert len(model._forward_hooks) == 1
    hook.remove()


def test_a_compiled_model_owns_its_weights() -> None:
    model = noisy(SharedLayer()).eval()
    x = torch.randn(3, 4)
    compiled = fxopt.compile(model, x)
    expected = compiled(x)
    with torch.no_grad():
        model.layer.weight.zero_()
    assert torch.equal(compiled(x), expected)


def test_state_advances_as_in_eager_and_verification_does_not_count() -> None:
    model = Counter().eval()
    compiled = fxopt.compile(model, torch.zeros(2))
    assert model.calls.item() == 0
    assert [compiled(torch.zeros(2))[0].item() for _ in range(3)] == [1, 2, 3]


def test_update_replays_what_the_passes_computed() -> None:
    torch.manual_seed(0)
    model = noisy(Residual()).eval()
    x = torch.randn(2, 3, 8, 8)
    compiled = fxopt.compile(model, x)
    trained = noisy(copy.deepcopy(model), seed=5)
    compiled.update(trained.state_dict())
    torch.testing.assert_close(compiled(x), trained(x), rtol=1e-4, atol=1e-5)
    before = compiled(x)
    incomplete = dict(trained.state_dict())
    del incomplete["conv.weight"]
    with pytest.raises(fxopt.OptionError, match="has no 'conv.weight'"):
        compiled.update(incomplete)
    wrong = {**trained.state_dict(), "conv.bias": torch.zeros(3)}
    with pytest.raises((fxopt.OptionError, RuntimeError)):
        compiled.update(wrong)
    assert torch.equal(compiled(x), before)


def test_a_wider_precision_converts_the_whole_graph() -> None:
    model = noisy(ConvBnRelu()).eval()
    x = torch.randn(1, 3, 8, 8)
    compiled = fxopt.compile(model, x, precision="fp64")
    out = compiled(x.double())
    assert out.dtype == torch.float64
    assert relative_error(out.float(), model(x)) < 1e-5
    with pytest.raises(fxopt.ShapeError, match="has dtype torch.float32"):
        compiled(x)


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_a_lower_precision_keeps_inputs_and_outputs(precision: str, bound: float) -> None:
    model = noisy(ConvBnRelu()).eval()
    x = torch.randn(1, 3, 8, 8)
    compiled = fxopt.compile(model, x, precision=precision)
    out = compiled(x)
    assert out.dtype == torch.float32
    assert 1e-6 < relative_error(out, model(x)) < bound
    assert compiled.report.recipe.settings["precision"] == precision
    assert "lower-precision" not in compiled.report.recipe.settings["passes"]
    assert f"compute in {precision}" in str(compiled.report)


def test_submodules_compile_the_parts_that_can_be_captured() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            while x.abs().max() > 0.5:  # cannot be captured
                x = self.body(x) * 0.5
            return x

    model = noisy(Loop()).eval()
    x = torch.randn(3, 4) * 3
    with pytest.raises(fxopt.CaptureError, match="submodules="):
        fxopt.compile(model, x)
    compiled = fxopt.compile(model, x, submodules=["body"])
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert isinstance(model.body, nn.Sequential)
    with pytest.raises(fxopt.OptionError, match="Did you mean 'body'"):
        fxopt.compile(model, x, submodules=["bodi"])


def test_three_steps_are_public() -> None:
    model = noisy(Residual()).eval()
    x = torch.randn(2, 3, 8, 8)
    captured = fxopt.capture(model, x)
    optimized = fxopt.optimize(captured)
    compiled = fxopt.lower(optimized, backend="eager")
    for each in (captured, optimized, compiled):
        torch.testing.assert_close(each(x), model(x), rtol=1e-4, atol=1e-5)
    again = fxopt.optimize(optimized)
    assert not any(step.rewrites for step in again.story.steps)
    with pytest.raises(fxopt.OptionError, match="takes the graph"):
        fxopt.lower(model)  # type: ignore[arg-type]


def test_optimized_graphs_train_and_are_optimized_again() -> None:
    torch.manual_seed(0)
    model = noisy(Residual()).eval()
    x = torch.randn(4, 3, 8, 8)
    graph = fxopt.optimize(model, x)
    graph.train()
    optimizer = torch.optim.SGD(graph.parameters(), 1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = graph(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    graph.eval()
    compiled = fxopt.compile(graph)
    torch.testing.assert_close(compiled(x), graph(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"backend": "onxx"}, fxopt.OptionError, "Did you mean 'onnx'"),
        (
            {"backend": "eager", "thread": 2},
            fxopt.OptionError,
            "Unknown option for 'eager': 'thread'",
        ),
        ({"calibration": [1]}, fxopt.OptionError, "int8"),
    ],
)
def test_wrong_options_get_an_error_that_helps(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        fxopt.compile(ConvBnRelu(), torch.randn(1, 3, 8, 8), **options)


def test_a_missing_engine_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = fxopt.backends.Eager
    monkeypatch.setattr(eager, "missing", lambda self: "Install it: pip install nothing")
    with pytest.raises(fxopt.BackendUnavailable, match="'eager' is not installed.*pip install"):
        fxopt.compile(ConvBnRelu(), torch.randn(1, 3, 8, 8))


def test_benchmark_measures_calls() -> None:
    compiled = fxopt.compile(SharedLayer(), torch.randn(2, 4))
    result = compiled.benchmark(rounds=5)
    assert result.median > 0 and result.rounds == 5 and "ms" in str(result)
