"""The graph that everything works on: an fx graph, its constants, and how it is called."""

from __future__ import annotations

import keyword
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.graph import _format_target

from fxopt.errors import FxoptError
from fxopt.signature import Signature

if TYPE_CHECKING:
    from fxopt.story import Story


_WRITING_CODE = threading.RLock()


@dataclass(frozen=True)
class Recipe:
    """How a constant that a pass made follows from earlier ones: `name = compute(*sources)`.

    `compute` returns one tensor. Replaying all recipes in order is what
    `CompiledModel.update` does with newly trained weights.
    """

    name: str
    sources: tuple[str, ...]
    compute: Callable[..., torch.Tensor]


@dataclass
class GraphInfo:
    """What a graph knows beside its nodes; it lives in `graph_module.meta["fxopt"]`."""

    signature: Signature | None  # None for the sub-graph of a control-flow operator
    fake_mode: FakeTensorMode
    example_inputs: tuple[Any, ...] = ()  # flat, in the order of the placeholders
    model_name: str = "model"
    modules: Mapping[str, str] = field(default_factory=dict)  # class by path, also of containers
    dimensions: Mapping[str, str] = field(default_factory=dict)  # names of symbolic sizes
    recipes: list[Recipe] = field(default_factory=list)
    mutated: frozenset[str] = frozenset()  # constants that the graph itself writes back
    sources: frozenset[str] = frozenset()  # the constants' names at capture
    state: frozenset[str] = frozenset()  # those of them that stand in the model's state_dict
    held: dict[str, torch.Tensor] = field(default_factory=dict)  # erased ones that do not
    ties: dict[str, tuple[str, ...]] = field(default_factory=dict)  # all names of a tied constant
    looked_at: dict[str, tuple[str, str]] = field(default_factory=dict)  # by rules; see replay
    fitted: frozenset[str] = frozenset()  # constants that were fit to data
    unused: frozenset[str] = frozenset()  # names in the model's state_dict that no node needs
    regularizers: tuple[str, ...] = ()  # active in training only, and absent from this graph
    story: Story | None = None
    capture_seconds: float = 0.0
    shares_storage: bool = True


class Part(torch.nn.Module):
    """A module on the path to a constant; it hands out weights as the graph itself does."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.training = graph.training
        self.belong_to(graph)

    def belong_to(self, graph: GraphModule) -> None:
        """Make `graph` the one whose storage is copied."""
        self.__dict__["_graph"] = weakref.ref(graph)

    def _own(self) -> None:
        graph = self.__dict__["_graph"]()
        if graph is not None:
            graph.own_storage()

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """Hand out the parameters."""
        self._own()
        return super().named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """Hand out the buffers."""
        self._own()
        return super().named_buffers(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Hand out the weights."""
        self._own()
        return super().state_dict(*args, **kwargs)


def _is_no_python(name: str) -> bool:
    """Whether fx writes a constant's path as code that cannot be compiled."""
    quoting = not set('"\\\n\r').isdisjoint(name)
    return quoting or any(map(keyword.iskeyword, name.split(".")))


