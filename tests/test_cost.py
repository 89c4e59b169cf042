"""What nodes cost: by hand, and against PyTorch's own counter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fxopt
from fxopt.cost import Cost, Work, cost_of, formula, is_counted, macs, parameters_of, total
from fxopt.cost.formula import FORMULAS, formula_of
from fxopt.graph_module import GraphModule
from fxopt.vision import import_torchvision

R = torch.randn


class Calls(nn.Module):
    """A function, or a module, as a model."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.inner = function if isinstance(function, nn.Module) else None
        self.function = None if self.inner is not None else function

    def forward(self, *args: torch.Tensor) -> Any:
        return (self.inner or self.function)(*args)


def graph_of(function: Any, *inputs: Any, **dynamic: Any) -> GraphModule:
    return fxopt.capture(Calls(function).eval(), inputs, **dynamic)


def cost(function: Any, *inputs: Any) -> Cost:
    return total(map(cost_of, graph_of(function, *inputs).graph.nodes))


def counted(model: nn.Module, *inputs: Any) -> int:
    """What PyTorch counts, with attention in plain products."""
    model = model.eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*inputs)
    return counter.get_total_flops() // 2


# -- by hand: (function or layer, inputs, MACs, other operations) ----------------------------------

image = R(2, 4, 8, 8)
BY_HAND: dict[str, tuple[Any, tuple[Any, ...], int, int]] = {
    # output 2×6×4×4, two input channels a group, 3×3 kernel
    "grouped": (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (image,), 192 * 18, 192),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=2, bias=False), (image,), 2 * 6 * 16 * 36, 0),
    "transposed": (  # input 2×4×8×8 to three output channels a group; output 2×6×17×17
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (image,), 512 * 27, 2 * 6 * 289,
    ),
    "one dimension": (nn.Conv1d(4, 6, 3, bias=False), (R(2, 4, 9),), 2 * 6 * 7 * 12, 0),
    "three dimensions": (nn.Conv3d(1, 2, 2), (R(1, 1, 3, 3, 3),), 16 * 8, 16),
    "same, even kernel": (nn.Conv2d(4, 6, (2, 4), padding="same"), (image,), 768 * 32, 768),
    "linear": (nn.Linear(5, 7), (R(2, 3, 5),), 6 * 35, 6 * 7),
    "matmul, broadcast": (torch.matmul, (R(7, 1, 3, 4), R(5, 4, 6)), 35 * 3 * 4 * 6, 0),
    "matmul, vectors": (torch.matmul, (R(4), R(4)), 4, 0),
    "addmm": (torch.addmm, (R(5), R(3, 4), R(4, 5)), 60, 15),
    "addmm, scaled": (
        lambda *a: torch.addmm(*a, beta=2, alpha=3), (R(5), R(3, 4), R(4, 5)), 60, 45,
    ),
    "addbmm": (torch.addbmm, (R(3, 5), R(2, 3, 4), R(2, 4, 5)), 120, 15),
    "addmv": (torch.addmv, (R(3), R(3, 4), R(4)), 12, 3),
    "bilinear": (nn.Bilinear(4, 5, 6), (R(2, 4), R(2, 5)), 2 * 6 * 4 * 6, 12),
    "chain": (
        lambda *a: torch.linalg.multi_dot(a), (R(2, 3), R(3, 4), R(4, 5)), 2 * 3 * 4 + 2 * 4 * 5, 0,
    ),
    "attention": (  # 2·3 heads, 5 queries, 7 keys of 8 features, values of 6
        F.scaled_dot_product_attention, (R(2, 3, 5, 8), R(2, 3, 7, 8), R(2, 3, 7, 6)),
        210 * 14, 210 * 6,
    ),
    "attention, masked": (
        lambda q, m: F.scaled_dot_product_attention(q, q, q, m), (R(1, 2, 5, 8), R(5, 5)),
        50 * 16, 50 * 7,
    ),
    "attention, causal": (
        lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), (R(1, 2, 5, 8),),
        50 * 16, 50 * 7,
    ),
    "attention, grouped queries": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True),
        (R(1, 8, 5, 16), R(1, 2, 7, 16)), 8 * 35 * 32, 8 * 35 * 6,
    ),
    "attention, broadcast": (
        F.scaled_dot_product_attention, (R(1, 3, 5, 8), R(2, 3, 7, 8), R(2, 3, 7, 8)),
        210 * 16, 210 * 6,
    ),
    "einsum": (lambda *a: torch.einsum("bij,bjk->bik", *a), (R(2, 3, 4), R(2, 4, 5)), 120, 0),
    "einsum of three": (
        lambda *a: torch.einsum("ij,jk,kl->il", *a), (R(2, 3), R(3, 4), R(4, 5)), 24 + 40, 0,
    ),
    "einsum without a sum": (lambda *a: torch.einsum("i,j->ij", *a), (R(3), R(4)), 0, 12),
    "einsum that sums first": (lambda *a: torch.einsum("ijk,jl->il", *a), (R(2, 3, 4), R(3, 5)), 30,
                               24),
    "einsum with dots": (
        lambda *a: torch.einsum("...ij,jk->...ik", *a), (R(2, 3, 4, 5), R(5, 6)), 6 * 120, 0,
    ),
    # per step and sample: 2 directions × 2 layers; 28 hidden units in all, biases 2·4·7 each
    "lstm": (
        nn.LSTM(6, 7, 2, bidirectional=True), (R(5, 2, 6),), 10 * 1904, 10 * (28 * 22 + 4 * 56),
    ),
    "lstm, projected": (
        nn.LSTM(6, 7, proj_size=3, bias=False), (R(5, 2, 6),), 10 * (168 + 84 + 21), 10 * 7 * 22,
    ),
    "gru": (nn.GRU(6, 7), (R(5, 2, 6),), 10 * 21 * 13, 10 * (7 * 16 + 42)),
    "rnn": (nn.RNN(6, 7, bias=False), (R(5, 2, 6),), 10 * 7 * 13, 10 * 14),
    "lstm cell": (nn.LSTMCell(6, 7), (R(2, 6),), 2 * 28 * 13, 2 * (7 * 22 + 56)),
    "batch norm": (nn.BatchNorm2d(4), (image,), 0, 2 * 512 + 5 * 4),
    "batch norm of the batch": (
        nn.BatchNorm2d(4, track_running_stats=False), (image,), 0, 7 * 512 + 4 * 4,
    ),
    "layer norm": (nn.LayerNorm(8), (image,), 0, 7 * 512 + 4 * 64),
    "layer norm, plain": (lambda x: F.layer_norm(x, (8, 8)), (image,), 0, 5 * 512 + 4 * 8),
    "group norm": (nn.GroupNorm(2, 4), (image,), 0, 7 * 512 + 4 * 4),
    "instance norm": (nn.InstanceNorm2d(4), (image,), 0, 5 * 512 + 4 * 8),
    "rms norm": (nn.RMSNorm(8), (image,), 0, 4 * 512 + 3 * 64),
    "max pool": (nn.MaxPool2d(3, 2, 1), (image,), 0, 128 * 8),
    "average pool": (nn.AvgPool2d(2), (image,), 0, 128 * 4),
    "adaptive pool": (nn.AdaptiveAvgPool2d((3, 5)), (image,), 0, 8 * 10 * 12),
    "global pool": (nn.AdaptiveAvgPool2d(1), (image,), 0, 512),
    "bilinear resize": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), (image,), 0,
                        7 * 2048),
    "nearest resize": (lambda x: F.interpolate(x, scale_factor=2), (image,), 0, 0),
    "softmax": (lambda x: x.softmax(-1), (image,), 0, 5 * 512),
    "log softmax": (lambda x: x.log_softmax(-1), (image,), 0, 5 * 512 + 64),
    "mean": (lambda x: x.mean(-1), (image,), 0, 512 + 64),
    "sum": (lambda x: x.sum((1, 2)), (image,), 0, 512),
    "maximum of two": (lambda x: torch.max(x, x[:1]), (image,), 0, 512),
    "topk": (lambda x: x.topk(2).values, (image,), 0, 512 * 3),
    "add": (lambda x: x + x, (image,), 0, 512),
    "add, scaled": (lambda x: torch.add(x, x, alpha=2), (image,), 0, 1024),
    "broadcast": (lambda x: x * x[:, :1, :1], (image,), 0, 512),
    "gelu": (nn.GELU(), (image,), 0, 5 * 512),
    "gelu, tanh": (nn.GELU("tanh"), (image,), 0, 9 * 512),
    "relu6": (nn.ReLU6(), (image,), 0, 2 * 512),
    "clamp": (lambda x: x.clamp(min=0), (image,), 0, 512),
    "what PyTorch calls pointwise": (torch.sin, (image,), 0, 512),
    "dropout": (nn.Dropout(), (image,), 0, 0),
    "movement": (lambda x: torch.cat([x, x.flip(0)]).permute(0, 2, 3, 1).reshape(-1), (image,), 0,
                 0),
    "embedding": (nn.Embedding(9, 6), (torch.tensor([[1, 2]]),), 0, 0),
    "embedding bag": (nn.EmbeddingBag(9, 6), (torch.tensor([[1, 2], [0, 1]]),), 0, 24),
    "transform": (torch.fft.rfft, (R(3, 16),), 0, 3 * 5 * 16 * 4 // 2),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    function, inputs, multiply_accumulates, operations = BY_HAND[name]
    found = cost(function, *inputs)
    assert found.macs == multiply_accumulates
    assert found.flops == 2 * multiply_accumulates + operations


# -- against PyTorch's counter ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "equation",
    [
        "ij,ij->", "ij,ij->ij", "bi,bj,bk->bijk", "ab,bc", "ii->i", "nchw,cd->ndhw", "ij,i->j",
        "b i d, b j d -> b i j", "bhwc,hkc->bhwk", "...ij,...jk->...ik",
    ],
)  # fmt: skip
def test_einsum_against_the_counter(equation: str) -> None:
    sizes = {letter: size for size, letter in enumerate("abcdhijkwn", start=2)}
    operands = [
        R(*(sizes[letter] for letter in term.strip().replace("...", "ab").replace(" ", "")))
        for term in equation.partition("->")[0].split(",")
    ]
    model = Calls(lambda *a: torch.einsum(equation, *a))
    assert cost(model.function, *operands).macs == counted(model, *operands)


