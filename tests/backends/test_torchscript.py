"""The TorchScript backend: the same numbers at every size, and files that torch itself can run."""

from __future__ import annotations

import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import fxopt
from fxopt.backends.torchscript import TorchScript
from fxopt.errors import ArtefactError, LoweringError, ShapeError
from fxopt.vision import is_installed
from tests.models import ConvBnRelu, Counter, Function, Residual, Tokens

needs_torchvision = pytest.mark.skipif(not is_installed(), reason="torchvision is not installed")


def check(
    model: nn.Module, inputs: tuple[Any, ...], tmp_path: Path, *others: Any,
    dynamic_shapes: Any = None, **options: Any,
) -> Any:  # fmt: skip
    """Compare model, lowered graph and loaded file, on each set of inputs, twice."""
    graph = fxopt.capture(model.eval(), inputs, dynamic_shapes=dynamic_shapes)
    compiled = fxopt.lower(graph, backend=TorchScript(**options))
    path = tmp_path / "model.pt"
    compiled.save(path)
    loaded = fxopt.load(path)
    for one in (inputs, *others):
        expected = run(model, one)
        for runner in (compiled, loaded, compiled, loaded):
            found = run(runner, one)
            assert pytree.tree_structure(found) == pytree.tree_structure(expected)
            for ours, theirs in zip(*map(pytree.tree_leaves, (found, expected)), strict=True):
                if isinstance(theirs, torch.Tensor):
                    torch.testing.assert_close(ours, theirs, equal_nan=True)
                else:
                    assert ours == theirs and type(ours) is type(theirs)
    return loaded


def run(model: Any, inputs: tuple[Any, ...]) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(*inputs)


STATIC: list[Callable[[torch.Tensor], Any]] = [
    lambda x: (x, x, x + 1, x + 1),
    lambda x: None,
    lambda x: {"a": [x * 2, None, 3], "b": torch.return_types.max(x.max(1))},
    lambda x: (x.sort(0)[1], x.topk(2)),
    lambda x: x[:, None, torch.tensor([1, 0])],
    lambda x: torch.where(x > 0, x, 0.5),
    lambda x: x.masked_fill(x > 0, float("-inf")),
    lambda x: torch.full((3,), float("nan")),
    lambda x: (x * 1j).real,
    lambda x: (x.split([1, 3], 1), x.chunk(2), x.unbind(0)),
    lambda x: x.to(torch.float16) * 2,
    lambda x: (torch.pow(2, x), 1 / x, 2 - x, torch.remainder(3, x.abs() + 1)),
    lambda x: torch.div(x, 3, rounding_mode="floor"),
    lambda x: x.cumsum(0).long() // 2,
    lambda x: ((x > 0) & True, (x > 0) == True, torch.bitwise_xor((x > 0).int(), 3)),  # noqa: E712
    lambda x: (x.double() * 0.1, x.half() + 0.1, x.long() * 0.5),
    lambda x: F.pad(x, (1, 1), value=3),
    lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    lambda x: torch.rand_like(x),
    lambda x: torch.stft(x.flatten(), 8, window=torch.ones(8), return_complex=True).abs(),
    lambda x: torch.einsum("ij,kj->ik", x, x),
    lambda x: F.one_hot((x > 0).long().sum(1), 5),
]


@pytest.mark.parametrize("number", range(len(STATIC)))
def test_operators_and_arguments_of_every_kind(number: int, tmp_path: Path) -> None:
    check(Function(STATIC[number]), (torch.randn(6, 4),), tmp_path)


