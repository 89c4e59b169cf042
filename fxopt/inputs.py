"""Example inputs: what the user gave, in one form; or what the model itself says that it eats."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.errors import CaptureError

log = logging.getLogger("fxopt")


@dataclass(frozen=True)
class Inputs:
    """Positional and keyword arguments for one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def as_inputs(example_inputs: Any) -> Inputs:
    """Read `example_inputs`: a tensor, a tuple of arguments, a dict of keyword arguments, or both.

    Both is a tuple of exactly a tuple and a dict.
    """
    if isinstance(example_inputs, Inputs):
        return example_inputs
    if isinstance(example_inputs, dict):
        return Inputs((), dict(example_inputs))
    if isinstance(example_inputs, (tuple, list)):
        pair = tuple(example_inputs)
        if len(pair) == 2 and isinstance(pair[0], tuple) and isinstance(pair[1], dict):
            return Inputs(pair[0], dict(pair[1]))
        return Inputs(pair, {})
    return Inputs((example_inputs,), {})


def forward_signature(model: Any) -> inspect.Signature:
    """Return the signature of the model's call."""
    return inspect.signature(model.forward)


def infer_inputs(model: torch.nn.Module) -> Inputs | None:
    """Return inputs that the model itself names or implies, or None where it does not.

    Asked in this order: `example_input_array` (Lightning), `default_cfg` (timm), `dummy_inputs`
    (Hugging Face), torchvision's input size, the first layer with weights.
    """
    for source, candidates in (
        ("example_input_array", _from_lightning),
        ("default_cfg", _from_timm),
        ("dummy_inputs", _from_hugging_face),
        ("the torchvision model", _from_torchvision),
        ("the first layer", _from_first_layer),
    ):
        for inputs in candidates(model):
            if source == "example_input_array" or _runs(model, inputs):
                log.info("example inputs inferred from %s: %s", source, _text(inputs))
                return inputs
    return None


def _from_lightning(model: Any) -> Iterator[Inputs]:
    example = getattr(model, "example_input_array", None)
    if example is not None:
        yield as_inputs(example)


def _from_timm(model: Any) -> Iterator[Inputs]:
    config = getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    if size is not None:
        yield _image(model, tuple(size))


def _from_hugging_face(model: Any) -> Iterator[Inputs]:
    main, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    if main is None or config is None:
        return
    if main == "pixel_values":
        side = getattr(config, "image_size", None) or 224
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        yield _named(model, main, (getattr(config, "num_channels", 3), height, width))
    elif main == "input_values":
        yield _named(model, main, (16000,))
    elif main == "input_features" and hasattr(config, "max_source_positions"):
        yield _named(model, main, (config.num_mel_bins, 2 * config.max_source_positions))
    elif isinstance(getattr(model, "dummy_inputs", None), dict):
        yield Inputs((), dict(model.dummy_inputs))


def _from_torchvision(model: Any) -> Iterator[Inputs]:
    if type(model).__module__.startswith("torchvision.models."):
        if not any(isinstance(m, torch.nn.Conv3d) for m in model.modules()):
            side = 299 if type(model).__name__ == "Inception3" else 224
            yield _image(model, (3, side, side))


def _from_first_layer(model: torch.nn.Module) -> Iterator[Inputs]:
    if sum(p.default is p.empty for p in forward_signature(model).parameters.values()) != 1:
        return  # several inputs (or any number): the first layer fixes only one
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            yield _image(model, (layer.in_features,))
            return
        if isinstance(layer, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
            yield Inputs((torch.zeros(1, 8, dtype=torch.int64),), {})
            return
        if isinstance(layer, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)):
            for side in (224, 128, 96, 64, 32, 28, 16):
                yield _image(model, (layer.in_channels, *[side] * (layer.weight.dim() - 2)))
            return


def _image(model: torch.nn.Module, size: tuple[int, ...]) -> Inputs:
    """Return one random sample of `size`, in the dtype and on the device of the weights."""
    return Inputs((_sample(model, size),), {})


def _named(model: torch.nn.Module, name: str, size: tuple[int, ...]) -> Inputs:
    return Inputs((), {name: _sample(model, size)})


def _sample(model: torch.nn.Module, size: tuple[int, ...]) -> torch.Tensor:
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, *size, generator=generator).to(weight)