def _bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    return transformers.BertModel(config)


def _vit() -> nn.Module:
    models = import_torchvision().models
    return models.VisionTransformer(32, 8, 2, 2, 32, 64)


WHOLE: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "resnet50": (lambda: import_torchvision().models.resnet50(), R(1, 3, 32, 32)),
    "mobilenet_v2": (lambda: import_torchvision().models.mobilenet_v2(), R(1, 3, 32, 32)),
    "swin_t": (lambda: import_torchvision().models.swin_t(), R(1, 3, 32, 32)),
    "vit": (_vit, R(2, 3, 32, 32)),
    "bert": (_bert, torch.arange(16).view(2, 8)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_networks_against_the_counter(name: str) -> None:
    make, x = WHOLE[name]
    model = make().eval()
    graph = fxopt.capture(model, x)
    assert all(map(is_counted, graph.graph.nodes))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert sum(map(macs, graph.graph.nodes)) == counted(model, x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    used = {n: c for node in graph.graph.nodes for n, c in parameters_of(node).items()}
    assert sum(used.values()) == sum(p.numel() for p in model.parameters())


# -- bytes -----------------------------------------------------------------------------------------


def moved(function: Any, *inputs: Any) -> tuple[int, int]:
    """Bytes read and written, in elements of float32."""
    found = cost(function, *inputs)
    assert found.bytes_moved == found.read + found.written
    return found.read // 4, found.written // 4


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.permute(0, 2, 3, 1), lambda x: x[:, 1:3, ::2], lambda x: x.reshape(2, -1),
        lambda x: x.expand(2, 4, 8, 8), lambda x: x.split(2, 1)[1], lambda x: x.unsqueeze(0),
        lambda x: x.permute(0, 2, 1, 3).reshape(2, 8, 4, 2, 4), lambda x: x.contiguous(),
        lambda x: x.float(), lambda x: F.dropout(x, 0.5, training=False), lambda x: x.chunk(2)[0],
        lambda x: x.flatten(1), lambda x: x.unfold(2, 3, 1), lambda x: x.detach(),
    ],
)  # fmt: skip
def test_a_view_moves_nothing(view: Any) -> None:
    assert moved(view, image) == (0, 0)


