"""From a graph to a package of machine code: AOTInductor, under settings of its own."""

from __future__ import annotations

import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt.backends.inductor.executable import CallPlan, InductorExecutable
from fxopt.backends.inductor.flat import FlatGraph, flatten
from fxopt.errors import LoweringError
from fxopt.graph_module import GraphModule

if TYPE_CHECKING:
    from fxopt.backends.inductor import Inductor


def lower(graph: GraphModule, options: Inductor) -> InductorExecutable:
    """Compile a graph; raise LoweringError, naming the node, for what Inductor refuses."""
    flat = flatten(graph)
    folder = tempfile.TemporaryDirectory(prefix="fxopt-inductor-")
    try:
        package = _compile(flat, options, Path(folder.name))
        if flat.sizes.fixed():
            raise LoweringError(
                f"Inductor fixes sizes that shall be dynamic: {', '.join(flat.sizes.fixed())}. "
                "Compile without dynamic_shapes for them, or use backend='eager'."
            )
    except Exception as error:
        folder.cleanup()
        raise _refused(graph, error) from error
    return InductorExecutable(folder, package, CallPlan.of(flat), options.runners)


def _compile(flat: FlatGraph, options: Inductor, folder: Path) -> Path:
    """Write a package into `folder` and return its path."""
    from torch._inductor import aot_compile
    from torch._inductor.package import package_aoti

    module: Any = flat.module
    module._in_spec = pytree.tree_structure((flat.inputs, {}))
    outputs: Any = module.graph.output_node().args[0]
    module._out_spec = pytree.tree_structure(tuple(range(len(outputs))))
    build = folder / "build"
    build.mkdir()
    with _alone():
        files: Any = aot_compile(flat.module, flat.inputs, options=_settings(options, build))
    package = folder / "model.pt2"
    package_aoti(str(package), files)
    shutil.rmtree(build)
    return package


def _settings(options: Inductor, build: Path) -> dict[str, Any]:
    """Return the settings that hold while Inductor compiles, and at no other time."""
    return {
        "freezing": options.freezing,
        "max_autotune": options.max_autotune,
        "autotune_num_choices_displayed": 0,  # it would print a table for each
        "fallback_random": True,  # PyTorch's own random numbers, from its own generator
        "cpp.threads": options.threads or -1,
        "aot_inductor.package": True,
        "aot_inductor.output_path": str(build),
    }


@contextmanager
def _alone() -> Iterator[None]:
    """Keep other compilations out: Inductor's settings belong to the whole process."""
    from torch._dynamo.convert_frame import compile_lock

    with compile_lock, torch.no_grad(), torch._C._DisableAutocast(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Inductor computes slowly is its own business
        yield


_OPERATOR = re.compile(r"target: ([\w.]+)")


def _refused(graph: GraphModule, error: Exception) -> LoweringError:
    """Say which node Inductor does not compile, as far as its error tells."""
    if isinstance(error, LoweringError):
        return error
    text = str(error)
    named = _OPERATOR.search(text)
    nodes = _calls_of(graph, named.group(1)) if named else []
    where = ""
    if nodes:
        source = nodes[0].meta.get("source")
        where = f" node '{nodes[0].name}'" + (f" (from {source})" if source else "")
        where += f", one of {len(nodes)} calls of {named.group(1)}" if len(nodes) > 1 else ""  # type: ignore[union-attr]
    return LoweringError(
        f"Inductor cannot compile{where or ' this graph'}: {type(error).__name__}: "
        f"{_short(text)} Use backend='eager' for this model."
    )


def _calls_of(graph: GraphModule, operator: str) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if n.op == "call_function" and str(n.target) == operator]


def _short(text: str) -> str:
    """Return the first lines of what Inductor says; a compiler's first error, where it is one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    short = " ".join(errors[:1] or lines[:3])[:500]
    return short if short.endswith(".") else short + "."
