"""How a loss comes from a model and a batch: one convention for whatever trains or differentiates.

`data` is anything that can be iterated again and again, such as a DataLoader or a list. A batch is
a pair `(inputs, targets)`, and the loss is `loss(model(inputs), targets)`. The inputs are a tensor,
a tuple of positional arguments or a dict of keyword arguments. With `loss=None` a batch is a dict
of keyword arguments, as Hugging Face's models take them, and the model returns its own `.loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from fxopt.errors import FxoptError, OptionError
from fxopt.graph_module import GraphModule
from fxopt.inputs import Inputs, as_inputs, map_tensors

Loss = Callable[[Any, Any], torch.Tensor]  # (outputs, targets) -> a scalar
Batches = Iterable[Any]


class ObjectiveError(FxoptError):
    """A batch, a loss function or the data cannot be used as they are."""


class NotFiniteError(ObjectiveError):
    """A loss is nan or infinite."""


def batch_loss(model: torch.nn.Module, batch: Any, loss: Loss | None) -> torch.Tensor:
    """Return the loss of a batch: a finite scalar that gradients flow through.

    The batch is moved to the device of the model's weights. Raises ObjectiveError for a batch of
    another form, and for a loss that is no scalar, is nan or infinite, or depends on no weight.
    """
    return outputs_and_loss(model, batch, loss)[1]


def outputs_and_loss(
    model: torch.nn.Module, batch: Any, loss: Loss | None
) -> tuple[Any, torch.Tensor]:
    """Like `batch_loss`; return what the model returned, too."""
    device = device_of(model)
    inputs = inputs_of(batch, loss)
    outputs = call(model, inputs, device)
    if loss is None:
        value = _own_loss(outputs)
    else:
        value = loss(outputs, _moved(batch[1], device))
    return outputs, _checked(value)


def call(model: torch.nn.Module, inputs: Inputs, device: torch.device | None = None) -> Any:
    """Call the model on the inputs of a batch, on `device` (default: that of its weights)."""
    device = device or device_of(model)
    args, kwargs = _moved(inputs.args, device), _moved(inputs.kwargs, device)
    return model(*args, **kwargs)


def inputs_of(batch: Any, loss: Loss | None = None) -> Inputs:
    """Return the arguments for the model in a batch.

    Without a loss function a batch may also be the inputs alone: a tensor, a list of one, or a
    dict. Raises ObjectiveError for anything else.
    """
    is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    if is_pair:
        return as_inputs(batch[0])
    if loss is None and isinstance(batch, Mapping):
        return as_inputs(dict(batch))
    if loss is None and isinstance(batch, torch.Tensor):
        return as_inputs(batch)
    if loss is None and isinstance(batch, (tuple, list)) and len(batch) == 1:
        return as_inputs(batch[0])  # what a DataLoader makes of a data set without targets
    got = type(batch).__name__
    if isinstance(batch, (tuple, list)):
        got += f" of {len(batch)}"
    hint = ""
    if isinstance(batch, Mapping):
        hint = " For a model that computes its own loss from a dict, pass loss=None."
    raise ObjectiveError(
        f"A batch must be a pair (inputs, targets), got a {got}. Several inputs go into a tuple "
        f"or a dict: ((a, b), targets).{hint}"
    )


def flat_inputs_of(graph: GraphModule, batch: Any) -> list[Any]:
    """Return the inputs in a batch as the graph's placeholders take them, on its device.

    Raises ObjectiveError as `inputs_of` does, ShapeError for shapes that were not captured, and
    OptionError for the body of a control flow, which has no inputs of its own.
    """
    signature = graph.info.signature
    if signature is None:
        raise OptionError("The body of a control flow cannot be run on data alone.")
    inputs, device = inputs_of(batch), device_of(graph)
    flat = signature.flatten(inputs.args, inputs.kwargs)
    flat = [x.to(device) if isinstance(x, torch.Tensor) else x for x in flat]
    signature.check(flat)
    return flat


def each_batch(data: Batches, name: str = "data") -> Iterator[Any]:
    """Yield the batches of one pass over `data`; raise ObjectiveError where there are none."""
    try:
        batches = iter(data)
    except TypeError:
        raise ObjectiveError(
            f"`{name}` must be an iterable of batches, such as a DataLoader or a list of pairs "
            f"(inputs, targets), got {type(data).__name__}."
        ) from None
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty and batches is data:
        raise ObjectiveError(
            f"`{name}` is used up: a {type(data).__name__} gives its batches only once. Pass "
            "something that can be iterated again, such as a DataLoader or a list."
        )
    if empty:
        raise ObjectiveError(
            f"`{name}` has no batches. A DataLoader with drop_last=True has none where the "
            "data set is smaller than a batch."
        )


def device_of(model: torch.nn.Module) -> torch.device:
    """Return the device of the model's first weight; the CPU where it has none."""
    if isinstance(model, GraphModule):  # its parameters() would copy shared storage
        tensors: Iterable[torch.Tensor] = model.constants().values()
    else:
        tensors = model.parameters()
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def check_loss(loss: Any) -> None:
    """Raise OptionError for a loss that cannot be called, or is a class."""
    if isinstance(loss, type) and issubclass(loss, torch.nn.Module):
        raise OptionError(f"`loss` is the class {loss.__name__} itself; pass {loss.__name__}().")
    if loss is not None and not callable(loss):
        raise OptionError(
            f"`loss` must be a function of (outputs, targets), such as "
            f"torch.nn.functional.cross_entropy, or None; got {type(loss).__name__}."
        )


def _moved(value: Any, device: torch.device) -> Any:
    return map_tensors(value, lambda tensor: tensor.to(device, non_blocking=True))


def _own_loss(outputs: Any) -> Any:
    value = getattr(outputs, "loss", None)
    if value is None and isinstance(outputs, Mapping):
        value = outputs.get("loss")
    if value is None:
        raise ObjectiveError(
            f"With loss=None the model must return its own loss, as `.loss`; it returned "
            f"{type(outputs).__name__} without one. Pass loss=, or batches with the labels that "
            "the model computes its loss from (and capture the graph with them)."
        )
    return value


def _checked(value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        got = f"a tensor of {value.dtype}" if isinstance(value, torch.Tensor) else repr(value)
        raise ObjectiveError(f"The loss must be a floating-point tensor, got {got}.")
    if value.numel() != 1:
        raise ObjectiveError(
            f"The loss must be one number, got the shape {list(value.shape)}. Average it: "
            "loss.mean()."
        )
    if torch.is_grad_enabled() and not value.requires_grad:
        raise ObjectiveError(
            "The loss depends on no weight that requires grad: there is nothing to train. Did the "
            "loss function detach its input, or were the weights frozen with requires_grad_(False)?"
        )
    if not math.isfinite(value.item()):
        raise NotFiniteError(f"The loss is {value.item()}.")
    return value.reshape(())