@pytest.mark.parametrize(
    "copy",
    [
        lambda x: x.permute(0, 2, 3, 1).reshape(2, -1), lambda x: x.clone(),
        lambda x: x.permute(3, 2, 1, 0).contiguous(), lambda x: x.mT.flatten(),
        lambda x: x.flip(0),
        lambda x: x.to(memory_format=torch.channels_last, copy=True),
    ],
)  # fmt: skip
def test_a_copy_moves_everything(copy: Any) -> None:
    assert moved(copy, image) == (512, 512)


def test_a_cast_reads_one_width_and_writes_another() -> None:
    found = cost(lambda x: x.to(torch.float16), image)
    assert (found.read, found.written) == (512 * 4, 512 * 2)


def test_a_lookup_reads_what_it_returns_and_not_the_table() -> None:
    ids = torch.tensor([[1, 2, 2]])
    found = cost(nn.Embedding(1000, 6), ids)
    assert (found.read, found.written) == (3 * 6 * 4 + 3 * 8, 3 * 6 * 4)
    assert cost(lambda x, i: x[i], R(100, 2), ids[0]).read == 3 * 2 * 4 + 3 * 8


def test_operands_are_read_once_and_what_is_expanded_is_not_repeated() -> None:
    assert moved(lambda x: x * x, image) == (512, 512)
    assert moved(lambda x, y: x + y.expand(2, 4, 8, 8), image, R(4, 1, 1)) == (512 + 4, 512)
    assert moved(lambda x: torch.zeros_like(x), image) == (0, 512)


