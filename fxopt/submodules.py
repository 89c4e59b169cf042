"""Models that cannot be captured whole: compile named parts, and keep the rest in Python."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxopt.errors import OptionError, unknown_name
from fxopt.inputs import Inputs, as_inputs, check_ready, evaluation


class CompiledPart(torch.nn.Module):
    """A compiled model in the place of a submodule."""

    def __init__(self, compiled: Any, original: torch.nn.Module) -> None:
        super().__init__()
        self.compiled = compiled
        for name, value in vars(original).items():  # plain attributes that the parent may read
            if not name.startswith("_") and name not in ("training", "forward"):
                self.__dict__.setdefault(name, value)

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
        raise OptionError("submodules= needs example_inputs=, to see what the parts are called with.")
    if isinstance(names, str):
        names = [names]
    known = dict(model.named_modules())
    for name in names:
        if name not in known or not name:
            raise unknown_name("submodule", name, [n for n in known if n])
    calls = _record_calls(model, as_inputs(example_inputs), {name: known[name] for name in names})
    tensors = {id(t): t for m in known.values() for t in (*m._parameters.values(), *m._buffers.values())}
    twin = copy.deepcopy(model, dict(tensors)).eval()
    for name in names:
        if name not in calls:
            raise OptionError(f"The model does not call '{name}' on these example inputs.")
        parent, _, leaf = name.rpartition(".")
        part = CompiledPart(compile_part(known[name], calls[name]), known[name])
        setattr(twin.get_submodule(parent), leaf, part)
    return twin


def _record_calls(
    model: torch.nn.Module, inputs: Inputs, parts: dict[str, torch.nn.Module]
) -> dict[str, Inputs]:
    """Run the model once, and return the first call of each part."""
    calls: dict[str, Inputs] = {}
    hooks = []
    for name, part in parts.items():

        def remember(module: Any, args: Any, kwargs: Any, name: str = name) -> None:
            calls.setdefault(name, Inputs(args, kwargs))

        hooks.append(part.register_forward_pre_hook(remember, with_kwargs=True))
    try:
        with torch.no_grad(), evaluation(model):
            model(*inputs.args, **inputs.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls
