"""What candidates are called with: examples, items of the data, other batch sizes and dtypes."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.errors import OptionError, ShapeError
from fxopt.inputs import Inputs, as_inputs, map_tensors
from fxopt.signature import ConstantLeaf, Signature
from fxopt.text import type_text


@dataclass(frozen=True)
class CallForm:
    """How the baseline is called: its parameters, and how its arguments are nested."""

    parameters: inspect.Signature
    structure: pytree.TreeSpec

    @classmethod
    def of(cls, parameters: inspect.Signature, inputs: Inputs) -> CallForm:
        """Return the form of one call."""
        bound = parameters.bind(*inputs.args, **inputs.kwargs)
        return cls(parameters, pytree.tree_structure(dict(bound.arguments)))

    def inputs_of(self, value: Any) -> Inputs | None:
        """Return `value` as the arguments of a call; None where it has not the form of one."""
        inputs = as_inputs(value)
        try:
            bound = self.parameters.bind(*inputs.args, **inputs.kwargs)
        except TypeError:
            return None
        same = pytree.tree_structure(dict(bound.arguments)) == self.structure
        return Inputs(bound.args, bound.kwargs) if same else None

    def split(self, item: Any) -> tuple[Inputs, Any]:
        """Return one item of the data as inputs and label; without a label it is None.

        Raises OptionError where it is neither inputs nor a pair of inputs and label.
        """
        inputs = self.inputs_of(item)
        if inputs is not None:
            return inputs, None
        if isinstance(item, (tuple, list)) and len(item) == 2:
            inputs = self.inputs_of(item[0])
            if inputs is not None:
                return inputs, item[1]
        raise OptionError(
            f"An item of data= is {_short(item)}, and the model is called with "
            f"{_parameters(self.structure)}. Each item is the inputs of one call, nested like the "
            "example inputs, or a pair of those and the labels."
        )


def examples_of(signature: Signature, flat: tuple[Any, ...]) -> Inputs:
    """Return flat example inputs of a graph as the arguments of a call."""
    values = iter(flat)
    leaves = [
        leaf.value if isinstance(leaf, ConstantLeaf) else next(values) for leaf in signature.leaves
    ]
    arguments = pytree.tree_unflatten(leaves, signature.spec)
    bound = inspect.BoundArguments(signature.parameters, arguments)
    return Inputs(bound.args, bound.kwargs)


def copied(inputs: Inputs) -> Inputs:
    """Return a copy of the inputs: a model may write to its own."""
    return Inputs(*map_tensors((inputs.args, inputs.kwargs), torch.clone))


def in_dtype(inputs: Inputs, dtype: torch.dtype | None) -> Inputs:
    """Return the inputs with their floating-point tensors in `dtype`; as they are for None."""

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return inputs if dtype is None else Inputs(*map_tensors((inputs.args, inputs.kwargs), cast))


def fitted(inputs: Inputs, signature: Signature) -> Inputs:
    """Return the inputs with floating-point tensors in the dtypes that `signature` wants.

    Raises ShapeError where they do not fit otherwise.
    """
    flat = signature.flatten(inputs.args, inputs.kwargs)
    wanted = {
        id(value): leaf.dtype
        for leaf, value in zip(signature.tensors, flat, strict=True)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and leaf.dtype is not None
    }

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(wanted.get(id(tensor), tensor.dtype))

    cast_inputs = Inputs(*map_tensors((inputs.args, inputs.kwargs), cast))
    signature.check(signature.flatten(cast_inputs.args, cast_inputs.kwargs))
    return cast_inputs


def fits(inputs: Inputs, signature: Signature) -> bool:
    """Whether a graph of this signature takes the inputs, apart from their floating dtypes."""
    try:
        fitted(inputs, signature)
    except ShapeError:
        return False
    return True


# -- batches ---------------------------------------------------------------------------------------


def batch_of(inputs: Inputs) -> int:
    """Return the first size of the first tensor; raise OptionError where there is none."""
    for leaf in pytree.tree_leaves((inputs.args, inputs.kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return leaf.size(0)
    raise OptionError("The inputs hold no tensor with a dimension, so there is no batch to vary.")


def resized(inputs: Inputs, batch: int) -> Inputs:
    """Return the inputs repeated, or cut off, to another batch size.

    The batch is the first dimension, of every tensor where that has the size it has in the first
    one.
    """
    own = batch_of(inputs)

    def resize(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dim() or tensor.size(0) != own:
            return tensor
        return tensor[torch.arange(batch, device=tensor.device) % own]

    return Inputs(*map_tensors((inputs.args, inputs.kwargs), resize))


# -- words -----------------------------------------------------------------------------------------


def inputs_text(inputs: Inputs) -> str:
    """Return the inputs in few words: `f32[1,3,224,224], mask=bool[1,8]`."""
    parts = [_short(value) for value in inputs.args]
    parts += [f"{name}={_short(value)}" for name, value in inputs.kwargs.items()]
    return ", ".join(parts)


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return type_text(value)
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_short, value))})"
    text = repr(value)
    return text if len(text) <= 40 else type(value).__name__


def _parameters(structure: pytree.TreeSpec) -> str:
    names = list(pytree.tree_unflatten(range(structure.num_leaves), structure))
    return ", ".join(names) or "nothing"
