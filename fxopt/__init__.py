"""fxopt: a graph-level inference compiler for PyTorch. Start with `fxopt.compile(model)`."""

from fxopt import backends, dialect, passes, testing
from fxopt.capture import capture
from fxopt.compile import compile, default_passes, lower, optimize
from fxopt.compiled import CompiledModel, load
from fxopt.errors import (
    ArtefactError,
    BackendUnavailable,
    CaptureError,
    DialectError,
    FxoptError,
    LoweringError,
    OptionError,
    PreconditionError,
    ShapeError,
    VerifyError,
)
from fxopt.graph_module import GraphModule
from fxopt.network import to_networkx
from fxopt.picture import visualize
from fxopt.rules import apply_rules, explain, rule

__version__ = "0.1.0"

__all__ = [
    "ArtefactError",
    "BackendUnavailable",
    "CaptureError",
    "CompiledModel",
    "DialectError",
    "FxoptError",
    "GraphModule",
    "LoweringError",
    "OptionError",
    "PreconditionError",
    "ShapeError",
    "VerifyError",
    "apply_rules",
    "backends",
    "capture",
    "compile",
    "default_passes",
    "dialect",
    "explain",
    "load",
    "lower",
    "optimize",
    "passes",
    "rule",
    "testing",
    "to_networkx",
    "visualize",
]
