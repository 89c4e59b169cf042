"""Calling a graph: what fits, what does not and why; and shapes that differ from call to call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import fxopt
from fxopt.inputs import as_inputs
from fxopt.testing import relative_error
from tests.test_capture import Model, Pair, Record

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def rows(n: int) -> torch.Tensor:
    return torch.randn(n, 4)


def agrees(graph: fxopt.GraphModule, model: nn.Module, inputs: Any) -> None:
    call = as_inputs(inputs)
    expected = copy.deepcopy(model)(*call.args, **call.kwargs)
    assert relative_error(graph(*call.args, **call.kwargs), expected) < 1e-6


# -- calls --------------------------------------------------------------------------------------


def test_arguments_may_be_given_by_position_or_by_name_with_the_models_defaults() -> None:
    model = Model(lambda self, x, *, y=None, scale=2.0: x * scale if y is None else x + y)
    graph = fxopt.capture(model, ((X,), {"y": X}))
    assert torch.equal(graph(X, y=X), graph(x=X, y=X))
    assert torch.equal(graph(X, y=X, scale=2.0), 2 * X)
    dictionary = fxopt.capture(Model(lambda self, x: x["a"] - x["b"]), ({"a": X, "b": 2 * X},))
    assert torch.equal(dictionary({"b": 2 * X, "a": X}), -X)  # in another order


LINEAR = "linear"
REFUSED: list[tuple[str, Callable[..., Any], Any, Any, list[str]]] = [
    ("another size", LINEAR, X, (X[:2],), ["dimension 0 is 2", "{'input': {0: 'size'}}"]),
    ("another rank", LINEAR, X, (X[0],), ["1 dimensions (4,)", "(3, 4)", "Reshape"]),
    ("another dtype", LINEAR, X, (X.double(),), ["torch.float64", ".to(torch.float32)"]),
    ("another device", LINEAR, X, (X.to("meta"),), ["is on meta", ".to('cpu')"]),
    ("a sparse tensor", LINEAR, X, (X.to_sparse(),), ["sparse", ".to_dense()"]),
    ("no tensor", LINEAR, X, (3.5,), ["must be a tensor, got 3.5", "torch.as_tensor"]),
    ("too few", LINEAR, X, (), ["missing a required argument: 'input'"]),
    ("too many", LINEAR, X, (X, X), ["too many positional arguments"]),
    ("other nesting", lambda self, xs: xs[0], ([X, X],), ([X],), ["xs=[*, *]", "xs=[*]"]),
    ("inside a list", lambda self, xs: xs[0] + xs[1], ([X, X],), ([X, X[:1]],), ["'xs[1]'"]),
    ("another flag", lambda self, x, f: x * f, (X, True), (X, False), ["'f' is False", "baked in"]),
    ("1 for True", lambda self, x, f: x * f, (X, True), (X, 1), ["'f' is 1", "with True"]),
    ("3.0 for 3", lambda self, x, n: x * n, (X, 3), (X, 3.0), ["'n' is 3.0", "with 3"]),
    ("a tensor for None", lambda self, x, m: x, (X, None), (X, X), ["a tensor of shape (3, 4)"]),
    ("None for a tensor", lambda self, x, m: x * m, (X, X), (X, None), ["got None"]),
    ("a default changed", lambda self, x, k=2: x * k, (X,), (X, 3), ["its default is baked in"]),
]


@pytest.mark.parametrize(
    ("function", "inputs", "call", "parts"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_a_call_that_does_not_fit_says_what_and_where(
    function: Any, inputs: Any, call: Any, parts: list[str]
) -> None:
    model = nn.Linear(4, 4) if function == LINEAR else Model(function)
    graph = fxopt.capture(model, inputs)
    with pytest.raises(fxopt.ShapeError) as caught:
        graph(*call)
    for part in parts:
        assert part in str(caught.value)


# -- dynamic shapes -----------------------------------------------------------------------------

N = Dim("n")


@pytest.mark.parametrize("example", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "shapes",
    [
        {0: "n"},
        {-2: "n"},
        {"input": {0: "n"}},
        {"input": {0: N}},
        {"input": {0: Dim.DYNAMIC}},
        {"input": {0: Dim.AUTO}},
        {"input": {0: True}},
        {"input": ("n", None)},
        ({0: "n", 1: None},),
        [{0: "n", 1: Dim.STATIC}],
    ],
)
def test_every_form_and_every_example_size_gives_a_dynamic_dimension(
    shapes: Any, example: int
) -> None:
    model = nn.Linear(4, 5)
    graph = fxopt.capture(model, rows(example), dynamic_shapes=shapes)
    for n in (0, 1, 2, 7):
        agrees(graph, model, rows(n))


NESTED = [
    (lambda self, x: x["a"] + x["b"][0], lambda n: ({"a": rows(n), "b": [rows(n)]},)),
    (lambda self, x: x.p + x.q, lambda n: (Pair(rows(n), rows(n)),)),
    (lambda self, x: x.p + x.q.p, lambda n: (Record(rows(n), Record(rows(n), 1)),)),
    (lambda self, *xs: xs[0] + xs[1], lambda n: (rows(n), rows(n))),
    (lambda self, x, flag=True, mask=None: x * 2, lambda n: (rows(n), True, None)),
]


@pytest.mark.parametrize(("function", "inputs"), NESTED)
def test_one_name_for_every_tensor_in_nested_inputs(function: Any, inputs: Any) -> None:
    graph = fxopt.capture(Model(function), inputs(1), dynamic_shapes={0: "n"})
    agrees(graph, Model(function), inputs(5))


def test_a_spec_may_follow_the_nesting_and_a_dataclass_by_field() -> None:
    model = Model(lambda self, d, r: d["x"][0] + r.p)
    spec = {"d": {"x": [{0: "n"}]}, "r": {"p": {0: "n"}}}
    graph = fxopt.capture(model, ({"x": [rows(1)]}, Record(rows(1))), dynamic_shapes=spec)
    agrees(graph, model, ({"x": [rows(5)]}, Record(rows(5))))


def test_inputs_that_share_a_dimension_must_agree() -> None:
    model = Model(lambda self, a, b: a + b)
    graph = fxopt.capture(model, (X, X), dynamic_shapes={"a": {0: "n"}, "b": {0: "n"}})
    agrees(graph, model, (rows(6), rows(6)))
    with pytest.raises(fxopt.ShapeError, match=r"'b': dimension 0 is 5.* 6, that is a\.shape\[0\]"):
        graph(rows(6), rows(5))


def test_derived_dimensions() -> None:
    model = Model(lambda self, a, b: a + b[1:])
    for examples in ((rows(3), rows(4)), (rows(1), rows(2))):
        graph = fxopt.capture(model, examples, dynamic_shapes={"a": {0: N}, "b": {0: N + 1}})
        agrees(graph, model, (rows(6), rows(7)))
        with pytest.raises(fxopt.ShapeError, match=r"7, that is a\.shape\[0\] \+ 1"):
            graph(rows(6), rows(6))
    even = Model(lambda self, x: x.view(-1, 2, 4))
    graph = fxopt.capture(even, rows(4), dynamic_shapes={"x": {0: 2 * N}})
    agrees(graph, even, rows(6))
    with pytest.raises(fxopt.ShapeError, match="dimension 0 is 5"):
        graph(rows(5))


def test_ranges_hold_ever_after() -> None:
    spec = {"input": {0: Dim("n", min=3, max=8)}}
    graph = fxopt.capture(nn.Linear(4, 4), X, dynamic_shapes=spec)
    assert list(graph.info.signature.ranges.values()) == [(3, 8)]
    for one in (graph, fxopt.optimize(graph), fxopt.lower(graph), copy.deepcopy(graph)):
        one(rows(8))
        for n in (2, 9):
            with pytest.raises(fxopt.ShapeError, match=f"is {n}, .* 3 to 8"):
                one(rows(n))


@pytest.mark.parametrize(
    ("model", "example", "axis"),
    [
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), (3, 4, 5, 5), 0),
        (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (3, 5, 4), 0),
        (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (3, 5, 4), 1),
    ],
)
def test_one_row_runs_where_only_torch_itself_asked_for_the_number_of_rows(
    model: nn.Module, example: tuple[int, ...], axis: int
) -> None:
    graph = fxopt.capture(model.eval(), torch.randn(example), dynamic_shapes={axis: "n"})
    agrees(graph, model, torch.randn(example).narrow(axis, 0, 1))


def branching(self: Any, x: Any) -> Any:
    if x.shape[0] == 1:
        return x * 2
    return x * 3 if x.shape[0] % 2 == 0 else x


def test_a_branch_on_a_size_is_refused_where_the_model_goes_the_other_way() -> None:
    graph = fxopt.capture(Model(branching), rows(4), dynamic_shapes={0: "n"})
    agrees(graph, Model(branching), rows(6))
    for n in (1, 5):
        with pytest.raises(fxopt.ShapeError, match=rf"x\.shape\[0\] = {n}"):
            graph(rows(n))


def harmless(self: Any, x: Any) -> Any:
    return x.expand(x.shape[0], 4) * 2 if x.shape[0] != 1 else x * 2


def test_a_branch_on_one_row_is_open_where_the_example_shows_that_both_ways_agree() -> None:
    model = Model(harmless)
    closed = fxopt.capture(model, rows(4), dynamic_shapes={0: "n"})
    with pytest.raises(fxopt.ShapeError):
        closed(rows(1))
    graph = fxopt.capture(model, rows(1), dynamic_shapes={0: "n"})
    agrees(graph, model, rows(1))
    agrees(graph, model, rows(5))
    differs = fxopt.capture(Model(branching), rows(1), dynamic_shapes={0: "n"})
    with pytest.raises(fxopt.ShapeError):
        differs(rows(1))


def test_a_dynamic_integer() -> None:
    model = Model(lambda self, x, n: x[:n] * n)
    for example in (0, 1, 3):
        graph = fxopt.capture(model, (X, example), dynamic_shapes={"n": "n"})
        agrees(graph, model, (X, 2))
        with pytest.raises(fxopt.ShapeError, match="'n' must be an int, got True"):
            graph(X, True)


def test_sizes_among_the_outputs_are_python_integers() -> None:
    model = Model(lambda self, x: (x.shape[0], x.shape[0] * 2 + 1))
    graph = fxopt.capture(model, X, dynamic_shapes={0: "n"})
    assert graph(rows(7)) == (7, 15) and type(graph(rows(7))[0]) is int


def test_writes_under_a_dynamic_dimension() -> None:
    def forward(self: Any, x: Any) -> Any:
        x = x.clone()
        x[:, 0] = 0
        x.chunk(2, 1)[0].mul_(2)
        x.view(-1)[0] = 3
        x.split(2, 0)[0].add_(1)
        return x, torch.zeros_like(x).copy_(torch.ones(4)), x.new_zeros(x.shape[0]).fill_(2)

    graph = fxopt.capture(Model(forward), X, dynamic_shapes={0: "n"})
    fxopt.dialect.check(graph)
    agrees(graph, Model(forward), rows(4))


BAD_SHAPES = [
    ({"x": {0: "n"}}, "names 'x', but the inputs are input"),
    ({"input": {5: "n"}}, "names dimension 5 of 'input'"),
    ({"input": {"rows": "n"}}, "names dimension 'rows'"),
    ({7: "n"}, "names dimension 7, which no input has"),
    ({"input": "n"}, "a tensor of 2 dimensions"),
    ({"input": ["n"]}, "a tensor of 2 dimensions"),
    ({"input": {0: 3.5}}, "gives 3.5 for dimension 0 of 'input', whose size is 3"),
    ({"input": {0: 5}}, "gives 5 for dimension 0"),
    ("n", "cannot be 'n'"),
    ([{0: "n"}, {0: "n"}], "has 2 entries"),
    ({"input": {0: Dim("n", min=5)}}, "not in the range of Dim('n'), from 5"),
    ({"input": {1: "n"}}, "input.shape[1] as dynamic but your code specialized it"),
]


@pytest.mark.parametrize(("shapes", "part"), BAD_SHAPES)
def test_dynamic_shapes_that_make_no_sense(shapes: Any, part: str) -> None:
    with pytest.raises(fxopt.CaptureError) as caught:
        fxopt.capture(nn.Linear(4, 4), X, dynamic_shapes=shapes)
    assert part in str(caught.value)


def test_one_name_for_two_sizes_is_refused() -> None:
    with pytest.raises(fxopt.CaptureError, match="gives the name 'n' to dimension 0 of 'a'"):
        fxopt.capture(Model(lambda self, a, b: (a, b)), (rows(3), rows(5)), dynamic_shapes={0: "n"})
