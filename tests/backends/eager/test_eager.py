"""The eager backend's files: real models come back with the same numbers and the same outputs."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fxopt
from fxopt.backends.eager import Eager
from fxopt.errors import FxoptError, ShapeError
from fxopt.vision import is_installed
from tests.models import Counter, Tokens

needs_torchvision = pytest.mark.skipif(not is_installed(), reason="torchvision is not installed")


def check_same(found: Any, expected: Any) -> None:
    ours, theirs = pytree.tree_flatten(found), pytree.tree_flatten(expected)
    assert ours[1] == theirs[1] and type(found) is type(expected)
    for one, other in zip(ours[0], theirs[0], strict=True):
        if isinstance(other, torch.Tensor):
            assert torch.equal(one, other) and one.dtype is other.dtype
        else:
            assert one == other and type(one) is type(other)


def saved(compiled: Any, tmp_path: Path) -> Any:
    path = tmp_path / "model.fxopt"
    compiled.save(path)
    return fxopt.load(path)


def check_file(model: nn.Module, inputs: Any, tmp_path: Path, *others: Any, **options: Any) -> Any:
    """Compile, save and load; the file must do what the compiled model does."""
    compiled = fxopt.compile(model.eval(), inputs, verify="off", **options)
    loaded = saved(compiled, tmp_path)
    for one in (inputs, *others):
        args, kwargs = (one, {}) if isinstance(one, tuple) else ((), one)
        check_same(loaded(*args, **kwargs), compiled(*args, **kwargs))
    return loaded


@needs_torchvision
def test_resnet18_with_a_dynamic_batch(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    others = [(torch.randn(batch, 3, 64, 64),) for batch in (1, 3)]
    loaded = check_file(
        resnet18(), (torch.randn(2, 3, 64, 64),), tmp_path, *others, dynamic_shapes={0: "batch"}
    )
    with pytest.raises(ShapeError, match="dimension 3 is 65"):
        loaded(torch.randn(2, 3, 64, 65))


@needs_torchvision
def test_swin(tmp_path: Path) -> None:
    from torchvision.models import SwinTransformer

    model = SwinTransformer([4, 4], 8, [2, 2], [1, 2], [2, 2], num_classes=5)
    check_file(model, (torch.randn(1, 3, 32, 32),), tmp_path)


def test_bert_returns_its_own_output_class(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    ids = torch.randint(1, 50, (2, 8))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    loaded = check_file(transformers.BertModel(config), inputs, tmp_path)
    output = loaded(**inputs)
    assert type(output).__name__ == "BaseModelOutputWithPoolingAndCrossAttentions"
    assert output.last_hidden_state.shape == (2, 8, 16)


class Outputs(nn.Module):
    """Nested outputs: constants, None, an input, a constant, the same tensor twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor, flag: bool = True) -> Any:
        y = x + self.weight
        return {"a": [y, (None, x)], "b": (y, self.weight, 3, "t"), "flag": flag, "max": y.max(0)}


def test_nested_outputs(tmp_path: Path) -> None:
    x = torch.randn(2, 3)
    loaded = check_file(Outputs(), (x,), tmp_path)
    check_same(loaded(x=x), Outputs()(x))
    with pytest.raises(ShapeError, match="flag"):
        loaded(x, flag=False)


def test_inputs_by_keyword_and_by_default(tmp_path: Path) -> None:
    model = Tokens().eval()
    ids, mask = torch.tensor([[1, 2]]), torch.ones(1, 2)
    check_file(model, {"ids": ids, "mask": mask}, tmp_path)
    loaded = check_file(model, (ids,), tmp_path)
    torch.testing.assert_close(loaded(ids=ids), model(ids))
    with pytest.raises(ShapeError, match="mask"):
        loaded(ids, mask)


@dataclass
class Answer:
    score: torch.Tensor
    detail: torch.Tensor | None = None


class Answers(nn.Module):
    """A dataclass as output."""

    def forward(self, x: torch.Tensor) -> Answer:
        return Answer(score=x * 2)


def test_a_dataclass_output(tmp_path: Path) -> None:
    x = torch.ones(2)
    loaded = saved(fxopt.compile(Answers(), x), tmp_path)
    answer = loaded(x)
    assert isinstance(answer, Answer) and torch.equal(answer.score, x * 2)
    assert answer.detail is None


def test_a_process_without_the_class_gets_a_dict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fxopt")
    x = torch.ones(2)
    compiled = fxopt.compile(Answers(), x)
    monkeypatch.delitem(sys.modules, __name__)
    answer = saved(compiled, tmp_path)(x)
    assert list(answer) == ["score"] and answer["score"].tolist() == [2.0, 2.0]
    assert __name__ not in sys.modules
    assert caplog.text.count("Answer' is not imported") >= 1


class Choice(nn.Module):
    """Control flow in the graph, over a layer with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.layer(x), lambda x: x - 1, (x,))


def test_control_flow(tmp_path: Path) -> None:
    check_file(Choice(), (torch.ones(3, 4),), tmp_path, (-torch.ones(3, 4),))


def test_state_starts_where_it_was_saved(tmp_path: Path) -> None:
    x = torch.zeros(2)
    compiled = fxopt.compile(Counter(), x)
    assert compiled(x)[0] == 1
    loaded = saved(compiled, tmp_path)
    assert [loaded(x)[0].item(), loaded(x)[0].item()] == [2, 3]
    assert compiled(x)[0] == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8)).to(dtype)
    loaded = check_file(model, (torch.randn(2, 4, dtype=dtype),), tmp_path)
    with pytest.raises(ShapeError, match="dtype"):
        loaded(torch.randn(2, 4, dtype=torch.complex64))


def test_a_loaded_model_goes_on(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(2, 4)
    loaded = saved(fxopt.compile(model, x), tmp_path)
    again = saved(loaded, tmp_path)
    check_same(again(x), loaded(x))
    compiled = fxopt.compile(loaded.graph)
    torch.testing.assert_close(compiled(x), model(x))
    with pytest.raises(FxoptError):
        print(loaded.report)


def test_a_loaded_model_owns_its_weights(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    compiled = fxopt.compile(nn.Linear(4, 4), x)
    loaded = saved(compiled, tmp_path)
    expected = loaded(x)
    (tmp_path / "model.fxopt").unlink()
    with torch.no_grad():
        for parameter in compiled.graph.parameters():
            parameter.zero_()
    check_same(loaded(x), expected)


@pytest.mark.parametrize(
    "options", [{"threads": 0}, {"threads": 1.5}, {"threads": True}, {"measure": "no"}]
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(FxoptError, match=f"Eager option {name}=.* is not possible; give"):
        Eager(**options)
