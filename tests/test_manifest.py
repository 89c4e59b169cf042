"""Manifests: the signature that is read back behaves like the one that was written."""

from __future__ import annotations

import json
import logging
import math
import sys
import types
from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sympy
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import Mod

import fxopt
from fxopt.backends import Eager
from fxopt.encode import decode, decode_spec, encode, encode_spec
from fxopt.errors import ArtefactError, ShapeError
from fxopt.manifest import FORMAT, Manifest, read_manifest, write_manifest
from fxopt.signature import ConstantLeaf, Signature
from tests.models import ConvBnRelu, Tokens

HERE = Path("model.fxopt")


class Pair(NamedTuple):
    first: Any
    second: Any


Plain = namedtuple("Plain", "a b")


@dataclass
class Result:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Nested(nn.Module):
    """Every kind of argument, nested inputs, and outputs with constants among them."""

    def forward(
        self, x: torch.Tensor, pair: Any, *more: torch.Tensor, scale: float = 2.0, mode: str = "a",
        hook: Any = print, **named: torch.Tensor,
    ) -> Any:  # fmt: skip
        total = x * scale + pair["left"][0] + pair["right"]
        for one in (*more, *named.values()):
            total = total + one
        return {"out": [total, None], "kept": (True, 3, 0.5, "text", math.inf), "x": x}


def signature_of(model: nn.Module, inputs: Any, **options: Any) -> Signature:
    found = fxopt.capture(model.eval(), inputs, **options).info.signature
    assert found is not None
    return found


def round_trip(signature: Signature) -> Signature:
    return read_manifest(write_manifest(signature, Eager(), None), HERE).signature


def nested_inputs() -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = torch.randn(3)
    pair = OrderedDict(left=[torch.randn(3)], right=torch.randn(3))
    return (x, pair, torch.randn(3)), {"scale": 3.0, "extra": torch.randn(3)}


def test_a_manifest_says_what_was_done() -> None:
    compiled = fxopt.compile(ConvBnRelu(), torch.randn(1, 3, 8, 8))
    text = write_manifest(compiled.signature, compiled.backend, compiled.story)
    found = read_manifest(text, HERE)
    assert isinstance(found, Manifest)
    assert (found.format, found.fxopt, found.torch) == (
        FORMAT, fxopt.__version__, torch.__version__,
    )  # fmt: skip
    assert (found.backend, found.model) == ("eager", "ConvBnRelu")
    assert found.options == {"threads": None, "measure": True, "cuda_graphs": None}
    assert [step["name"] for step in found.passes] == [s.name for s in compiled.story.steps]
    assert [one["what"] for one in found.verifications] == [
        one.what for one in compiled.story.verifications
    ]
    assert text == write_manifest(compiled.signature, compiled.backend, compiled.story)
    json.loads(text, parse_constant=pytest.fail)


def test_calls_are_bound_as_before() -> None:
    args, kwargs = nested_inputs()
    before = signature_of(Nested(), (args, kwargs))
    after = round_trip(before)
    assert after.spec == before.spec and after.leaves == before.leaves
    assert after.output == before.output and after.names == before.names
    for call_kwargs in (kwargs, {**kwargs, "mode": "a"}):
        ours, theirs = after.flatten(args, call_kwargs), before.flatten(args, call_kwargs)
        assert all(a is b for a, b in zip(ours, theirs, strict=True))
    for wrong in ({**kwargs, "scale": 4.0}, {**kwargs, "mode": "b"}, {"extra": args[0]}):
        with pytest.raises(ShapeError):
            before.flatten(args, wrong)
        with pytest.raises(ShapeError):
            after.flatten(args, wrong)


def test_outputs_are_rebuilt_with_their_constants() -> None:
    inputs = nested_inputs()
    signature = signature_of(Nested(), inputs)
    flat = [torch.zeros(3), torch.ones(3)]
    ours, theirs = (one.output.unflatten(flat) for one in (round_trip(signature), signature))
    assert ours["kept"] == theirs["kept"] == (True, 3, 0.5, "text", math.inf)
    assert ours["out"][1] is None and ours["out"][0] is theirs["out"][0]