DYNAMIC: list[Callable[[torch.Tensor], Any]] = [
    lambda x: x[: x.shape[0] // 2 * 2].view(x.shape[0] // 2, -1) * x.shape[0] ** 2,
    lambda x: (x.shape[0], x.sum() * x.numel(), x.shape[0] * 2 - 3),
    lambda x: F.interpolate(x[None, None], scale_factor=1.5),
    lambda x: torch.arange(x.shape[0])[None] + torch.zeros(x.shape[0], 1),
    lambda x: x.mean(0) * -x.shape[0] + x.shape[0] % 4,
    lambda x: x.new_ones(torch.sym_max(x.shape[0], 7), torch.sym_min(x.shape[0], 7)),
    lambda x: (x > 0).nonzero() + 1,
    lambda x: torch.cat([x, x]).expand(2, x.shape[0] * 2, 4),
]


@pytest.mark.parametrize("number", range(len(DYNAMIC)))
def test_no_size_is_fixed_at_its_example(number: int, tmp_path: Path) -> None:
    others = [(torch.randn(rows, 4),) for rows in (9, 2, 14)]
    model = Function(DYNAMIC[number])
    check(model, (torch.randn(6, 4),), tmp_path, *others, dynamic_shapes={0: "rows"})


class Sizes(nn.Module):
    """An integer among the inputs."""

    def forward(self, x: torch.Tensor, n: int) -> tuple[Any, ...]:
        return torch.ones(n + 2, x.shape[0]), n * x.shape[0]


def test_a_dynamic_integer(tmp_path: Path) -> None:
    options = {"dynamic_shapes": {"x": {0: "rows"}, "n": torch.export.Dim.DYNAMIC}}
    loaded = check(Sizes(), (torch.ones(4), 7), tmp_path, (torch.ones(5), 3), **options)
    with pytest.raises(ShapeError, match="must be an int"):
        loaded(torch.ones(4), 2.5)


@needs_torchvision
@pytest.mark.parametrize("name", ["resnet18", "swin"])
def test_vision_models(name: str, tmp_path: Path) -> None:
    from torchvision.models import SwinTransformer, resnet18

    swin = SwinTransformer([4, 4], 8, [2, 2], [1, 2], [2, 2], num_classes=5)
    model = swin if name == "swin" else resnet18()
    inputs, other = (torch.randn(2, 3, 32, 32),), (torch.randn(3, 3, 32, 32),)
    check(model, inputs, tmp_path, other, dynamic_shapes={0: "batch"})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8)).to(dtype)
    check(model, (torch.randn(2, 4, dtype=dtype),), tmp_path)


def test_layers_with_lists_of_tensors(tmp_path: Path) -> None:
    check(nn.LSTM(4, 5, 2, bidirectional=True), (torch.randn(3, 2, 4),), tmp_path)
    check(nn.MultiheadAttention(8, 2), tuple(torch.randn(3, 2, 8) for _ in range(3)), tmp_path)
    check(Tokens(), (torch.tensor([[1, 2]]), torch.ones(1, 2)), tmp_path)