class GraphModule(fx.GraphModule):
    """A dialect graph as a trainable `nn.Module`, called exactly like the model it came from.

    Placeholders take flat tensors, the output is a tuple of tensors, and `run` executes just
    that; calling the module flattens the model's own arguments and rebuilds its own outputs.
    Code is generated at the first run after a change, never while passes work.

    Parameters and buffers share their storage with the captured model until this module is about
    to write: `train()`, `load_state_dict()` and handing out `parameters()`, `buffers()` or
    `state_dict()` copy them first. So training the captured model changes this graph, too, until
    then; a tensor that is reached by attribute (`graph.conv.weight`) may be shared: only read it.
    """

    def __init__(self, root: Any, graph: fx.Graph, class_name: str = "GraphModule") -> None:
        self._compiled: Callable[..., tuple[Any, ...]] | None = None
        self._derived: dict[str, bool] = {}  # whether a constant made by a pass is fixed
        self._recipes_seen = 0
        super().__init__(root, graph, class_name)
        self.train_mode(False)

    # -- running ------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the graph with the model's own arguments; see `Signature.check` for errors."""
        signature = self.info.signature
        if signature is None:
            return self.run(*args)
        flat = signature.flatten(args, kwargs)
        signature.check(flat)
        return signature.output.unflatten(self.run(*flat))

    def run(self, *flat: Any) -> tuple[Any, ...]:
        """Execute the graph on flat inputs and return its flat outputs."""
        function = self._compiled
        if function is None:
            with _WRITING_CODE:  # fx changes the nodes while it writes
                function = self._compiled or self._write_code()
        return function(self, *flat)

    def _write_code(self) -> Callable[..., tuple[Any, ...]]:
        code = self._graph.python_code(root_module="self")
        source, namespace = self._by_registry(code.src), dict(code.globals)
        exec(compile(source, f"<fxopt graph of {self.info.model_name}>", "exec"), namespace)
        function: Callable[..., tuple[Any, ...]] = namespace["forward"]
        self._compiled = function
        return function

    def _by_registry(self, source: str) -> str:
        """Let the code ask for constants whose path is no Python, such as `self.lambda.weight`."""
        for node in self._graph.find_nodes(op="get_attr"):
            name = str(node.target)
            if _is_no_python(name):
                written = f"{node.name} = {_format_target('self', name)}"
                asked = f"{node.name} = self.constant({name!r})"
                for end in ("\n", ";"):
                    source = source.replace(written + end, asked + end)
        return source

    def recompile(self) -> Any:
        """Forget the generated code; it is made again at the next run."""
        self._compiled = None

    def __str__(self) -> str:
        from fxopt.text import graph_text

        name = self.info.model_name if "fxopt" in self.meta else "graph"
        return f"{name}:\n{graph_text(self)}"

    __repr__ = __str__

    def _repr_svg_(self) -> str | None:
        """Show the graph in a notebook; None, so that it shows its text, where `dot` is missing."""
        from fxopt.picture.notebook import graph_svg

        return graph_svg(self)

    @property
    def code(self) -> str:
        """The Python code of the graph."""
        return str(self._graph.python_code(root_module="self").src)

    # -- information --------------------------------------------------------------------------

    @property
    def info(self) -> GraphInfo:
        """What the graph knows beside its nodes."""
        info = self.meta.get("fxopt")
        if not isinstance(info, GraphInfo):
            raise FxoptError("This graph module was not made by fxopt.capture; capture it first.")
        return info

    @property
    def is_subgraph(self) -> bool:
        """Whether this is the body of a control-flow operator, called with flat arguments."""
        return self.info.signature is None

    @property
    def story(self) -> Story:
        """The record of what `optimize` did to this graph."""
        if self.info.story is None:
            raise FxoptError("This graph has no story yet; fxopt.optimize(...) writes one.")
        return self.info.story

    @property
    def report(self) -> Any:
        """The printable report of the story."""
        from fxopt.report import Report

        return Report(self.story)

    def find(self, *targets: Any) -> list[fx.Node]:
        """Return the call nodes of any of `targets`, in graph order."""
        if len(targets) == 1:
            return list(self.graph.find_nodes(op="call_function", target=targets[0]))
        wanted = set(targets)
        return [n for n in self.graph.nodes if n.op == "call_function" and n.target in wanted]

    @property
    def output_node(self) -> fx.Node:
        """The one output node."""
        return next(iter(reversed(self.graph.nodes)))

    @property
    def placeholders(self) -> list[fx.Node]:
        """The input nodes, in call order."""
        return list(self.graph.find_nodes(op="placeholder"))

    def subgraphs(self) -> Iterator[GraphModule]:
        """Yield the graphs of control-flow operators (cond, while_loop…), innermost first."""
        for node in self.graph.find_nodes(op="get_attr"):
            if "val" in node.meta or not self.has_constant(str(node.target)):
                continue  # a tensor
            value = self.value(node)
            if isinstance(value, GraphModule):
                yield from value.subgraphs()
                yield value

    # -- constants ----------------------------------------------------------------------------

    def value(self, node: fx.Node) -> Any:
        """Return the tensor (or sub-graph) of a get_attr node."""
        return self.constant(str(node.target))

    def constant(self, name: str) -> Any:
        """Return the constant called `name`, a dotted path. Raises AttributeError without one."""
        path, _, leaf = name.rpartition(".")
        module = self._module_at(path)
        for kind in (module._parameters, module._buffers, module._modules):
            if leaf in kind:
                return kind[leaf]
        raise AttributeError(f"The graph has no constant '{name}'.")

    def fixed_tensor(self, name: str) -> torch.Tensor | None:
        """Return a constant that no new weights can change; None for weights and state.

        Fixed is what stands in the model's code, and what passes computed from that alone.
        """
        info = self.info
        if name in info.mutated or not self.has_constant(name):
            return None
        for one in info.recipes[self._recipes_seen :]:  # in order: sources come first
            self._derived[one.name] = all(map(self._is_fixed, one.sources))
        self._recipes_seen = len(info.recipes)
        value = self.constant(name) if self._is_fixed(name) else None
        return value if isinstance(value, torch.Tensor) else None

    def forget_recipes(self, names: Collection[str]) -> None:
        """Forget how constants were computed, unless others were computed from them."""
        kept: list[Recipe] = []
        needed: set[str] = set()
        for recipe in reversed(self.info.recipes):
            if recipe.name not in names or recipe.name in needed:
                kept.append(recipe)
                needed.update(recipe.sources)
        self.info.recipes[:] = reversed(kept)
        self._derived, self._recipes_seen = {}, 0

    def _is_fixed(self, name: str) -> bool:
        return self._derived.get(name, name not in self.info.state)

    def _module_at(self, path: str) -> torch.nn.Module:
        """Return a module by its path; its name may be that of a method of ours."""
        module: Any = self
        for part in path.split(".") if path else ():
            module = module._modules.get(part)
            if module is None:
                raise AttributeError(f"The graph has no module '{path}'.")
        return module

    def constants(self) -> dict[str, torch.Tensor]:
        """Return every constant tensor by name; those of sub-graphs are theirs.

        Shared storage stays shared: whoever wants to write calls `own_storage` first.
        """
        found = {}
        pending: list[tuple[str, torch.nn.Module]] = [("", self)]
        while pending:
            dot, module = pending.pop()
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    found[dot + name] = tensor
            children = [
                (f"{dot}{name}.", inner)
                for name, inner in module._modules.items() if inner is not None
            ]
            pending += [child for child in children[::-1] if not isinstance(child[1], GraphModule)]
        return found

    def set_constant(self, name: str, value: Any, *, persistent: bool = True) -> None:
        """Register a parameter, buffer or sub-graph under a dotted path."""
        *path, leaf = name.split(".")
        module: torch.nn.Module = self
        for part in path:
            if part not in module._modules:
                module._modules[part] = Part(self)
            inner = module._modules[part]
            assert inner is not None
            module = inner
        if isinstance(value, torch.nn.Parameter):
            module._parameters[leaf] = value
        elif isinstance(value, torch.Tensor):
            module._buffers[leaf] = value
            if persistent:
                module._non_persistent_buffers_set.discard(leaf)
            else:
                module._non_persistent_buffers_set.add(leaf)
        else:
            module._modules[leaf] = value

    def has_constant(self, name: str) -> bool:
        """Whether `name` is taken, by a constant or by anything on its path."""
        module: Any = self
        *path, leaf = name.split(".")
        for part in path:
            if part not in module._modules:
                return hasattr(module, part)
            module = module._modules[part]
        return hasattr(module, leaf)

    def is_persistent(self, name: str) -> bool:
        """Whether the constant appears in `state_dict()`."""
        prefix, _, leaf = name.rpartition(".")
        return leaf not in self._module_at(prefix)._non_persistent_buffers_set

    def delete_constant(self, name: str) -> None:
        """Remove a constant, and the modules on its path that this leaves empty."""
        path, _, leaf = name.rpartition(".")
        if name in self.info.sources and name not in self.info.state:
            self.info.held[name] = self.constant(name)  # new weights may have to meet it again
        delattr(self._module_at(path), leaf)
        while path:
            module = self._module_at(path)
            if module._modules or module._parameters or module._buffers:
                return
            path, _, leaf = path.rpartition(".")
            delattr(self._module_at(path), leaf)

    # -- training -----------------------------------------------------------------------------

    def train_mode(self, mode: bool) -> None:
        """Set the flag of every module, and nothing else."""
        for module in self.modules():
            module.training = mode

    def train(self, mode: bool = True) -> GraphModule:
        """Switch those batch norms and dropouts whose owning module would switch."""
        if mode:
            self.own_storage()
        self.train_mode(mode)
        if "fxopt" in self.meta:
            for node in self.graph.nodes:
                position = node.meta.get("switch")
                if position is not None and node.args[position] is not mode:
                    node.args = (*node.args[:position], mode, *node.args[position + 1 :])
                    self.recompile()
            for subgraph in self.subgraphs():
                subgraph.train(mode)
        return self

    def own_storage(self) -> None:
        """Copy every constant that shares its storage with another module, once."""
        info = self.meta.get("fxopt")
        if info is None or not info.shares_storage:
            return
        for tensor in {id(tensor): tensor for tensor in self.constants().values()}.values():
            tensor.data = tensor.detach().clone(memory_format=torch.preserve_format)
        info.shares_storage = False
        for subgraph in self.subgraphs():
            subgraph.own_storage()

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """Hand out the parameters; whoever takes them may write, so storage is copied first."""
        self.own_storage()
        return super().named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """Hand out the buffers; see `named_parameters`."""
        self.own_storage()
        return super().named_buffers(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Hand out all weights; see `named_parameters`."""
        self.own_storage()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights, into storage of this module's own.

        The state of the captured model is accepted as it is: with all names of a tied tensor, and
        with entries such as `num_batches_tracked` that the graph does not need.
        """
        self.own_storage()
        given = {name: value for name, value in state_dict.items() if name not in self.info.unused}
        for name, names in self.info.ties.items():
            if self.has_constant(name):
                found = [given.pop(alias) for alias in names if alias in given]
                given.update({name: found[0]} if found else {})
        return super().load_state_dict(given, strict, assign)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> GraphModule:
        """Change how the constants are stored, for `.to(memory_format=…)` and its like."""
        tensors = [*self.parameters(), *self.buffers()]
        for dtype, device in {(tensor.dtype, tensor.device) for tensor in tensors}:
            probe = fn(torch.empty(0, dtype=dtype, device=device))
            if (probe.dtype, probe.device) != (dtype, device):
                raise FxoptError(
                    "A captured graph has dtypes and devices baked into its nodes, so .to(), "
                    ".half(), .double() and .cuda() cannot move it. Use "
                    "fxopt.dialect.retarget(graph, dtype=…, device=…), which rewrites them too."
                )
        return cast(GraphModule, super()._apply(fn, recurse))

    # -- copying ------------------------------------------------------------------------------

    def copy(self) -> GraphModule:
        """Return a graph of its own nodes over the same storage (see the class on writing)."""
        return self._copy(lambda tensor: tensor.data, shares_storage=True)

    def become(self, other: GraphModule) -> None:
        """Take over the nodes, constants and information of `other`, which is used up."""
        self._modules, self._parameters, self._buffers = (
            other._modules, other._parameters, other._buffers,
        )
        self._non_persistent_buffers_set = other._non_persistent_buffers_set
        for module in self.modules():
            if isinstance(module, Part):
                module.belong_to(self)
        self.meta = other.meta
        self._derived, self._recipes_seen = {}, 0
        self.graph = other.graph

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> GraphModule:
        twin = self._copy(lambda tensor: tensor.detach().clone(), shares_storage=False)
        if memo is not None:
            memo[id(self)] = twin
        return twin

    def __copy__(self) -> GraphModule:
        return self.copy()

    def __reduce__(self) -> Any:
        from fxopt.artefact import graph_from_bytes, graph_to_bytes

        return graph_from_bytes, (graph_to_bytes(self),)

    def _copy(
        self, copy_tensor: Callable[[torch.Tensor], torch.Tensor], *, shares_storage: bool
    ) -> GraphModule:
        graph = fx.Graph()
        twins: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            twins[node] = graph.node_copy(node, twins.__getitem__)
        twin = GraphModule(torch.nn.Module(), fx.Graph(), self.info.model_name)
        tensors: dict[int, torch.Tensor] = {}
        for name, tensor in self.constants().items():
            if id(tensor) not in tensors:
                copied = copy_tensor(tensor)
                if shares_storage and name in self.info.mutated:
                    copied = copied.clone()  # state: each graph has its own
                if isinstance(tensor, torch.nn.Parameter):
                    copied = torch.nn.Parameter(copied, requires_grad=tensor.requires_grad)
                tensors[id(tensor)] = copied
            twin.set_constant(name, tensors[id(tensor)], persistent=self.is_persistent(name))
        for node in self.graph.find_nodes(op="get_attr"):
            value = self.value(node)
            if isinstance(value, GraphModule) and not twin.has_constant(str(node.target)):
                twin.set_constant(
                    str(node.target), value._copy(copy_tensor, shares_storage=shares_storage)
                )
        if shares_storage:
            self.info.shares_storage = True
        twin.meta = {**self.meta, "fxopt": replace(
            self.info, recipes=list(self.info.recipes), held=dict(self.info.held),
            looked_at=dict(self.info.looked_at),
            shares_storage=shares_storage
        )}
        fx.GraphModule.graph.fset(twin, graph)  # type: ignore[attr-defined]
        twin.train_mode(self.training)
        return twin
