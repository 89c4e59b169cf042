"""The TorchScript backend: one `.pt` file that runs in PyTorch from Python and C++ alike.

Legacy: PyTorch deprecates TorchScript, and this backend serves those who deploy it already.

The graph becomes TorchScript source, one line per node, which TorchScript compiles: a trace would
fix every symbolic size at its example, because operators called by overload take plain integers.

Left alone, with a LoweringError: control flow, and graphs that write state back.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from fxopt.backends.torchscript.source import Source
from fxopt.contract import Pass
from fxopt.errors import ArtefactError
from fxopt.files import write_atomic
from fxopt.graph_module import GraphModule
from fxopt.passes.expand_attention import ExpandAttention

_MANIFEST = "fxopt.json"
_LEGACY = "TorchScript is legacy: PyTorch deprecates it. Prefer 'eager' or 'onnx' for new work."


class TorchScriptExecutable:
    """A script module that holds copies of the graph's constants, run under no_grad."""

    notes: tuple[str, ...] = (_LEGACY,)

    def __init__(self, module: Any, *, optimize: bool) -> None:
        self._module = module  # what is saved; the optimized one is for this machine only
        self._runner = module
        if optimize:
            twin = io.BytesIO()  # optimizing changes the module so that it cannot be saved
            with _quiet():
                torch.jit.save(module, twin)
                twin.seek(0)
                self._runner = torch.jit.optimize_for_inference(torch.jit.load(twin))

        nodes = self._runner.graph.findAllNodes("prim::Constant")
        valued = [node for node in nodes if node.hasAttribute("value")]
        folded = [node.t("value") for node in valued if node.kindOf("value") == "t"]
        held = (*self._runner.parameters(), *self._runner.buffers())
        self._constants = frozenset().union(*map(_memory, (*folded, *held)))

    @property
    def code(self) -> str:
        """The TorchScript source of the graph."""
        return str(self._module.code)

    def run(self, *flat: Any) -> tuple[torch.Tensor, ...]:
        """Run on flat inputs."""
        with torch.no_grad():
            result = self._runner(*flat)
        return () if result is None else tuple(map(self._own, result))

    def _own(self, value: Any) -> Any:
        """Return an output; as a copy where it lies in a constant's memory."""
        return value.clone() if _memory(value) & self._constants else value

    def save(self, path: Path, manifest: str) -> None:
        """Write a TorchScript archive that holds the manifest as an extra file."""
        buffer = io.BytesIO()
        with _quiet():
            torch.jit.save(self._module, buffer, _extra_files={_MANIFEST: manifest})
        write_atomic(path, buffer.getvalue())


@dataclass(frozen=True)
class TorchScript:
    """TorchScript, compiled from the graph. Legacy: PyTorch deprecates it."""

    name: ClassVar[str] = "torchscript"
    suffix: ClassVar[str] = ".pt"
    # attention that PyTorch has no fused kernel for is slower as one operator than as products
    legalize: ClassVar[tuple[Pass, ...]] = (ExpandAttention(keep_fast=True),)

    freeze: bool = True  # make the weights constants of the code, and fold what follows from them
    optimize_for_inference: bool = False  # also for this processor; never saved

    def missing(self) -> str | None:
        """PyTorch is always there."""
        return None

    def lower(self, graph: GraphModule) -> TorchScriptExecutable:
        """Compile the graph's TorchScript source.

        Raises LoweringError, naming the node, for control flow, state, and whatever TorchScript
        has no form of.
        """
        source = Source(graph)
        with _quiet():
            module = source.compile()
            if self.freeze:
                # without its own folding, which takes a batch norm behind a linear layer for one
                # over the features even where it is over another dimension
                module = torch.jit.freeze(module, optimize_numerics=False)
        return TorchScriptExecutable(module, optimize=self.optimize_for_inference)

    def load(self, path: Path) -> tuple[TorchScriptExecutable, str]:
        """Read an archive that `save` wrote.

        No Python code from the file is run: TorchScript has its own interpreter, and can call only
        the operators that are registered in this process. Those include some that read and write
        files, so run an archive only if you trust whoever made it.
        """
        manifest = _manifest(path)
        try:
            with _quiet():
                module = torch.jit.load(str(path))
        except RuntimeError as error:
            raise ArtefactError(
                f"'{path}' is not a TorchScript archive that can be read here: {error!s:.300} "
                "Get the file again, or save the model again."
            ) from error
        return TorchScriptExecutable(module, optimize=self.optimize_for_inference), manifest


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch.jit says about its own deprecation, and nothing else."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.", DeprecationWarning)
        yield


def _memory(value: Any) -> frozenset[int]:
    """Return the address of a tensor's memory, where it has one."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return frozenset()
    return frozenset({value.untyped_storage().data_ptr()} - {0})


def _manifest(path: Path) -> str:
    """Return the manifest of a whole archive; every member's checksum is verified."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            extra = [name for name in names if name.endswith(f"/extra/{_MANIFEST}")]
            is_script = any(name.endswith("/constants.pkl") for name in names)
            if len(extra) != 1 or not is_script:
                raise ArtefactError(
                    f"'{path}' holds no fxopt manifest, so fxopt did not save it. Load it with "
                    "torch.jit.load or torch.load, or save the model with CompiledModel.save."
                )
            broken = archive.testzip()
            if broken is not None:
                raise zipfile.BadZipFile(f"its part '{broken}' has a wrong checksum")
            return archive.read(extra[0]).decode()
    except OSError as error:
        raise ArtefactError(f"'{path}' cannot be read: {error.strerror or error}.") from error
    except ArtefactError:
        raise
    except Exception as error:  # a damaged zip fails in many ways
        raise ArtefactError(
            f"'{path}' is not a whole TorchScript archive ({error}). It was cut off or damaged, or "
            "is something else. Get the file again, or save the model again."
        ) from error