def _runs(model: torch.nn.Module, inputs: Inputs) -> bool:
    """Whether the model accepts the inputs: tried on fake tensors, so that nothing changes."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(value: Any) -> Any:
        return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

    args = tuple(fake(value) for value in inputs.args)
    kwargs = {name: fake(value) for name, value in inputs.kwargs.items()}
    try:
        with evaluation(model), torch.no_grad(), mode:
            model(*args, **kwargs)
    except Exception as error:
        log.debug("the model does not accept %s: %s", _text(inputs), error)
        return False
    return True


class evaluation:
    """Put every module's training flag to False inside a `with`, and back afterwards.

    The flags are set directly: `model.eval()` may be overridden, and may fuse or change things.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._training = [module for module in model.modules() if module.training]

    def __enter__(self) -> bool:
        for module in self._training:
            module.training = False
        return bool(self._training)

    def __exit__(self, *_: object) -> None:
        for module in self._training:
            module.training = True


def check_ready(model: Any) -> None:
    """Raise CaptureError for what cannot be a model, or is not finished yet."""
    if isinstance(model, type) and issubclass(model, torch.nn.Module):
        raise CaptureError(
            f"Expected a model, got the class {model.__name__} itself. Make an instance: "
            f"{model.__name__}(...)."
        )
    if not isinstance(model, torch.nn.Module):
        hint = " A function can be wrapped in an nn.Module." if callable(model) else ""
        raise CaptureError(
            f"Expected an nn.Module, a torch.fx GraphModule or an ExportedProgram, got "
            f"{type(model).__name__}.{hint}"
        )
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            place = f"The submodule '{path}'" if path else "The model"
            raise CaptureError(
                f"{place} is a TorchScript module, which cannot be captured. Use the Python module "
                "that it was made from."
            )
    if type(model).forward is torch.nn.Module.forward and "forward" not in vars(model):
        raise CaptureError(f"{type(model).__name__} has no forward(), so it cannot be called.")
    for name, tensor in (*_named_tensors(model, "_parameters"), *_named_tensors(model, "_buffers")):
        if isinstance(tensor, (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer)):
            raise CaptureError(
                f"'{name}' is lazy: it has no shape yet. Call the model once on real inputs first."
            )
        if tensor.is_meta:
            raise CaptureError(
                f"'{name}' is on the meta device: it has no values. Load real weights first, for "
                "instance with model.to_empty(device='cpu') and load_state_dict."
            )


        if tensor.is_quantized or tensor.layout is not torch.strided:
            kind = "quantized" if tensor.is_quantized else "sparse"
            raise CaptureError(
                f"'{name}' is {kind}, and only dense tensors can be part of a graph. Store it "
                f"dense: {'.dequantize()' if tensor.is_quantized else '.to_dense()'}."
            )


_PLAIN = (
    bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout,
    torch.memory_format, torch.ScriptObject,
)  # fmt: skip


def check_input(path: str, value: Any) -> None:
    """Raise CaptureError for an example input that no graph can take."""
    if isinstance(value, torch.Tensor):
        if value.is_quantized or value.layout is not torch.strided:
            kind = "quantized" if value.is_quantized else "sparse"
            convert = "dequantize" if value.is_quantized else "to_dense"
            raise CaptureError(
                f"Input '{path}' is {kind}, and a graph takes dense tensors only. Pass "
                f"{path}.{convert}(), and convert inside the model where it needs that."
            )
        if value.is_meta:
            raise CaptureError(
                f"Input '{path}' is on the meta device: it has no values. Pass a real tensor."
            )
    elif type(value).__module__.split(".")[0] == "numpy":
        raise CaptureError(
            f"Input '{path}' is a numpy.{type(value).__name__}. Pass torch.as_tensor({path})."
        )
    elif not isinstance(value, _PLAIN):
        raise CaptureError(
            f"Input '{path}' has the type {type(value).__name__}. Inputs are tensors, numbers, "
            "strings, None and containers of these: a list, dict, named tuple, dataclass, or a "
            "class registered with torch.utils._pytree.register_pytree_node."
        )


def _named_tensors(model: torch.nn.Module, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in model.named_modules():
        for name, tensor in getattr(module, kind).items():
            if tensor is not None:
                yield f"{prefix}.{name}" if prefix else name, tensor


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return nested inputs with `change` applied to each tensor."""
    from torch.utils import _pytree as pytree

    return pytree.tree_map_only(torch.Tensor, change, value)


def _text(inputs: Inputs) -> str:
    def one(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        return repr(value)

    parts = [one(value) for value in inputs.args]
    parts += [f"{name}={one(value)}" for name, value in inputs.kwargs.items()]
    return ", ".join(parts)