def test_a_default_that_has_no_json_form_must_be_left_out() -> None:
    args, kwargs = nested_inputs()
    after = round_trip(signature_of(Nested(), (args, kwargs)))
    after.flatten(args, kwargs)
    with pytest.raises(ShapeError, match="hook"):
        after.flatten(args, {**kwargs, "hook": print})
    assert "built-in function print" in str(after.parameters)
    again = round_trip(after)
    assert str(again.parameters) == str(after.parameters)


def test_a_constant_argument_that_has_no_json_form_is_refused_when_saving() -> None:
    config = types.SimpleNamespace(scale=2.0)
    signature = signature_of(nn.Identity(), torch.ones(2))
    odd = Signature(
        signature.parameters, signature.names, signature.spec, (ConstantLeaf("config", config),),
        signature.output, {},
    )  # fmt: skip
    with pytest.raises(ArtefactError, match=r"'config' of the model's call.*SimpleNamespace"):
        write_manifest(odd, Eager(), None)


def test_dynamic_sizes_keep_their_ranges_and_ties() -> None:
    class Tied(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x]) + y

    batch = torch.export.Dim("batch", min=4, max=50)
    before = signature_of(
        Tied(), (torch.ones(4, 3), torch.ones(8, 3)),
        dynamic_shapes={"x": {0: batch}, "y": {0: 2 * batch}},
    )  # fmt: skip
    after = round_trip(before)
    assert after.ranges == before.ranges and after.leaves == before.leaves
    after.check([torch.ones(5, 3), torch.ones(10, 3)])
    for x, y in ((5, 11), (51, 102), (3, 6)):
        for one in (before, after):
            with pytest.raises(ShapeError):
                one.check([torch.ones(x, 3), torch.ones(y, 3)])


def test_conditions_on_sizes_are_kept() -> None:
    signature = signature_of(nn.ReLU(), torch.ones(4, 3), dynamic_shapes={0: "rows", 1: "columns"})
    rows, columns = signature.tensors[0].shape
    guards = (
        sympy.Ne(rows, 7), sympy.Eq(Mod(rows, 2), 0), rows < columns + 9,
        sympy.Or(rows > 2, sympy.And(columns >= 3, sympy.Not(sympy.Eq(columns, 5)))),
    )  # fmt: skip
    before = Signature(
        signature.parameters, signature.names, signature.spec, signature.leaves, signature.output,
        signature.ranges, guards,
    )  # fmt: skip
    after = round_trip(before)
    assert after.guards == guards
    after.check([torch.ones(4, 3)])
    with pytest.raises(ShapeError):
        after.check([torch.ones(5, 3)])
    odd = Signature(
        signature.parameters, signature.names, signature.spec, signature.leaves, signature.output,
        {}, (sympy.Xor(rows > 2, columns > 2),),
    )  # fmt: skip
    with pytest.raises(ArtefactError, match="condition"):
        write_manifest(odd, Eager(), None)


@pytest.mark.parametrize("value", [
    None, True, 0, -1, 2**62, 1.5, -0.0, math.inf, -math.inf, "ü'\"\\\n", [], (), [1, (2, [3])],
    {"a": 1, 2: (3,)}, 1 + 2j, complex(math.inf, 0), slice(1, None, 2), range(3), ...,
    torch.float16, torch.bool, torch.device("cpu"), torch.device("cuda:1"), torch.strided,
    torch.channels_last,
], ids=repr)  # fmt: skip
def test_a_value_is_read_back(value: Any) -> None:
    found = decode(json.loads(json.dumps(encode(value), allow_nan=False)))
    assert found == value and type(found) is type(value)


def test_nan_is_read_back() -> None:
    assert math.isnan(decode(encode(math.nan)))


@pytest.mark.parametrize("written", [
    {}, {"a": 1, "b": 2}, {"exec": "1"}, {"node": "x"}, {"dtype": "Tensor"}, {"dtype": ["float32"]},
    {"layout": "load"}, {"memory_format": "nn"}, {"tuple": 3},
], ids=str)  # fmt: skip
def test_a_value_of_no_known_kind_is_refused(written: Any) -> None:
    with pytest.raises(ArtefactError):
        decode(written)


