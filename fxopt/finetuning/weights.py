"""All tensors of a model by name: to keep them, to put them back, to know them again."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from fxopt.errors import FxoptError, OptionError
from fxopt.graph_module import GraphModule
from fxopt.inputs import check_ready


def copy_of(model: Any) -> Any:
    """Return a copy that can be trained, of a graph or of any module.

    Raises OptionError for what is no model or cannot be copied, and CaptureError for one whose
    weights are not there yet.
    """
    graph = getattr(model, "graph", None)
    if not isinstance(model, torch.nn.Module) and isinstance(graph, GraphModule):
        raise OptionError(
            f"A {type(model).__name__} has been lowered and cannot be trained. Train its graph, "
            "before fxopt.lower: fxopt.optimize(...) returns one."
        )
    check_ready(model)
    try:
        return copy.deepcopy(model)
    except FxoptError:
        raise
    except Exception as error:
        raise OptionError(
            f"{type(model).__name__} cannot be copied, and it is a copy that is trained: "
            f"copy.deepcopy(model) says: {error}"
        ) from error


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter and buffer by name: those not in the state dict, too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def kept(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of all tensors."""
    return {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}


def put_back(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the values of `kept` into the model's own tensors."""
    with torch.no_grad():
        for name, tensor in tensors_of(model).items():
            tensor.copy_(tensors[name])


def fingerprint(model: torch.nn.Module) -> str:
    """Return what tells a model from others: its kind, and the names and values of its tensors."""
    digest = hashlib.sha256()
    digest.update((model.code if isinstance(model, GraphModule) else type(model).__name__).encode())
    for name, tensor in tensors_of(model).items():
        digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def finite(model: torch.nn.Module) -> set[str]:
    """Return the names of the tensors without nan and infinity (a mask may well hold one)."""
    return {name for name, tensor in tensors_of(model).items() if bool(tensor.isfinite().all())}


def to_format(model: torch.nn.Module, memory_format: torch.memory_format) -> None:
    """Store the weights of 2-D convolutions in a memory format."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)


def images_to_format(value: Any) -> Any:
    """Return a tensor [batch, channels, height, width] in channels-last; any other as it is."""
    is_image = isinstance(value, torch.Tensor) and value.dim() == 4
    return value.contiguous(memory_format=torch.channels_last) if is_image else value


def has_batch_norm(model: torch.nn.Module) -> bool:
    """Whether a batch norm of the model, now in training mode, uses the batch's statistics."""
    if isinstance(model, GraphModule):
        graphs = [model, *model.subgraphs()]
        norms = [node for g in graphs for node in g.find(torch.ops.aten.batch_norm.default)]
        return any(node.args[5] is True for node in norms)
    norm = torch.nn.modules.batchnorm._BatchNorm
    return any(isinstance(module, norm) and module.training for module in model.modules())
