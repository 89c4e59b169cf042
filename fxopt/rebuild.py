"""A graph from the JSON of an artefact: checked word by word, with every value inferred anew.

What the file says is never trusted: operators are looked up among the registered ones, names must
be plain, attributes must be constants of the file, and the result must be a legal dialect graph.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, free_unbacked_symbols
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from fxopt import dialect, operators
from fxopt.encode import DTYPES, decode, malformed
from fxopt.encode_signature import decode_signature, read_size
from fxopt.errors import ArtefactError, DialectError, FxoptError
from fxopt.graph_module import GraphInfo, GraphModule, Recipe
from fxopt.shapes import fake_of, infer
from fxopt.stored import constant_name, read_constants, read_example

_NODE_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_SYMBOL_NAME = re.compile(r"[a-z]+\d+", re.ASCII)
_MOST_NODES = 1_000_000
_META_KINDS = {"path": str, "module": str, "source": str, "rule": str, "switch": int}


def rebuild(
    content: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    examples: Mapping[str, torch.Tensor],
) -> GraphModule:
    """Return the graph that `content` describes, legal and ready to be lowered or optimized.

    `tensors` are the stored constants, `examples` the stored example inputs, by index; inputs that
    are not stored are made up, within the range of the original ones.
    """
    sizes = _Sizes(content["symbols"])
    constants = read_constants(content["constants"], tensors)
    persistent = {constant_name(c["name"]): c["persistent"] is True for c in content["constants"]}
    graph = _Builder(sizes, constants, persistent).graph(content["graph"], "")
    name, signature = content["name"], content["signature"]
    info = graph.info
    info.model_name = name if isinstance(name, str) and name.isidentifier() else "model"
    info.modules = _text_by_text(content["modules"])
    info.dimensions = {
        str(sizes.symbols[name]): word
        for name, word in _text_by_text(content["dimensions"]).items()
        if name in sizes.symbols
    }
    info.signature = None if signature is None else decode_signature(signature, sizes.symbols)
    info.example_inputs = tuple(
        read_example(index, one, examples) for index, one in enumerate(content["examples"])
    )
    info.sources = frozenset(_words(content["sources"]))
    info.state = frozenset(_words(content["state"]))
    info.ties = {name: _words(names) for name, names in content["ties"].items()}
    info.fitted = frozenset(_words(content["fitted"]))
    info.regularizers = _words(content["regularizers"])
    info.recipes = [_lost_recipe(str(name), _words(of)) for name, of in content["recipes"]]
    info.looked_at = {
        name: (str(rule), str(digest)) for name, (rule, digest) in content["looked_at"].items()
    }
    graph.train_mode(content["training"] is True)
    _check(graph)
    return graph


def _check(graph: GraphModule) -> None:
    try:
        dialect.check(graph)
    except DialectError as error:
        raise ArtefactError(f"Its graph is not legal, so the file is damaged: {error}") from error
    signature, placeholders = graph.info.signature, graph.placeholders
    if signature is None:
        return
    flat = [leaf for leaf in signature.output.leaves if isinstance(leaf, int)]
    outputs: Any = graph.output_node.args[0]
    if len(signature.tensors) != len(placeholders) or any(i >= len(outputs) for i in flat):
        raise malformed("the signature")
    if len(graph.info.example_inputs) != len(placeholders):
        raise malformed("the example inputs")


def _text_by_text(found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise malformed("what names stand for")
    return dict(found)


def _words(written: Any) -> tuple[str, ...]:
    if not isinstance(written, list) or not all(isinstance(word, str) for word in written):
        raise malformed("a list of names")
    return tuple(written)


def _lost_recipe(name: str, sources: tuple[str, ...]) -> Recipe:
    """A recipe whose computation was not saved; replaying it says so."""

    def compute(*_: torch.Tensor) -> torch.Tensor:
        raise FxoptError(
            f"'{name}' was computed from the model's weights by a pass, and a file does not hold "
            "how. Compile the model again with the new weights."
        )

    return Recipe(name, sources, compute)


# -- symbolic sizes -------------------------------------------------------------------------------


class _Sizes:
    """The symbols of the file, re-created in a shape environment of their own."""

    def __init__(self, described: list[Mapping[str, Any]]) -> None:
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        self.symbols: dict[str, sympy.Symbol] = {}  # by their names in the file
        self._hints: dict[sympy.Symbol, int | None] = {}
        for one in described:
            self._create(one)

    def _create(self, one: Mapping[str, Any]) -> None:
        from torch._dynamo.source import ConstantSource  # a second of import, seldom needed

        name, hint = one["name"], one["hint"]
        if not isinstance(name, str) or not _SYMBOL_NAME.fullmatch(name) or name in self.symbols:
            raise malformed("a symbolic size")
        numbers = [one[key] for key in ("hint", "low", "high") if one[key] is not None]
        if any(type(number) is not int or abs(number) > 2**63 for number in numbers):
            raise malformed("the range of a symbolic size")
        if hint is None:
            with self.env.ignore_fresh_unbacked_symbols():
                symbol = self.env.create_unbacked_symint().node.expr
        else:
            symbol = self.env.create_symbol(
                hint, ConstantSource(name), DimDynamic.DYNAMIC,
                positive=True if one["positive"] else None, do_not_specialize_zero_one=True,
            )  # fmt: skip
        low = -int_oo if one["low"] is None else one["low"]
        high = int_oo if one["high"] is None else one["high"]
        bounds = ValueRanges(low, high) & self.env.var_to_range[symbol]
        if hint is not None and hint not in bounds:
            raise malformed("the range of a symbolic size")
        self.env.var_to_range[symbol] = bounds
        self.symbols[name], self._hints[symbol] = symbol, hint

    def size(self, written: Any) -> Any:
        """Return an int or a symbolic one."""
        found = read_size(written, self.symbols)
        if isinstance(found, int):
            return found
        hints = {symbol: self._hints[symbol] for symbol in found.free_symbols}
        if None in hints.values():
            return self.env.create_symintnode(found, hint=None)
        hint = found.xreplace({symbol: sympy.Integer(value) for symbol, value in hints.items()})
        return self.env.create_symintnode(found, hint=int(hint))

    def value(self, written: Any) -> Any:
        """Return what `fxopt.artefact.write_value` wrote."""
        if "plain" in written:
            return decode(written["plain"])
        if "size" in written:
            return self.size(written["size"])
        for kind in (list, tuple):
            if kind.__name__ in written:
                return kind(self.value(item) for item in written[kind.__name__])
        shape, stride = (list(map(self.size, written[key])) for key in ("shape", "stride"))
        if len(shape) != len(stride):
            raise malformed("a shape")
        with torch.no_grad(), self.mode:
            return torch.empty_strided(
                shape, stride, dtype=DTYPES[written["dtype"]], device=str(written["device"])
            )


# -- nodes ----------------------------------------------------------------------------------------


class _Builder:
    """Builds the graph and its sub-graphs, node by node."""

    def __init__(
        self, sizes: _Sizes, constants: Mapping[str, torch.Tensor], persistent: Mapping[str, bool]
    ) -> None:
        self._sizes = sizes
        self._constants = constants
        self._persistent = persistent

    def graph(self, written: Mapping[str, Any], prefix: str) -> GraphModule:
        """Return one graph, whose constants are those under `prefix`."""
        subgraphs = {
            constant_name(name): self.graph(inner, f"{prefix}{name}.")
            for name, inner in written["subgraphs"].items()
        }
        if len(written["nodes"]) > _MOST_NODES:
            raise malformed(f"a graph of more than {_MOST_NODES} nodes")
        graph = fx.Graph()
        nodes: dict[str, fx.Node] = {}
        for one in written["nodes"]:
            name = one["name"]
            if not _is_name(name) or name in nodes:
                raise malformed("the name of a node")
            nodes[name] = node = self._node(one, graph, nodes, prefix, subgraphs)
            node.meta.update(_meta(one.get("meta", {})))
        if not nodes or node.op != "output":
            raise malformed("a graph without an output")
        result = GraphModule(torch.nn.Module(), fx.Graph())
        result.meta["fxopt"] = GraphInfo(
            None, self._sizes.mode, mutated=frozenset(_words(written["mutated"])),
            shares_storage=False,
        )  # fmt: skip
        self._register(result, prefix, subgraphs)
        result.graph = graph
        return result

    def _register(
        self, graph: GraphModule, prefix: str, subgraphs: Mapping[str, GraphModule]
    ) -> None:
        inner = tuple(f"{prefix}{name}." for name in subgraphs)
        for name, tensor in self._constants.items():
            if name.startswith(prefix) and not name.startswith(inner):
                own = _free_name(graph, name.removeprefix(prefix))
                graph.set_constant(own, tensor, persistent=self._persistent[name])
        for name, subgraph in subgraphs.items():
            graph.set_constant(_free_name(graph, name), subgraph)

    def _node(
        self,
        one: Mapping[str, Any],
        graph: fx.Graph,
        nodes: Mapping[str, fx.Node],
        prefix: str,
        subgraphs: Mapping[str, GraphModule],
    ) -> fx.Node:
        op, name = one["op"], one["name"]
        if op == "placeholder":
            node = graph.create_node("placeholder", name, name=name)
            node.meta["val"] = self._sizes.value(one["val"])
        elif op == "get_attr":
            target = constant_name(one["target"])
            node = graph.create_node("get_attr", target, name=name)
            if target not in subgraphs:
                if prefix + target not in self._constants:
                    raise ArtefactError(f"The constant '{target}' is missing: the file is damaged.")
                node.meta["val"] = fake_of(self._constants[prefix + target], self._sizes.mode)
        elif op == "output":
            node = graph.create_node("output", "output", decode(one["args"], nodes), name=name)
        elif op == "call_function":
            node = self._call(one, graph, nodes)
        else:
            raise malformed(f"a node of the kind '{op!s:.40}'")
        return node

    def _call(
        self, one: Mapping[str, Any], graph: fx.Graph, nodes: Mapping[str, fx.Node]
    ) -> fx.Node:
        target = operators.resolve(one["target"])
        args = decode(one["args"], nodes)
        kwargs = {name: decode(value, nodes) for name, value in one["kwargs"].items()}
        if not isinstance(args, tuple) or not all(map(_is_name, kwargs)):
            raise malformed("the arguments of a node")
        operators.check_arguments(target, args, kwargs)
        node = graph.create_node("call_function", target, args, kwargs, name=one["name"])
        if "val" in one:
            node.meta["val"] = value = self._sizes.value(one["val"])
            is_told = isinstance(target, HigherOrderOperator) or value is None
            if not (is_told or _depends_on_data(value)):
                raise malformed("the value of a node")
            return node
        try:
            with self._sizes.env.ignore_fresh_unbacked_symbols():
                node.meta["val"] = infer(target, node.args, node.kwargs, self._sizes.mode)
        except Exception as error:  # an operator refuses wrong arguments in its own way
            raise ArtefactError(
                f"The call '{one['name']}' of {one['target']} is not possible: {error!s:.300} "
                "The file is damaged."
            ) from error
        return node


def _depends_on_data(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else (value,)
    return any(free_unbacked_symbols(one) for one in values)


def _meta(written: Mapping[str, Any]) -> dict[str, Any]:
    meta: dict[str, Any] = {
        key: written[key] for key, kind in _META_KINDS.items() if type(written.get(key)) is kind
    }
    if "replaces" in written:
        meta["replaces"] = tuple(map(str, written["replaces"]))
    return meta


def _is_name(name: Any) -> bool:
    """Whether a name can stand in the graph's code as it is."""
    is_plain = isinstance(name, str) and len(name) < 1000 and _NODE_NAME.fullmatch(name)
    return bool(is_plain) and not keyword.iskeyword(name)


def _free_name(graph: GraphModule, name: str) -> str:
    if graph.has_constant(name):
        raise ArtefactError(f"The constant '{name}' cannot have that name.")
    return name
