"""Models that cannot be captured whole: compile named parts, and keep the rest in Python."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxopt.compiled import DeferredModel
from fxopt.errors import CaptureError, OptionError, ShapeError, unknown_name
from fxopt.inputs import Inputs, as_inputs, check_ready, evaluation
from fxopt.provenance import user_frame


class CompiledPart(torch.nn.Module):
    """A compiled model in the place of a submodule."""

    def __init__(self, compiled: Any, original: torch.nn.Module) -> None:
        super().__init__()
        self.compiled = compiled
        self.training = False
        self.__dict__["_original"] = original  # hidden from parameters() and state_dict()

    def __getattr__(self, name: str) -> Any:
        """Look up what the parent may read beside calling the part, such as `out_channels`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"], name)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledPart:
        return CompiledPart(self.compiled, self.__dict__["_original"])  # compiled once is enough

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the compiled part."""
        return self.compiled(*args, **kwargs)


def compile_submodules(
    model: Any,
    example_inputs: Any,
    names: Sequence[str],
    compile_part: Callable[[torch.nn.Module, Inputs], Any],
) -> torch.nn.Module:
    """Return a copy of `model` whose submodules `names` are compiled.

    The model runs once on `example_inputs`, to see what each part is called with. The copy shares
    the weights of the parts that were not compiled. Raises OptionError for an unknown part, one
    that the model does not call, or missing example inputs.
    """
    check_ready(model)
    if example_inputs is None:
        raise OptionError("submodules= needs example_inputs=, to see how the parts are called.")
    if isinstance(names, str):
        names = [names]
    known = dict(model.named_modules(remove_duplicate=False))
    if not names:
        raise OptionError("submodules=[] names no part. Leave it out to compile the whole model.")
    for name in names:
        if name not in known or not name:
            raise unknown_name("submodule", str(name), [n for n in known if n])
        inside = next((other for other in names if name.startswith(f"{other}.")), None)
        if inside is not None:
            raise OptionError(f"'{name}' is a part of '{inside}', which is named, too. Name one.")
    calls = _record_calls(model, as_inputs(example_inputs), {name: known[name] for name in names})
    tensors = {
        id(t): t for m in known.values() for t in (*m._parameters.values(), *m._buffers.values())
    }
    twin = copy.deepcopy(model, dict(tensors)).eval()
    for name in names:
        if name not in calls:
            raise OptionError(f"The model does not call '{name}' on these example inputs.")
        part = CompiledPart(_compiled(known[name], calls[name], compile_part), known[name])
        for alias in [other for other, module in known.items() if module is known[name]]:
            parent, _, leaf = alias.rpartition(".")
            setattr(twin.get_submodule(parent), leaf, part)
    return twin


def _compiled(
    part: torch.nn.Module,
    calls: list[Inputs],
    compile_part: Callable[[torch.nn.Module, Inputs], Any],
) -> Any:
    """Compile a part for its first call; where that does not serve the others, for each shape."""
    compiled = compile_part(part, calls[0])
    try:
        for call in calls[1:]:
            compiled.signature.check(compiled.signature.flatten(call.args, call.kwargs))
    except ShapeError:
        deferred = DeferredModel(part, lambda inputs: compile_part(part, inputs))
        with torch.no_grad():
            for call in calls:
                deferred(*call.args, **call.kwargs)
        return deferred
    return compiled


def _record_calls(
    model: torch.nn.Module, inputs: Inputs, parts: dict[str, torch.nn.Module]
) -> dict[str, list[Inputs]]:
    """Run the model once, and return the calls of each part."""
    calls: dict[str, list[Inputs]] = {}
    hooks = []
    for name, part in parts.items():

        def remember(module: Any, args: Any, kwargs: Any, name: str = name) -> None:
            calls.setdefault(name, []).append(Inputs(args, kwargs))

        hooks.append(part.register_forward_pre_hook(remember, with_kwargs=True))
    try:
        with torch.no_grad(), evaluation(model):
            model(*inputs.args, **inputs.kwargs)
    except Exception as error:
        where = user_frame(error.__traceback__)
        raise CaptureError(
            f"{type(model).__name__} does not run on the example inputs: {type(error).__name__}: "
            f"{error}" + (f"\n  at {where}" if where else "")
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return calls
