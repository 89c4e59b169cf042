"""fxopt: a graph-level inference compiler for PyTorch. Start with `fxopt.compile(model)`."""

from fxopt import backends, dialect, passes, testing
from fxopt.bisection import Bisection, bisect
from fxopt.capture import capture
from fxopt.comparison import Comparison, compare
from fxopt.compile import compile, default_passes, lower, optimize
from fxopt.compiled import CompiledModel, load
from fxopt.dynamo import torch_compile_backend
from fxopt.errors import (
    ArtefactError,
    BackendUnavailable,
    CaptureError,
    DialectError,
    FxoptError,
    LoweringError,
    OptionError,
    PreconditionError,
    RuleError,
    ShapeError,
    VerifyError,
)
from fxopt.explain import explain
from fxopt.finetuning import FineTuned, finetune, reestimate_batch_norms
from fxopt.graph_module import GraphModule
from fxopt.network import to_networkx
from fxopt.picture import visualize
from fxopt.profile import Profile, profile
from fxopt.pruning.stepwise import prune, pruning_record
from fxopt.quantization.noise import Noise, quantization_noise
from fxopt.quantization.quantize import quantize
from fxopt.rules import Rule, RuleSet, Value, apply_rules, new_constant, rule
from fxopt.sensitivity import Sensitivity, sensitivity

__version__ = "0.1.0"

__all__ = [
    "ArtefactError",
    "BackendUnavailable",
    "Bisection",
    "CaptureError",
    "Comparison",
    "CompiledModel",
    "DialectError",
    "FineTuned",
    "FxoptError",
    "GraphModule",
    "LoweringError",
    "Noise",
    "OptionError",
    "PreconditionError",
    "Profile",
    "Rule",
    "RuleError",
    "RuleSet",
    "Sensitivity",
    "ShapeError",
    "Value",
    "VerifyError",
    "apply_rules",
    "backends",
    "bisect",
    "capture",
    "compare",
    "compile",
    "default_passes",
    "dialect",
    "explain",
    "finetune",
    "load",
    "lower",
    "new_constant",
    "optimize",
    "passes",
    "profile",
    "prune",
    "pruning_record",
    "quantization_noise",
    "quantize",
    "reestimate_batch_norms",
    "rule",
    "sensitivity",
    "testing",
    "to_networkx",
    "torch_compile_backend",
    "visualize",
]