@pytest.mark.parametrize("options", [
    {"freeze": False}, {"optimize_for_inference": True},
    {"freeze": False, "optimize_for_inference": True},
], ids=str)  # fmt: skip
def test_options(options: dict[str, bool], tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    check(Residual(), (x,), tmp_path, **options)
    loaded = fxopt.load(tmp_path / "model.pt", optimize_for_inference=True)
    torch.testing.assert_close(loaded(x), Residual.__call__(Residual(), x), atol=10, rtol=10)
    assert loaded.backend == TorchScript(optimize_for_inference=True)


def test_compile_verifies_and_says_that_it_is_legacy() -> None:
    x = torch.randn(2, 3, 8, 8)
    compiled = fxopt.compile(ConvBnRelu(), x, backend="torchscript")
    assert compiled.story.verifications[-1].passed
    assert any("legacy" in note for note in compiled.executable.notes)


def test_torch_itself_runs_the_file(tmp_path: Path) -> None:
    model, x = ConvBnRelu(), torch.randn(2, 3, 8, 8)
    check(model, (x,), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        plain = torch.jit.load(str(tmp_path / "model.pt"))
    torch.testing.assert_close(plain(x)[0], model(x))


def test_no_warning_reaches_the_user_and_others_stay(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        check(nn.ReLU(), (torch.randn(2),), tmp_path, optimize_for_inference=True)
        with pytest.raises(DeprecationWarning):
            warnings.warn("another", DeprecationWarning, stacklevel=1)


class Choice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (x,))


@pytest.mark.parametrize(("model", "reason"), [
    (Counter(), "'copy.*writes the model's state back"),
    (Choice(), "'cond.*it is control flow"),
])  # fmt: skip
def test_what_it_cannot_express_is_named(model: nn.Module, reason: str) -> None:
    with pytest.raises(LoweringError, match=rf"{reason}.*Use backend='eager'"):
        fxopt.lower(fxopt.capture(model, torch.ones(2)), backend="torchscript")


def test_an_operator_that_torchscript_refuses_is_named() -> None:
    graph = fxopt.capture(nn.ReLU(), torch.ones(2))
    (node,) = graph.find(torch.ops.aten.relu.default)
    node.args = ("text",)
    with pytest.raises(LoweringError, match=r"'relu' = aten\.relu\.default \(from .*\.py:"):
        fxopt.lower(graph, backend="torchscript")


class Weight(nn.Module):
    """Returns a weight, a view of it, and what follows from it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.weight, self.weight.t(), self.weight * 1, x


def test_writing_to_an_output_does_not_reach_the_constants(tmp_path: Path) -> None:
    for options in ({}, {"freeze": False}, {"optimize_for_inference": True}):
        loaded = check(Weight(), (torch.ones(1),), tmp_path, **options)
        for _ in range(4):
            *weights, _ = loaded(torch.ones(1))
            for weight in weights:
                assert weight.eq(1).all()
                weight.zero_()


def test_the_executable_owns_its_constants() -> None:
    model, x = nn.Linear(3, 2).eval(), torch.randn(1, 3)
    graph = fxopt.capture(model, x)
    for freeze in (True, False):
        compiled = fxopt.lower(graph, backend="torchscript", freeze=freeze)
        expected = compiled(x)
        with torch.no_grad():
            model.weight.add_(1)
        assert torch.equal(compiled(x), expected)


# -- files ----------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "model.pt"
    compiled = fxopt.lower(fxopt.capture(nn.Linear(3, 2), torch.ones(1, 3)), backend="torchscript")
    compiled.save(target)
    return target


def test_a_cut_file_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for end in range(0, len(whole), 61):
        path.write_bytes(whole[:end])
        with pytest.raises(ArtefactError, match=r"model\.pt"):
            fxopt.load(path)


def test_a_flipped_bit_is_refused_or_does_no_harm(path: Path) -> None:
    whole, generator = path.read_bytes(), random.Random(0)
    expected = fxopt.load(path)(torch.ones(1, 3))
    for _ in range(150):
        content = bytearray(whole)
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        try:
            found = fxopt.load(path)(torch.ones(1, 3))
        except ArtefactError:
            continue
        assert torch.equal(found, expected)


def test_files_that_fxopt_did_not_write_are_refused(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(nn.ReLU()), str(path))
    with pytest.raises(ArtefactError, match="no fxopt manifest"):
        fxopt.load(path)
    torch.save({"weight": torch.ones(1)}, path)
    with pytest.raises(ArtefactError, match="no fxopt manifest"):
        fxopt.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/extra/fxopt.json", "{}")
        archive.writestr("archive/constants.pkl", "")
    with pytest.raises(ArtefactError, match="not a TorchScript archive"):
        fxopt.load(path)


@pytest.mark.parametrize(("shape", "fast"), [((2, 4, 16, 8), True), ((4, 16, 8), False)])
def test_attention_is_one_call_where_there_is_a_kernel(shape: tuple[int, ...], fast: bool) -> None:
    inputs = tuple(torch.randn(shape) for _ in range(3))
    model = Function(lambda q, k, v: (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v)
    compiled = fxopt.compile(model, inputs, backend="torchscript")
    assert ("scaled_dot_product_attention" in compiled.executable.code) == fast
    assert torch.allclose(compiled(*inputs), model(*inputs), atol=1e-6)