STRUCTURES: list[Any] = [
    1, (), [1], (1, [2, {"a": 3}]), {}, {"b": 1, "a": 2}, OrderedDict(b=1, a=2), {1: 2, "x": (3,)},
    defaultdict(list, {"a": 1}), deque([1, 2], maxlen=3), Pair(1, [2]), Plain(1, 2),
    torch.return_types.topk((1, 2)),
]  # fmt: skip


@pytest.mark.parametrize("value", STRUCTURES, ids=str)
def test_a_structure_is_read_back(value: Any) -> None:
    leaves, spec = pytree.tree_flatten(value)
    found = decode_spec(json.loads(json.dumps(encode_spec(spec))))
    assert found == spec
    rebuilt = pytree.tree_unflatten(leaves, found)
    assert type(rebuilt) is type(value) and rebuilt == value


def test_a_registered_dataclass_is_used() -> None:
    if Result not in pytree.SUPPORTED_NODES:
        torch.export.register_dataclass(Result, serialized_type_name="tests.Result")
    leaves, spec = pytree.tree_flatten(Result(torch.ones(1)))
    found = decode_spec(encode_spec(spec))
    rebuilt = pytree.tree_unflatten(leaves, found)
    assert isinstance(rebuilt, Result) and rebuilt.loss is None


def test_a_class_that_is_not_known_becomes_a_dict(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="fxopt")
    spec = {
        "kind": "class", "class": "not_imported.models:Output", "fields": ["logits", "loss"],
        "context": [["logits", "loss"], []], "children": [None, None],
    }  # fmt: skip
    assert pytree.tree_unflatten([1, 2], decode_spec(spec)) == {"logits": 1, "loss": 2}
    assert "not_imported" not in sys.modules
    assert "not_imported.models:Output" in caplog.text
    with pytest.raises(ArtefactError, match="Import its module"):
        decode_spec({**spec, "fields": None})


@pytest.mark.parametrize("name", [
    "os:system", "builtins:eval", "subprocess:Popen", "builtins:type", "pathlib:Path", "a:b:c", "",
    "torch.nn:Linear", "antigravity:x",
])  # fmt: skip
def test_a_class_that_is_no_registered_pytree_is_never_used(name: str) -> None:
    before = set(sys.modules)
    for kind, fallback in (("class", dict), ("namedtuple", tuple)):
        spec = decode_spec({
            "kind": kind, "class": name, "fields": ["a"], "context": ["a"], "children": [None],
        })  # fmt: skip
        assert spec.type is fallback
    assert set(sys.modules) == before


def test_a_named_tuple_with_a_constructor_of_its_own_is_not_used() -> None:
    spec = encode_spec(pytree.tree_structure(Pair(1, 2)))
    assert decode_spec(spec).context is Pair
    assert decode_spec({**spec, "class": f"{__name__}:Armed"}).type is tuple


class Armed(Pair):
    def __new__(cls, *args: Any) -> Armed:
        raise AssertionError("a constructor was run")


def damaged() -> list[Any]:
    signature = signature_of(Tokens(), torch.zeros(1, 2, dtype=torch.long))
    text = write_manifest(signature, Eager(), None)
    whole = json.loads(text)
    found = [text[:cut] for cut in range(0, len(text), 97)]
    for key in whole:
        found.append(json.dumps({k: v for k, v in whole.items() if k != key}))
        found.append(json.dumps({**whole, key: [[]]}))
    for key in whole["signature"]:
        for value in (None, 3, "x", [], {}, [[3]]):
            if value != whole["signature"][key]:
                found.append(json.dumps({**whole, "signature": {**whole["signature"], key: value}}))
    return [*found, "[" * 100_000, "NaN", "1", '"', json.dumps({**whole, "format": "1"})]


def test_a_damaged_manifest_is_an_artefact_error() -> None:
    for text in damaged():
        try:
            read_manifest(text, HERE)
        except ArtefactError as error:
            assert "model.fxopt" in str(error)


def test_a_newer_format_names_the_versions() -> None:
    text = write_manifest(signature_of(nn.ReLU(), torch.ones(2)), Eager(), None)
    newer = json.dumps({**json.loads(text), "format": FORMAT + 1, "fxopt": "9.9"})
    with pytest.raises(ArtefactError, match=rf"format {FORMAT + 1}.*fxopt 9\.9.*up to {FORMAT}"):
        read_manifest(newer, HERE)
