"""How inputs, dimensions, passes and options are written on the command line and in a recipe."""

from __future__ import annotations

import ast
import difflib
import re
from dataclasses import dataclass
from typing import Any

import click
import torch

from fxopt.inputs import Inputs
from fxopt.text import dtype_text

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
    )
}  # fmt: skip
SHORT = {dtype_text(dtype): dtype for dtype in DTYPES.values()}
_INPUT = re.compile(r"(?:(?P<name>[^\W\d]\w*)=)?(?P<shape>scalar|\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")


@dataclass(frozen=True)
class InputSpec:
    """One example input: `1x3x224x224:float32`, or `ids=1x128:int64` for a keyword."""

    name: str | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        name = f"{self.name}=" if self.name else ""
        shape = "x".join(map(str, self.shape)) or "scalar"
        return f"{name}{shape}:{str(self.dtype).removeprefix('torch.')}"


class InputType(click.ParamType[Any]):
    """Reads `[NAME=]SHAPE[:DTYPE]`."""

    name = "[NAME=]SHAPE[:DTYPE]"

    def convert(self, value: Any, param: Any, ctx: Any) -> InputSpec:
        """Return the input spec that `value` says."""
        if isinstance(value, InputSpec):
            return value
        read = _INPUT.fullmatch(str(value).strip())
        if read is None:
            self.fail(
                f"'{value}' is no input. Write sizes joined by x and a dtype, such as "
                "1x3x224x224:float32, or NAME=SHAPE:DTYPE for a keyword, such as ids=1x128:int64."
            )
        kind = read["dtype"] or "float32"
        dtype = DTYPES.get(kind, SHORT.get(kind))
        if dtype is None:
            near = difflib.get_close_matches(kind, DTYPES, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            self.fail(f"'{kind}' is no dtype.{hint} Known: {', '.join(DTYPES)}.")
        sizes = () if read["shape"] == "scalar" else tuple(map(int, read["shape"].split("x")))
        return InputSpec(read["name"], sizes, dtype)


class PassesType(click.ParamType[Any]):
    """Reads a list of passes: `fold-constants(growth=2.0),fuse-conv-bn`."""

    name = "PASS,…"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[str]:
        """Return the passes one by one, each as it is written."""
        if isinstance(value, (list, tuple)):
            return [str(one) for one in value]
        return [] if value.strip() in ("", "none") else split_passes(value)


def split_passes(text: str) -> list[str]:
    """Split at the commas that stand outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


class OptionType(click.ParamType[Any]):
    """Reads `KEY=VALUE`; the value is a Python literal, else a string."""

    name = "KEY=VALUE"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, Any]:
        """Return the key and its value."""
        if isinstance(value, (tuple, list)) and len(value) == 2:
            return str(value[0]), value[1]
        key, equals, text = str(value).partition("=")
        if not equals or not key.strip().isidentifier():
            self.fail(f"'{value}' is no option. Write KEY=VALUE, such as opset=20.")
        words = {"true": True, "false": False, "none": None}
        if text.strip().lower() in words:
            return key.strip(), words[text.strip().lower()]
        try:
            return key.strip(), ast.literal_eval(text)
        except (SyntaxError, ValueError):
            return key.strip(), text


def dynamic_shapes(written: tuple[str, ...]) -> dict[Any, Any] | None:
    """Read `0` (that dimension of every input) or `name:0`; return what `fxopt.capture` takes."""
    everywhere: dict[int, str] = {}
    named: dict[str, dict[int, str]] = {}
    for part in (part.strip() for one in written for part in str(one).split(",")):
        name, _, axis = part.rpartition(":")
        if not axis.isdigit():
            raise click.UsageError(
                f"--dynamic '{part}' is no dimension. Write 0 for the first of every input, or "
                "NAME:0 for that of one."
            )
        if name:
            named.setdefault(name, {})[int(axis)] = f"{name}_{axis}"
        else:
            everywhere[int(axis)] = f"size_{axis}"
    if everywhere and named:
        raise click.UsageError(
            "--dynamic takes dimensions of all inputs, or of named ones: not both."
        )
    return everywhere or named or None


def draw_inputs(specs: tuple[InputSpec, ...], model: Any) -> Inputs | None:
    """Return example inputs, the same each time; None without specs.

    Floats are normal. Integers are below 2, or below the size of the model's smallest embedding
    where it has any: legal indices. An input whose name ends in `mask` is all ones.
    """
    if not specs:
        return None
    generator = torch.Generator().manual_seed(0)
    limit = _smallest_table(model)
    args = tuple(_draw(spec, limit, generator) for spec in specs if spec.name is None)
    kwargs = {spec.name: _draw(spec, limit, generator) for spec in specs if spec.name is not None}
    return Inputs(args, kwargs)


def _draw(spec: InputSpec, limit: int, generator: torch.Generator) -> torch.Tensor:
    if spec.name is not None and spec.name.endswith("mask"):
        return torch.ones(spec.shape, dtype=spec.dtype)
    if spec.dtype.is_floating_point or spec.dtype.is_complex:
        wide = torch.complex128 if spec.dtype.is_complex else torch.float64
        return torch.randn(spec.shape, generator=generator, dtype=wide).to(spec.dtype)
    return torch.randint(0, limit, spec.shape, generator=generator).to(spec.dtype)


def _smallest_table(model: Any) -> int:
    if not isinstance(model, torch.nn.Module):
        return 2
    tables = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    sizes = [module.num_embeddings for module in model.modules() if isinstance(module, tables)]
    return min(sizes, default=2)
