"""Which nodes `.train()` switches: those that the model's own `.train()` would."""

from __future__ import annotations

import ast
import functools
import linecache
import logging
from collections.abc import Callable
from copy import deepcopy

import torch

from fxopt.graph_module import GraphModule

log = logging.getLogger("fxopt")

Switches = Callable[[str, str | None], bool]  # (module path, source line) -> does it switch?

_LAYERS = (
    torch.nn.modules.batchnorm._NormBase,
    torch.nn.modules.dropout._DropoutNd,
    torch.nn.RNNBase,
    torch.nn.RReLU,
)


def switches_of(model: torch.nn.Module) -> Switches:
    """Return a test: does the node of this module path and source line switch with `train()`?

    A batch norm or dropout layer switches when `model.train()` would switch it; a functional call
    in the user's own module where an argument of the call depends on `training`.
    """
    modules = dict(model.named_modules())
    frozen = _frozen_in_training(model, modules)

    def switches(path: str, source: str | None) -> bool:
        module = modules.get(path)
        if module is None or path in frozen or _has_cumulative_average(module):
            return False
        return isinstance(module, _LAYERS) or source is not None and _depends_on_training(source)

    return switches


def _has_cumulative_average(module: torch.nn.Module) -> bool:
    """Whether a batch norm weighs each batch by their number (`momentum=None`)."""
    return (
        isinstance(module, torch.nn.modules.batchnorm._NormBase)
        and module.momentum is None
        and module.track_running_stats
    )


def _frozen_in_training(model: torch.nn.Module, modules: dict[str, torch.nn.Module]) -> set[str]:
    """Return the modules that an overridden `train` keeps in evaluation mode."""
    plain = torch.nn.Module.train
    if all(type(module).train is plain for module in modules.values()):
        return set()
    tensors = {
        id(t): t for m in modules.values() for t in (*m._parameters.values(), *m._buffers.values())
    }
    try:
        twin = deepcopy(model, dict(tensors)).train(True)
    except Exception as error:
        log.warning("train() of the model is overridden and cannot be tried on a copy: %s", error)
        return set()
    return {path for path, module in twin.named_modules() if not module.training}


def _depends_on_training(source: str) -> bool:
    """Whether a call at 'file.py:12: code' hands on a `training` that is not a constant."""
    place, _, code = source.partition(": ")
    file, _, line = place.rpartition(":")
    calls = _calls_of(file).get(int(line), ()) if line.isdigit() else ()
    if calls:
        return any(map(_mentions_training, calls))
    return "training" in code and "training=False" not in code.replace(" ", "")


@functools.lru_cache(maxsize=256)
def _calls_of(file: str) -> dict[int, list[ast.Call]]:
    """Return the calls of a source file by each line that they cover; empty where it is unknown."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return {}
    found: dict[int, list[ast.Call]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                found.setdefault(line, []).append(node)
    return found


def _mentions_training(call: ast.Call) -> bool:
    """Whether an argument of this very call, not of one inside it, is called training."""
    pending: list[ast.AST] = [*call.args, *(keyword.value for keyword in call.keywords)]
    while pending:
        node = pending.pop()
        name = getattr(node, "attr", None) or getattr(node, "id", "")
        if "training" in str(name):
            return True
        if not isinstance(node, ast.Call):
            pending.extend(ast.iter_child_nodes(node))
    return False


def absent_regularizers(model: torch.nn.Module, graph: GraphModule) -> tuple[str, ...]:
    """Return the dropout-like modules that left no node to switch on in training."""
    present = {node.meta.get("path") for node in graph.graph.nodes if "switch" in node.meta}
    found = []
    for path, module in model.named_modules():
        kind = type(module).__name__.lower()
        rate = next(
            (getattr(module, a) for a in ("p", "drop_prob", "dropout") if hasattr(module, a)), None
        )
        if isinstance(rate, float) and rate > 0 and path not in present:
            attention = isinstance(module, torch.nn.MultiheadAttention)
            if "drop" in kind or "stochastic" in kind or attention:
                found.append(path)
        elif _has_cumulative_average(module):
            found.append(path)
    return tuple(found)