def test_attention_keeps_its_scores_inside() -> None:
    q = R(1, 2, 50, 4)
    assert moved(lambda q: F.scaled_dot_product_attention(q, q + 1, q), q) == (400 * 3, 400 * 2)


def test_state_is_written_and_not_read() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("last", torch.zeros(512))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last.copy_(x)
            return x

    graph = fxopt.capture(Remembers().eval(), R(512))
    writes = graph.find(torch.ops.aten.copy_.default)
    assert [(cost_of(n).read, cost_of(n).written) for n in writes] == [(2048, 2048)]


def test_intensity() -> None:
    assert cost(lambda x: x + x, image).intensity == 512 / 4096
    assert cost(lambda x: x.mT, image).intensity == 0


# -- parameters ------------------------------------------------------------------------------------


def test_parameters_are_counted_and_buffers_are_not() -> None:
    assert cost(nn.BatchNorm2d(4), image).params == 8
    assert cost(nn.Linear(5, 7), R(2, 5)).params == 42


def test_the_record_of_a_node_costs_the_same_after_a_pass_erased_its_constants() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    story = fxopt.optimize(model, R(1, 3, 2, 2), passes=["fuse-conv-bn"], verify="off").story
    assert sum(cost_of(record).params for record in story.captured.records) == 12 + 4 + 8
    assert sum(cost_of(record).params for record in story.final.records) == 12 + 4


# -- control flow ----------------------------------------------------------------------------------


def test_cond_counts_its_more_expensive_branch() -> None:
    def choose(x: torch.Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.sin() @ x, (x,))

    def swapped(x: torch.Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: x.sin() @ x, lambda x: x.sin(), (x,))

    for function in (choose, swapped):
        graph = graph_of(function, R(8, 8))
        (node,) = graph.find(torch.ops.higher_order.cond)
        assert is_counted(node)
        assert cost_of(node).macs == macs(node) == 512
        assert cost_of(node).flops == 1024 + 64


def test_map_and_scan_count_each_slice_and_while_loop_one_trip() -> None:
    from torch._higher_order_ops.map import map as map_slices
    from torch._higher_order_ops.scan import scan
    from torch._higher_order_ops.while_loop import while_loop

    step = 4 * 8 * 8 * 8
    x = R(3, 4, 8, 8)
    assert cost(lambda x: map_slices(lambda y: y.sin() @ y, x), x).macs == 3 * step
    assert (
        cost(lambda x: scan(lambda c, y: (c + y.sin() @ y, c * 2), x[0] * 2, x), x).macs == 3 * step
    )
    body = lambda i, y: (i + 1, y.sin() @ y)  # noqa: E731
    start = torch.zeros((), dtype=torch.int64)
    looped = cost(lambda i, y: while_loop(lambda i, y: i < 3, body, (i, y)), start, x)
    assert looped.macs == 3 * step


