"""ONNX: a checked ONNX model, emitted straight from the graph and run by ONNX Runtime.

`onnx`, `onnx-ir` and `onnxruntime` are imported when something is lowered or loaded, not before.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fxopt.contract import Pass
from fxopt.errors import check_option
from fxopt.graph_module import GraphModule

if TYPE_CHECKING:
    from fxopt.backends.onnx.executable import OnnxExecutable

OLDEST_OPSET, NEWEST_OPSET = 18, 24
OPTIMIZATIONS = ("off", "basic", "extended", "layout", "all")


_require = partial(check_option, "Onnx")


@dataclass(frozen=True)
class Onnx:
    """Lower to ONNX. Opset 20 is the first that has Gelu; later ones were no faster when measured.

    `external_data=None` puts the constants into a file of their own only where the model would
    not fit in 2 GB. `state="io"` makes what the model changes at each run (a cache, a counter) an
    extra input and output.
    """

    opset: int = 20
    threads: int | None = None
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    external_data: bool | None = None
    state: str = "refuse"
    optimization: str = "all"

    name: ClassVar[str] = "onnx"
    suffix: ClassVar[str] = ".onnx"
    quantization: ClassVar[str] = "onnx"  # whose kernels precision="int8" is for

    def __post_init__(self) -> None:
        if isinstance(self.providers, str):
            object.__setattr__(self, "providers", (self.providers,))
        object.__setattr__(self, "providers", tuple(self.providers))
        _require(
            isinstance(self.opset, int) and OLDEST_OPSET <= self.opset <= NEWEST_OPSET,
            "opset",
            self.opset,
            f"an integer from {OLDEST_OPSET} to {NEWEST_OPSET}",
        )
        _require(
            self.threads is None or (isinstance(self.threads, int) and self.threads > 0),
            "threads",
            self.threads,
            "a positive integer, or None for one per core",
        )
        _require(
            bool(self.providers) and all(isinstance(p, str) and p for p in self.providers),
            "providers",
            self.providers,
            "a tuple of ONNX Runtime's provider names",
        )
        _require(
            self.external_data in (None, True, False),
            "external_data",
            self.external_data,
            "True, False or None",
        )
        _require(self.state in ("refuse", "io"), "state", self.state, "'refuse' or 'io'")
        _require(
            self.optimization in OPTIMIZATIONS,
            "optimization",
            self.optimization,
            "one of " + ", ".join(OPTIMIZATIONS),
        )

    @property
    def legalize(self) -> tuple[Pass, ...]:
        """What ONNX says in fewer nodes than the graph: see each pass."""
        from fxopt.backends.onnx.flatten_tokens import FlattenTokens
        from fxopt.backends.onnx.fold_group_norms import FoldGroupNorms
        from fxopt.backends.onnx.repeat_roundings import RepeatRoundings
        from fxopt.backends.onnx.replace_linears_by_convs import ReplaceLinearsByConvs
        from fxopt.passes.expand_attention import ExpandAttention
        from fxopt.passes.merge_moves import MergeMoves

        on_cpu = self.providers[0] == "CPUExecutionProvider"
        return (
            ExpandAttention(),
            FoldGroupNorms(),
            ReplaceLinearsByConvs(),  # before flattening: it saves whole transpositions
            FlattenTokens(),
            MergeMoves(),  # what flattening left beside a permute
            *((RepeatRoundings(),) if on_cpu else ()),  # last: it separates moves
        )

    def missing(self) -> str | None:
        """Return None where ONNX and its runtime are installed, else what to install."""
        packages = {"onnx": "onnx", "onnx_ir": "onnx-ir", "onnxruntime": "onnxruntime"}
        absent = [p for module, p in packages.items() if importlib.util.find_spec(module) is None]
        return f"pip install {' '.join(absent)}" if absent else None

    def lower(self, graph: GraphModule) -> OnnxExecutable:
        """Lower a graph; raise LoweringError, naming the node, for what ONNX cannot express."""
        from fxopt.backends.onnx.lower import lower

        return lower(graph, self)

    def load(self, path: Path) -> tuple[OnnxExecutable, str]:
        """Read an .onnx file that fxopt wrote; return what runs it, and the manifest."""
        from fxopt.backends.onnx.artefact import load

        return load(Path(path), self)
