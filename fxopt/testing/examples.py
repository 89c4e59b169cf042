"""Examples to check rules with: a function, the shapes of its inputs, and what they are drawn from.

Next to the usual random numbers there are the unusual ones, in which a wrong rewrite shows: zeros,
ties and halves, large numbers, infinities, nan.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from fxopt.errors import OptionError

KINDS = {
    "normal": "on random inputs",
    "positive": "on positive inputs",
    "zero": "on zeros, ties and halves",
    "ties": "on ties",
    "large": "on large inputs",
    "nan": "where {} holds a nan",
    "inf": "where {} holds an infinity",
    "-inf": "where {} holds a negative infinity",
}
LARGE = {torch.float16: 2e4}  # overflows where two are added; elsewhere exp(1e3) does
_Change = Callable[[tuple[int, ...]], tuple[int, ...]]
_Example = TypeVar("_Example", bound="Example")
_SPECIAL = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


class Example:
    """A function, and inputs to capture it with, in which a rule fires, or must not.

    An input is a tensor, or the shape of one: a tuple of integers. Of a tensor of floats the shape
    matters, and other numbers are drawn; integers stay. `weights` become parameters of the model
    (those given as tensors buffers), and arrive as keyword arguments; those named in `positive` are
    drawn positive, as variances are. With a `reason` the rule must hold back, and what it says must
    contain that text.
    """

    def __init__(
        self, function: Callable[..., Any], *inputs: Any,
        weights: Mapping[str, Any] | None = None, positive: Collection[str] = (),
        reason: str | None = None,
    ) -> None:  # fmt: skip
        self.function, self.inputs, self.reason = function, inputs, reason
        self.weights = dict(weights or {})
        self.positive = {positive} if isinstance(positive, str) else set(positive)
        if not self.positive <= self.weights.keys():
            raise OptionError(
                f"Example: positive={sorted(self.positive)} names no weights; there are "
                f"{', '.join(self.weights) or 'none'}."
            )

    @property
    def source(self) -> str:
        """The line where the function was written."""
        code = getattr(self.function, "__code__", None)
        return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else ""

    @property
    def names(self) -> list[str]:
        """What its inputs are called."""
        parameters = inspect.signature(self.function).parameters.values()
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        numbers = range(len(names), len(self.inputs))
        return [*names[: len(self.inputs)], *(f"input {number}" for number in numbers)]

    def model(
        self, dtype: torch.dtype = torch.float64, seed: int = 7, kind: str = "normal"
    ) -> torch.nn.Module:
        """Return the function as a module, with random weights of this dtype."""
        return _Function(self.function, self._weights(dtype, seed, kind)).eval()

    def _weights(self, dtype: torch.dtype, seed: int, kind: str) -> dict[str, torch.Tensor]:
        weights = {}
        for index, (name, value) in enumerate(self.weights.items()):
            drawn = _drawn(value, dtype, seed + 1000 + index, kind)  # no two are alike
            drawn = drawn.abs() + 0.5 if name in self.positive and is_drawn(value) else drawn
            trained = drawn.is_floating_point() and not _is_buffer(value)
            weights[name] = torch.nn.Parameter(drawn) if trained else drawn
        return weights

    def draw(
        self, seed: int, dtype: torch.dtype | Sequence[torch.dtype] = torch.float64,
        kind: str = "normal", at: int | None = None,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """Return random inputs; floats in this dtype, or each in its own, integers as they are.

        `kind` is one of KINDS; with `at`, only that input's, and the others are normal.
        """
        dtypes = [dtype] * len(self.inputs) if isinstance(dtype, torch.dtype) else dtype
        return tuple(
            _drawn(value, dtypes[i], seed + i, kind if at in (None, i) else "normal")
            for i, value in enumerate(self.inputs)
        )

    def with_shapes(
        self: _Example, change: Callable[[str, tuple[int, ...]], tuple[int, ...]]
    ) -> _Example:
        """Return the example with other shapes; `change` gets a name and its shape."""
        inputs = zip(self.names, self.inputs, strict=True)
        other = copy.copy(self)
        other.inputs = tuple(_reshaped(name, value, change) for name, value in inputs)
        other.weights = {name: _reshaped(name, v, change) for name, v in self.weights.items()}
        return other

    def text(self, dtype: Any = torch.float64) -> str:
        """Describe the inputs: `x: float64[2, 3], w: float64[4, 3]`."""
        of_weights = dtype if isinstance(dtype, torch.dtype) else dtype[-1]
        weights = self._weights(of_weights, 1, "normal")
        given = [*zip(self.names, self.draw(1, dtype), strict=True), *weights.items()]
        return ", ".join(
            f"{name}: {str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for name, x in given
        )


def given_shape(value: Any) -> tuple[int, ...]:
    """Return the shape that was given for an input, or that of the tensor that was."""
    return tuple(value.shape) if isinstance(value, torch.Tensor) else tuple(value)


def is_drawn(value: Any) -> bool:
    """Whether numbers are drawn for an input; a tensor of integers stays as it is."""
    return not isinstance(value, torch.Tensor) or value.is_floating_point()


def _reshaped(name: str, value: Any, change: Callable[..., tuple[int, ...]]) -> Any:
    if not is_drawn(value):
        return value
    shape = change(name, given_shape(value))
    return torch.empty(shape) if _is_buffer(value) else shape


def _is_buffer(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)


class _Function(torch.nn.Module):
    def __init__(self, function: Callable[..., Any], weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        for name, weight in weights.items():
            if isinstance(weight, torch.nn.Parameter):
                self.register_parameter(name, weight)
            else:
                self.register_buffer(name, weight)

    def forward(self, *args: Any) -> Any:
        return self.function(*args, **dict(self.named_parameters()), **dict(self.named_buffers()))


# -- what is drawn ---------------------------------------------------------------------------------


def _drawn(value: Any, dtype: torch.dtype, seed: int, kind: str = "normal") -> torch.Tensor:
    if isinstance(value, torch.Tensor) and not is_drawn(value):
        return value
    generator = torch.Generator().manual_seed(seed)
    shape = given_shape(value)
    if not dtype.is_floating_point:
        return _integers(shape, dtype, generator, kind)
    return _floats(shape, generator, kind, LARGE.get(dtype, 1e3)).to(dtype)


def _floats(
    shape: tuple[int, ...], generator: torch.Generator, kind: str, large: float
) -> torch.Tensor:
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "positive":
        return numbers.abs()
    if kind == "zero":
        return numbers.sign() * (4 * numbers.abs()).floor().clamp(max=8) / 2  # −0.0, too
    if kind == "ties":
        return numbers.sign()
    if kind == "large":
        return large * numbers
    if kind in _SPECIAL and numbers.numel():
        place = int(torch.randint(numbers.numel(), (1,), generator=generator))
        numbers.view(-1)[place] = _SPECIAL[kind]
    return numbers


def _integers(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, kind: str
) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) > 0.5
    limits = torch.iinfo(dtype)
    most = limits.max if kind == "large" else 5
    numbers = torch.randint(max(limits.min, -most), most, shape, generator=generator)
    return numbers.to(dtype)


# -- other shapes ----------------------------------------------------------------------------------


def other_shapes(example: Example) -> Iterator[tuple[str, Example]]:
    """Yield the example with sizes of one, none and more."""
    sizes = _sizes(example)
    for size in sizes:
        if size > 1:
            yield f"with 1 in the place of size {size}", _resized(example, {size: 1})
    if sizes:
        yield "with sizes larger by one", _resized(example, {size: size + 1 for size in sizes})
    shapes = [given_shape(value) for value in example.inputs if is_drawn(value)]
    first = next((shape[0] for shape in shapes if shape), 0)
    if first:
        yield f"with 0 in the place of size {first}", _resized(example, {first: 0})
    yield from alike(example)


def alike(example: Example) -> Iterator[tuple[str, Example]]:
    """Yield the example with all sizes alike: what mixes up two axes has the right shape there."""
    sizes = [size for size in _sizes(example) if size > 1]
    if len(sizes) > 1:
        yield "with all sizes alike", _resized(example, dict.fromkeys(sizes, max(sizes)))


def other_ranks(example: Example) -> Iterator[tuple[str, list[str], Example]]:
    """Yield the example with an axis more and one less, and whose: all, the inputs, the weights."""
    inputs, weights = _drawn_names(example)
    new = next(size for size in itertools.count(2) if size not in _sizes(example))
    changes: dict[str, _Change] = {
        "with one axis more in front of": lambda shape: (new, *shape),
        "with one axis more behind": lambda shape: (*shape, new),
        "without the first axis of": lambda shape: shape[1:],
    }
    groups = [inputs + weights, *([inputs, weights] if inputs and weights else [])]
    for names, (words, change) in itertools.product(groups, changes.items()):
        if names:
            yield f"{words} {', '.join(names)}", names, _changed(
                example, dict.fromkeys(names, change)
            )  # fmt: skip


def broadcasts(example: Example) -> Iterator[Example]:
    """Yield operands of which one has fewer dimensions or sizes of one, and two that differ so."""
    names = list(itertools.chain(*_drawn_names(example)))[:2]
    if len(names) < 2:
        return
    one, other = names
    for change in (
        {one: _last_one}, {one: _no_first}, {other: _first_one}, {other: _no_first},
        {other: _scalar}, {one: _last_one, other: _first_one},
    ):  # fmt: skip
        yield _changed(example, change)


def _drawn_names(example: Example) -> tuple[list[str], list[str]]:
    inputs = zip(example.names, example.inputs, strict=True)
    return (
        [name for name, value in inputs if is_drawn(value)],
        [name for name, value in example.weights.items() if is_drawn(value)],
    )


def _sizes(example: Example) -> list[int]:
    given = [*example.inputs, *example.weights.values()]
    return sorted({size for value in given if is_drawn(value) for size in given_shape(value)})


def _resized(example: Example, sizes: Mapping[int, int]) -> Example:
    return example.with_shapes(lambda _, shape: tuple(sizes.get(size, size) for size in shape))


def _changed(example: Example, change: Mapping[str, _Change]) -> Example:
    return example.with_shapes(lambda name, shape: change.get(name, tuple)(shape))


def _last_one(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], 1) if shape else ()


def _first_one(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1, *shape[1:]) if shape else ()


def _no_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1:]


def _scalar(shape: tuple[int, ...]) -> tuple[int, ...]:
    return ()