# -- symbols ---------------------------------------------------------------------------------------

SYMBOLIC: dict[str, tuple[Any, int]] = {
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(),
                              nn.ConvTranspose2d(4, 2, 2, 2), nn.MaxPool2d(2)), 4,
    ),
    "pooling": (
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d((3, 5)), nn.Flatten(), nn.Linear(45, 2)), 4,
    ),
    "attention": (lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 3),
    "recurrent": (lambda: nn.GRU(6, 4, batch_first=True), 3),
}  # fmt: skip


@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_costs_are_the_concrete_ones_at_every_size(name: str) -> None:
    make, rank = SYMBOLIC[name]
    model = make().eval()

    def inputs(batch: int, side: int) -> torch.Tensor:
        return R(batch, 3, side, side + 3) if rank == 4 else R(batch, side, 6)

    names = {0: "batch", 2: "height", 3: "width"} if rank == 4 else {0: "batch", 1: "length"}
    if name == "recurrent":
        names = {0: "batch"}
    symbolic = fxopt.profile(model, inputs(2, 8), dynamic_shapes=names, measure=False)
    for batch, side in ((2, 8), (1, 8), (5, 21), (3, 17)):
        side = 8 if name == "recurrent" else side
        sizes = {"batch": batch, "height": side, "width": side + 3, "length": side}
        found = symbolic.at({k: v for k, v in sizes.items() if k in symbolic.sizes})
        concrete = fxopt.profile(model, inputs(batch, side), measure=False)
        assert found.cost == concrete.cost
        assert found.peak_activation_bytes == concrete.peak_activation_bytes
        assert [row.cost for row in found.rows] == [row.cost for row in concrete.rows]
        assert [row.live for row in found.rows] == [row.live for row in concrete.rows]
        assert [row.shapes for row in found.rows] == [row.shapes for row in concrete.rows]


# -- the table of formulas -------------------------------------------------------------------------


def test_an_unknown_operator_counts_nothing_and_says_so_until_it_has_a_formula() -> None:
    @torch.library.custom_op("fxopt_cost_test::halve", mutates_args=())
    def halve(x: torch.Tensor) -> torch.Tensor:
        return x / 2

    halve.register_fake(lambda x: torch.empty_like(x))
    graph = graph_of(lambda x: halve(x), R(4))
    (node,) = [n for n in graph.graph.nodes if "halve" in str(n.target)]
    assert not is_counted(node)
    assert cost_of(node) == Cost(read=16, written=16)
    assert "fxopt_cost_test::halve" in str(fxopt.profile(graph, measure=False))
    try:
        formula("fxopt_cost_test::halve")(lambda call: Work(0, call.out_elements))
        assert is_counted(node)
        assert cost_of(node).flops == 4
    finally:
        del FORMULAS["fxopt_cost_test::halve"]
        formula_of.cache_clear()


def test_every_named_operator_exists() -> None:
    import_torchvision()
    missing = [
        name for name in FORMULAS
        if "::" not in name and not hasattr(torch.ops.aten, name)
    ]  # fmt: skip
    assert not missing


def test_the_page_holds_the_formulas() -> None:
    page = (Path(__file__).parent.parent / "docs" / "costs.md").read_text(encoding="utf-8")
    for name, one in FORMULAS.items():
        assert one.words.endswith("."), f"{name} does not say what it counts"
        if one.words != FORMULAS["cat"].words:
            assert one.words in page, "run: python tools/costs.py formulas"


def test_figures_are_plain_numbers() -> None:
    graph = graph_of(nn.Conv2d(4, 6, 3), image)
    assert json.dumps([vars(cost_of(node)) for node in graph.graph.nodes])


def test_graphs_that_are_decomposed_already() -> None:
    """A program from torch.export has operators that capture would not have made."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Softmax(-1))
    model.eval()
    program = torch.export.export(model, (image,)).run_decompositions()
    graph = fxopt.capture(program)
    assert all(map(is_counted, graph.graph.nodes))
    assert total(map(cost_of, graph.graph.nodes)).flops == cost(model, image).flops
