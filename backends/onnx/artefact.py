"""Saving and loading .onnx files that hold the manifest of a compiled model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt.backends.onnx.executable import (
    STATE_KEY,
    OnnxExecutable,
    RuntimeOptions,
    StateSlot,
    split_weights,
)
from fxopt.errors import ArtefactError
from fxopt.files import atomic_path, write_atomic

if TYPE_CHECKING:
    import onnx

    from fxopt.backends.onnx import Onnx

MANIFEST_KEY = "fxopt"
NOTES_KEY = "fxopt.notes"
LIMIT = 2**31 - 2**24  # protobuf refuses messages of 2 GiB; this leaves room for the graph
ALIGNMENT = 4096  # so that the data can be mapped into memory


def save(executable: OnnxExecutable, path: Path, manifest: str) -> None:
    """Write one .onnx file; constants go to a file beside it where they would not fit inside.

    That file is written first, under a name made from its content, so the old model stays whole
    with its own data until the new one replaces it.
    """
    model = executable.ir_model
    kept = dict(model.metadata_props)
    model.metadata_props[MANIFEST_KEY] = manifest
    if executable.notes:
        model.metadata_props[NOTES_KEY] = json.dumps(executable.notes)
    try:
        small, weights = split_weights(model)
    finally:
        model.metadata_props.clear()
        model.metadata_props.update(kept)
    total = sum(int(tensor.nbytes) for tensor in weights.values())
    outside = executable.external_data
    if outside is None:
        outside = total >= LIMIT
    elif not outside and total >= LIMIT:
        raise ArtefactError(
            f"The constants take {total / 2**30:.1f} GiB, and one ONNX file holds less than 2. "
            "Leave external_data at None."
        )
    if outside:
        _save_data(small, weights, path)
    else:
        _embed(small, weights)
    write_atomic(path, small.SerializeToString(deterministic=True))


def _embed(proto: onnx.ModelProto, weights: Any) -> None:
    import onnx

    for message in proto.graph.initializer:
        tensor = weights.get(message.name)
        if tensor is not None:
            del message.external_data[:]
            message.data_location = onnx.TensorProto.DEFAULT
            message.raw_data = tensor.tobytes()


def _save_data(proto: onnx.ModelProto, weights: Any, path: Path) -> None:
    """Write the constants to a file named after their content, and say in the model where."""
    contents = [(m, weights[m.name]) for m in proto.graph.initializer if m.name in weights]
    digest = hashlib.sha256()
    place = 0
    for message, tensor in contents:
        content = tensor.tobytes()
        digest.update(content)
        start = place + -place % ALIGNMENT
        del message.external_data[:]
        for key, value in (("offset", start), ("length", len(content))):
            entry = message.external_data.add()
            entry.key, entry.value = key, str(value)
        place = start + len(content)
    name = f"{path.stem}.{digest.hexdigest()[:16]}.data"
    with atomic_path(path.with_name(name)) as temporary, open(temporary, "wb") as file:
        for message, tensor in contents:
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            file.write(tensor.tobytes())
            entry = message.external_data.add()
            entry.key, entry.value = "location", name


def load(path: Path, options: Onnx) -> tuple[OnnxExecutable, str]:
    """Read a file that fxopt wrote; return what runs it, and the manifest."""
    import google.protobuf.message
    import onnx
    import onnx_ir as ir

    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtefactError(f"Cannot read '{path}': {error.strerror or error}.") from error
    try:
        proto = onnx.load_model_from_string(content)
    except (google.protobuf.message.DecodeError, ValueError) as error:
        raise ArtefactError(
            f"'{path}' is not a whole ONNX file: it is damaged, cut off, or something else. "
            "Save the model again, or copy the file again."
        ) from error
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    if MANIFEST_KEY not in properties:
        raise ArtefactError(
            f"'{path}' was not made by fxopt, or its end is missing: it holds no manifest. To run "
            "an ONNX model of another origin, open it with onnxruntime.InferenceSession."
        )
    try:
        _read_data(proto, path)
        model = ir.from_proto(proto)
        onnx.checker.check_model(_without_data(model))
        state = [StateSlot(*row) for row in json.loads(properties.get(STATE_KEY, "[]"))]
        notes = tuple(json.loads(properties.get(NOTES_KEY, "[]")))
        model.metadata_props.pop(MANIFEST_KEY)
        model.metadata_props.pop(NOTES_KEY, None)
        runtime = RuntimeOptions(options.threads, options.providers, options.optimization)
        executable = OnnxExecutable(model, runtime, notes, state, options.external_data)
    except (onnx.checker.ValidationError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtefactError(
            f"'{path}' is damaged: {error} Save the model again, or copy the file again."
        ) from error
    return executable, properties[MANIFEST_KEY]


def _without_data(model: Any) -> onnx.ModelProto:
    proto, weights = split_weights(model)
    import onnx

    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in weights]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    for name, tensor in weights.items():
        shape = [int(size) for size in tensor.shape]
        proto.graph.input.append(onnx.helper.make_tensor_value_info(name, int(tensor.dtype), shape))
    return proto


def _read_data(proto: onnx.ModelProto, path: Path) -> None:
    """Bring in the constants that lie in a file beside the model, after checking its content."""
    import onnx

    external = [t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    if not external:
        return
    fields = {t.name: {entry.key: entry.value for entry in t.external_data} for t in external}
    names = {field.get("location", "") for field in fields.values()}
    name = names.pop() if len(names) == 1 else ""
    if not name or Path(name).name != name:
        raise ValueError("its constants should lie in one file beside it.")
    data = path.with_name(name)
    try:
        content = data.read_bytes()
    except OSError as error:
        raise ArtefactError(
            f"'{path}' keeps its constants in '{data}', which cannot be read: "
            f"{error.strerror or error}. Keep both files together."
        ) from error
    digest = hashlib.sha256()
    for tensor in external:
        field = fields[tensor.name]
        start = int(field["offset"])
        part = content[start : start + int(field["length"])]
        digest.update(part)
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.DEFAULT
        tensor.raw_data = part
    if digest.hexdigest()[:16] not in name.split("."):
        raise ArtefactError(
            f"'{data}' is damaged: its content is not what '{path}' was saved with. Save the "
            "model again, or copy both files again."
        )
