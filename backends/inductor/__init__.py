"""Inductor: machine code for this processor, made ahead of time by PyTorch's own compiler.

AOTInductor writes C++ for what the graph computes element by element, calls oneDNN for the layers
whose weights it has packed, and puts all of it into one shared library. A call runs without Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fxopt.contract import Pass
from fxopt.errors import check_option, is_count
from fxopt.graph_module import GraphModule

if TYPE_CHECKING:
    from fxopt.backends.inductor.executable import InductorExecutable


_require = partial(check_option, "Inductor")


@dataclass(frozen=True)
class Inductor:
    """Compile to machine code with PyTorch's Inductor; needs a C++ compiler.

    `freezing` folds the weights into the code, packed as this processor wants them. `max_autotune`
    also measures Inductor's own matrix products against the library's; it builds longer. `threads`
    is how many threads the generated loops use, by default as many as PyTorch has when the model
    is compiled. `runners` is how many calls may run at once; others wait. `trust` allows `load` to
    run the machine code in a file.
    """

    freezing: bool = True
    max_autotune: bool = False
    threads: int | None = None
    runners: int = 1
    trust: bool = False

    name: ClassVar[str] = "inductor"
    suffix: ClassVar[str] = ".aoti"
    legalize: ClassVar[tuple[Pass, ...]] = ()
    on_request: ClassVar[bool] = True  # it builds too long for a comparison that does not name it

    def __post_init__(self) -> None:
        for option in ("freezing", "max_autotune", "trust"):
            value = getattr(self, option)
            _require(isinstance(value, bool), option, value, "True or False")
        _require(
            self.threads is None or is_count(self.threads),
            "threads",
            self.threads,
            "a positive integer, or None for PyTorch's number of threads",
        )
        _require(is_count(self.runners), "runners", self.runners, "a positive integer")

    def missing(self) -> str | None:
        """Return None where a C++ compiler is found, else what to install."""
        from fxopt.backends.inductor.compiler import missing_compiler

        return missing_compiler()

    def lower(self, graph: GraphModule) -> InductorExecutable:
        """Compile a graph; raise LoweringError, naming the node, for what Inductor refuses."""
        from fxopt.backends.inductor.lower import lower

        return lower(graph, self)

    def load(self, path: Path) -> tuple[InductorExecutable, str]:
        """Read a file that `save` wrote; the whole of it is verified before any of it is run.

        Raises ArtefactError for a file that is damaged or foreign, was made for another processor
        or another PyTorch, or without `trust`: the file holds machine code.
        """
        from fxopt.backends.inductor.artefact import load

        return load(Path(path), self)
