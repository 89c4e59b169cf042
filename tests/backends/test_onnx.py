"""The onnx backend: what it emits, how it runs, saves, loads, and what it refuses."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.backends.onnx import Onnx
from fxopt.capture import capture
from fxopt.errors import LoweringError, ShapeError
from tests.backends.onnx_check import (
    Function,
    check,
    difference,
    expected,
    integers,
    lowered,
    mlp,
    noisy,
    normal,
)
from tests.work import lines_run


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.layer(x) + 1, lambda x: x * 2, (x,))


# -- what is emitted ------------------------------------------------------------------------------


def counts(model: Any, *inputs: torch.Tensor) -> dict[str, int]:
    return check(model, inputs).op_counts()


def test_one_node_per_layer() -> None:
    block = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    assert counts(noisy(block), normal(2, 3, 8, 8)) == {
        "BatchNormalization": 1,
        "Conv": 1,
        "Gemm": 1,
        "GlobalAveragePool": 1,
        "HardSwish": 1,
        "Reshape": 1,
    }


def test_weights_are_transposed_when_lowering_and_tied_ones_stored_once() -> None:
    assert counts(noisy(nn.Linear(3, 4)), normal(2, 5, 3)) == {"Add": 1, "MatMul": 1}

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 16)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return F.linear(self.table(ids), self.table.weight)

    executable = check(noisy(Tied()), (integers(2, 3),))
    assert executable.op_counts() == {"Gather": 1, "MatMul": 1, "Transpose": 1}
    assert list(executable.ir_model.graph.initializers) == ["table.weight"]


def test_compact_forms() -> None:
    assert counts(lambda x: F.gelu(x).permute(0, 2, 1).reshape(6, 4), normal(2, 4, 3)) == {
        "Gelu": 1,
        "Reshape": 1,
        "Transpose": 1,
    }
    assert counts(F.scaled_dot_product_attention, *[normal(1, 2, 5, 8)] * 3) == {
        "MatMul": 2,
        "Mul": 1,
        "Softmax": 1,
        "Transpose": 1,
    }
    assert counts(lambda x: F.pixel_shuffle(F.silu(x), 2), normal(1, 8, 3, 3)) == {
        "DepthToSpace": 1,
        "Mul": 1,
        "Sigmoid": 1,
    }
    assert counts(
        lambda a, b: torch.einsum("bij,bkj->bik", a, b), normal(2, 3, 4), normal(2, 5, 4)
    ) == {"MatMul": 1, "Transpose": 1}


def test_equal_constants_are_one() -> None:
    executable = lowered(lambda x: (x * 2.5 + 2.5) * 2.5, (normal(3),))
    assert len(executable.ir_model.graph.initializers) == 1


def test_names_paths_and_shapes_are_kept() -> None:
    executable = lowered(mlp(), (normal(2, 64),))
    graph = executable.model_proto().graph
    assert [x.name for x in graph.initializer] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert [node.name for node in graph.node] == ["linear", "relu", "linear_1"]
    assert {p.key: p.value for p in graph.node[2].metadata_props} == {"fxopt.path": "2"}
    shapes = {x.name: len(x.type.tensor_type.shape.dim) for x in graph.value_info}
    assert shapes["linear"] == shapes["relu"] == 2
    onnx.checker.check_model(executable.model_proto(), full_check=True)


@pytest.mark.parametrize("opset", [18, 21, 24])
def test_other_opsets(opset: int) -> None:
    def model(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        grid = F.affine_grid(x[:, 0, :2, :3], [2, 3, 4, 5], align_corners=False)
        return (
            F.gelu(x),
            F.rms_norm(x, (6,), x[0, 0, 0]),
            F.pad(x, (1, 1, 1, 1), "circular"),
            F.grid_sample(x, grid),
        )

    executable = check(model, (normal(2, 3, 5, 6),), opset=opset)
    assert executable.model_proto().opset_import[0].version == opset


# -- how it runs ----------------------------------------------------------------------------------


def test_outputs_that_are_inputs_constants_or_twice_the_same() -> None:
    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = x + 1
            return x, y, y, self.weight, x.reshape(3, 2)

    assert check(Outputs(), (normal(2, 3),)).op_counts() == {"Add": 1, "Identity": 3, "Reshape": 1}


def test_it_owns_its_constants() -> None:
    model = mlp()
    x = normal(2, 64)
    executable, wanted = lowered(model, (x,)), expected(model, (x,))[0]
    with torch.no_grad():
        model[0].weight.zero_()  # type: ignore[index, union-attr, operator]
    assert difference(executable.run(x)[0], wanted) < 1e-5


def test_inputs_that_are_not_contiguous() -> None:
    x = normal(64, 2).t()
    model = mlp()
    assert difference(lowered(model, (x,)).run(x)[0], expected(model, (x,))[0]) < 1e-5


def test_wrong_inputs_are_shape_errors() -> None:
    executable = lowered(mlp(), (normal(2, 64),))
    with pytest.raises(ShapeError, match=r"input_1 \(3, 64\).*dynamic_shapes"):
        executable.run(normal(3, 64))
    with pytest.raises(ShapeError, match="Expected 1 inputs, got 2"):
        executable.run(normal(2, 64), normal(2, 64))


def test_a_provider_without_a_kernel_is_named() -> None:
    executable = lowered(
        nn.Conv1d(2, 2, 1).double().eval(), (normal(1, 2, 3, dtype=torch.float64),)
    )
    with pytest.raises(
        LoweringError, match=r"cannot run this model with CPUExecutionProvider.*Conv"
    ):
        executable.run(normal(1, 2, 3, dtype=torch.float64))


def test_dynamic_batch_and_sequence() -> None:
    layer = noisy(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    executable = check(
        layer,
        (normal(2, 5, 8),),
        (normal(3, 7, 8),),
        (normal(1, 4, 8),),
        dynamic_shapes={"src": {0: "batch", 1: "length"}},
    )
    shape = executable.ir_model.graph.inputs[0].shape
    assert shape is not None and [isinstance(d, int) for d in shape] == [False, False, True]


def test_symbolic_sizes() -> None:
    def sizes(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        b, s = x.shape
        return (
            torch.arange(s) + x[:1].sum(),
            torch.zeros(b, s * 2) + x[0, 0],
            x * s,
            x / (b + 1),
            x * b**-0.5,
            x[:, : s // 2],
            x[:, -(-s // 2) :],
            x.reshape(s, b),
            x.reshape(b * s, -1),
            x.expand(3, -1, -1),
            F.pad(x, (0, 16 - s % 8)),
            torch.ones(s, s).tril() + x[:, None],
            x.std(1),
            *x.chunk(2, 1),
            x.roll(1, 1),
            x.repeat(2, 1),
            x.repeat_interleave(2, 1),
            x.unfold(1, 2, 1),
            x.reshape_as(x.t()),
            x.roll(1),
            x.sort(1)[0],
        )

    check(sizes, (normal(3, 6),), (normal(4, 9),), dynamic_shapes=({0: "b", 1: "s"},))


def test_dynamic_images() -> None:
    def image(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            F.max_pool2d(x, 3, 2, 1),
            F.avg_pool2d(x, 2),
            F.max_pool2d(x, 3, 2, ceil_mode=True),
            F.interpolate(x, scale_factor=2),
            F.interpolate(x, size=(x.shape[2] * 2, x.shape[3] + 3), mode="bilinear"),
        )

    check(
        image, (normal(1, 2, 9, 10),), (normal(1, 2, 12, 11),), dynamic_shapes=({2: "h", 3: "w"},)
    )


@pytest.mark.parametrize("dynamic", [None, {"x": {0: "batch"}}])
def test_branches(dynamic: Any) -> None:
    x = normal(2, 3).abs()
    assert check(Branch(), (x,), (-x,), dynamic_shapes=dynamic).op_counts()["If"] == 1


def test_loops() -> None:
    from torch._higher_order_ops import while_loop

    def loop(x: torch.Tensor) -> Any:
        return while_loop(lambda i, x: i < 5, lambda i, x: (i + 1, x * 2 + i), (torch.tensor(0), x))

    assert check(loop, (normal(2, 3),)).op_counts()["Loop"] == 1


# -- operators without an emitter -----------------------------------------------------------------


def test_torch_translation_is_used_and_noted() -> None:
    executable = check(lambda x: torch.heaviside(x, x), (normal(5),))
    assert executable.notes == ("torch's own translation was used for aten.heaviside.default.",)


def test_decomposition_is_used_and_noted() -> None:
    executable = check(lambda x: (torch.block_diag(x, x), torch.vander(x[0])), (normal(3, 2),))
    assert (
        executable.notes[0]
        == "aten.block_diag.default was decomposed by torch into simpler operators."
    )


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda x: torch.special.i0(x),
            r"special_i0.*node 'special_i0'.*source: .*return self.function.*backend='eager'",
        ),
        (lambda x: torch.fft.rfft(x).abs(), "fft_rfft.*no complex numbers"),
        (lambda x: x + torch.rand_like(x), "rand_like.*random"),
    ],
)
def test_refused(function: Any, message: str) -> None:
    with pytest.raises(LoweringError, match=message):
        lowered(function, (normal(4),))


def test_refusal_names_the_module() -> None:
    class Inner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.i0(x)

    with pytest.raises(LoweringError, match="module '1'"):
        lowered(nn.Sequential(nn.ReLU(), Inner()), (normal(4),))


# -- whole models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "swin_t"])
def test_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    x = normal(1, 3, 64, 64)
    executable = check(noisy(models.get_model(name, weights=None)), (x,))
    assert not executable.notes


@pytest.mark.parametrize("name", ["Bert", "GPT2"])
def test_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    if name == "Bert":
        config = transformers.BertConfig(
            vocab_size=99,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
        )
        options: dict[str, Any] = {}
    else:
        config = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4)
        options = {"use_cache": False}
    model = noisy(getattr(transformers, f"{name}Model")(config))
    ids = integers(2, 8, high=99)
    graph = capture(
        model,
        ((), {"input_ids": ids, **options}),
        dynamic_shapes={"input_ids": {0: "batch", 1: "length"}, **dict.fromkeys(options)},
    )
    executable = fxopt.lower(graph, backend=Onnx(threads=1)).executable
    for given in (ids, integers(3, 5, high=99)):
        with torch.no_grad():
            wanted = model(input_ids=given, **options)[0]
        assert difference(executable.run(given)[0], wanted) < 1e-5
    assert not executable.notes


def test_the_work_of_lowering_is_linear() -> None:
    def lines(size: int) -> int:
        chain = Function(lambda x: [x := torch.relu(x + i) for i in range(size)][-1])
        graph = capture(chain, (normal(2, 3),))
        return lines_run(lambda: Onnx().lower(graph))

    lines(1)  # what is done once in a process
    assert lines(200) < 8 * 1.5 * lines(25)
