"""Round weights and activations to integers where an engine computes on integers.

Before                                       After
    y = conv2d(x, w, b)                          y = conv2d(Q(x), Q(w), b)
    z = relu(y)                                  z = relu(y)
    u = conv2d(z, v, c)                          u = conv2d(Q(z), Q(v), c)

    Q(x) = fake_quantize(x, s, z, qmin, qmax) = (clamp(round(x / s) + z, qmin, qmax) − z) · s

The graph still computes floats, those that the integers stand for: it says what an engine's integer
kernels will return, runs anywhere, and trains (Jacob et al., "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018). A backend that has such
kernels lowers it to them.

Which values are rounded follows from the engine: `fxopt.quantization.policy` is the table. A value
is rounded once, where it is computed, in front of what only moves it; what is concatenated shares a
scale; activation functions and sums go in front of the rounding where the engine's kernels take
them in. Ranges of activations come from the user's data, those of weights from the weights, which
new weights are put through again.

Left alone: what `keep` names; layers whose weight is computed or not of floats; layers in the
bodies of control flow; embeddings, norms, softmax and all else that engines compute in floats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.difference import relative_error
from fxopt.errors import OptionError, check_choice, check_option, is_count
from fxopt.graph_module import GraphModule
from fxopt.naming import check_patterns, fits
from fxopt.quantization.calibration import calibrate
from fxopt.quantization.histogram import Histogram
from fxopt.quantization.noise import is_float, sqnr
from fxopt.quantization.operator import fake_quantize
from fxopt.quantization.placement import Placement, Value, called, channel_axis, place
from fxopt.quantization.policy import Policy, policy_of
from fxopt.quantization.ranges import Method, method_of, range_of
from fxopt.quantization.record import QuantizationRecord, RoundedValue, RoundedWeight
from fxopt.quantization.scheme import Scheme
from fxopt.quantization.weights import weight_parameters
from fxopt.rewrite import Rewriter
from fxopt.verify import runner, seeded

aten = torch.ops.aten
_BITS = re.compile(r"w(\d+)(?:a(\d+))?", re.ASCII)
_FLOAT = "float"
Bits = tuple[int, int | None]  # of weights, and of activations that are rounded


def _quantized_already(graph: GraphModule) -> str | None:
    for node in graph.graph.nodes:
        name = called(node)
        if "fake_quant" in name or name.startswith(("quantized_decomposed::", "torchao::")):
            return f"'{node.name}' quantizes already; start from the float model"
    return None


def _folded(graph: GraphModule) -> str | None:
    """Say where a batch norm would still change a weight that is about to be rounded."""
    for node in graph.graph.nodes:
        if called(node) != "aten::batch_norm":
            continue
        layer = node.args[0]
        if called(layer).removeprefix("aten::")[:4] in ("conv", "line") and len(layer.users) == 1:
            return (
                f"'{node.name}' follows '{layer.name}' and would change its weight later; fold it "
                "first: passes=[*fxopt.default_passes(), InsertFakeQuant(...)]"
            )
    return None


@dataclass(frozen=True)
class InsertFakeQuant:
    """Round weights and activations to 8-bit integers, as the engine's kernels take them.

    calibration    batches of what the model will see: pairs (inputs, targets), or inputs alone;
                   some hundreds of samples do. "random" for tests of speed
    target         the engine: "onnx", "openvino", "eager", or a `fxopt.quantization.Policy`
    bits           "w8a8": bits of weights and of activations, 2 to 16; "w8": of weights alone,
                   which needs no data, and makes files smaller, and what waits for memory faster
    overrides      the bits, or "float", by pattern: {"layer1.*": "w4a8", "head": "float"}. A
                   pattern fits paths of layers, names of nodes, and operators ("aten.linear"); the
                   first that fits counts
    keep           patterns of what stays float
    method         how the ranges of activations follow from what was seen: "minmax",
                   "moving-average", "percentile", "mse", "entropy", an object or a function; see
                   `fxopt.quantization.ranges`
    group          so many weights in a row share a scale in linear layers, instead of all of an
                   output's; where that divides their number
    weight_method  "minmax", or "mse": clip weights where that makes the squared error smaller
    learn          make the scales parameters, which training then learns (LSQ)
    samples        how many inputs to look at
    progress       show a bar on stderr
    """

    calibration: Any = field(default=None, repr=False, compare=False)
    target: str | Policy = "openvino"
    bits: str = "w8a8"
    overrides: Mapping[str, str] = field(default_factory=dict, hash=False)
    keep: tuple[str, ...] = ()
    method: str | Method = "mse"
    group: int | None = None
    weight_method: str = "minmax"
    learn: bool = False
    samples: int = 256
    progress: bool = False

    name: ClassVar[str] = "insert-fake-quant"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[Precondition, ...]] = (
        Precondition("a graph of floats", _quantized_already),
        Precondition("folded batch norms", _folded),
    )

    def __post_init__(self) -> None:
        policy_of(self.target)
        method_of(self.method)
        if not isinstance(self.overrides, Mapping):
            raise OptionError(
                f"overrides={self.overrides!r}: it maps patterns to bits, {{'layer1.*': 'w4a8'}}."
            )
        object.__setattr__(self, "overrides", dict(self.overrides))
        for name in ("learn", "progress"):
            value = getattr(self, name)
            check_option("InsertFakeQuant", type(value) is bool, name, value, "True or False")
        check_choice("weight_method", self.weight_method, ("minmax", "mse"))
        for text in (self.bits, *self.overrides.values()):
            _bits(text)
        if isinstance(self.keep, str):
            raise OptionError(f"keep={self.keep!r} is one text; write keep=({self.keep!r},).")
        if not isinstance(self.keep, (tuple, list)) or not all(
            isinstance(pattern, str) for pattern in (*self.keep, *self.overrides)
        ):
            raise OptionError(f"keep={self.keep!r}: patterns are texts, in a tuple.")
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise OptionError(f"samples={self.samples!r}: it is a whole number above 0.")
        check_option(
            "InsertFakeQuant", self.group is None or is_count(self.group), "group", self.group,
            "a whole number above 0, or None",
        )  # fmt: skip

    def run(self, graph: GraphModule) -> PassResult:
        """Insert the fake-quants. `details` of the result is a `QuantizationRecord`."""
        rewriter = Rewriter(graph)
        policy = policy_of(self.target)
        if graph.is_subgraph:
            for node in graph.graph.nodes:
                if called(node) in policy.layers:
                    rewriter.miss(node, "it stays float: it is in the body of control flow")
            return rewriter.result()
        check_patterns(graph, (*self.overrides, *self.keep))
        placement = place(
            graph, policy, self._obstacle, lambda node: self._bits_of(node)[1] is None
        )
        for node, reason in placement.floats:
            rewriter.miss(node, f"it stays float: {reason}")
        if not placement.values and not placement.weights:
            return rewriter.result()
        before = graph.copy()
        seen: dict[fx.Node, Histogram] = {}
        samples = 0
        if placement.values:
            seen, samples = calibrate(
                graph, [value.node for value in placement.values], self.calibration,
                samples=self.samples, progress=self.progress,
            )  # fmt: skip
        schemes = self._activation_schemes(placement, policy, seen)
        ranges = [
            range_of(seen[value.node], schemes[value.group], self.method)
            for value in placement.values
        ]
        values = self._round_values(rewriter, placement.values, schemes, ranges)
        weights = self._round_weights(rewriter, placement, policy)
        result = rewriter.result()
        if rewriter.out_of_fuel or not result.rewrites:
            return result
        error, sqnr = _moved(before, graph)
        record = QuantizationRecord(
            policy.name, str(self.method), samples, values, weights,
            tuple((node.meta.get("path") or node.name, why) for node, why in placement.floats),
            error, sqnr,
        )  # fmt: skip
        return replace(result, details=record)

    # -- activations --------------------------------------------------------------------------

    def _activation_schemes(
        self, placement: Placement, policy: Policy, seen: Mapping[fx.Node, Histogram]
    ) -> dict[int, Scheme]:
        """Return the scheme of each group: the most bits that anyone asks for who computes on it.

        Where one asks for the zero point 0, and there are negative numbers, it is symmetric.
        """
        bits: dict[int, int] = {}
        for value in placement.values:
            asked = [self._bits_of(asker)[1] or 8 for asker in value.askers]
            bits[value.group] = max(bits.get(value.group, 0), *asked)
        centered = {value.group for value in placement.values if value.centered}
        negative = {value.group for value in placement.values if seen[value.node].low < 0}
        return {
            group: Scheme(bits=most, symmetric=True, signed=True)
            if group in centered & negative
            else replace(policy.activations, bits=most)
            for group, most in bits.items()
        }

    def _round_values(
        self,
        rewriter: Rewriter,
        values: Sequence[Value],
        schemes: Mapping[int, Scheme],
        ranges: Sequence[tuple[float, float]],
    ) -> tuple[RoundedValue, ...]:
        """Round each value in front of the first who reads it so; return what was done."""
        order = {node: at for at, node in enumerate(rewriter.graph.graph.nodes)}
        first = [min(value.readers, key=order.__getitem__) for value in values]
        wide: dict[int, tuple[float, float]] = {}
        place_of: dict[int, fx.Node] = {}
        for value, (low, high), reader in zip(values, ranges, first, strict=True):
            known = wide.get(value.group, (low, high))
            wide[value.group] = min(low, known[0]), max(high, known[1])
            place = place_of.setdefault(value.group, reader)
            place_of[value.group] = min(place, reader, key=order.__getitem__)
        made: dict[int, tuple[fx.Node, fx.Node]] = {}
        done = []
        for value, reader in zip(values, first, strict=True):
            scheme = schemes[value.group]
            scale, zero_point = scheme.parameters(*wide[value.group])
            if value.group not in made:
                made[value.group] = self._parameters(
                    rewriter, value.node, scale, zero_point, place_of[value.group]
                )
            rounded = rewriter.insert(
                fake_quantize, value.node, *made[value.group], scheme.qmin, scheme.qmax,
                before=reader, origin=value.node, like=value.node,
            )  # fmt: skip
            if not rewriter.replace(value.node, rounded, users=value.readers):
                break
            done.append(RoundedValue(
                value.node.name, str(scheme), (scheme.qmin - zero_point) * scale,
                (scheme.qmax - zero_point) * scale, scale, zero_point,
                tuple(one.name for one in value.readers), value.group,
            ))  # fmt: skip
        return tuple(done)

    def _parameters(
        self, rewriter: Rewriter, value: fx.Node, scale: float, zero_point: int, before: fx.Node
    ) -> tuple[fx.Node, fx.Node]:
        """Register the scale and the zero point of a value."""
        device = value.meta["val"].device
        found = (torch.tensor(scale, device=device), torch.tensor(
            zero_point, dtype=torch.int32, device=device
        ))  # fmt: skip
        names = (f"{value.name}_scale", f"{value.name}_zero_point")
        made = [
            rewriter.constant_of(
                tensor, partial(torch.clone, tensor), [], name=name, before=before, origin=value,
                trainable=self.learn and tensor.is_floating_point(),
            )
            for tensor, name in zip(found, names, strict=True)
        ]  # fmt: skip
        rewriter.graph.info.fitted |= {str(node.target) for node in made}
        return made[0], made[1]

    # -- weights ------------------------------------------------------------------------------

    def _round_weights(
        self, rewriter: Rewriter, placement: Placement, policy: Policy
    ) -> tuple[RoundedWeight, ...]:
        """Round each weight in front of its first layer; return what was done."""
        done = []
        for weight, layers in placement.weights.items():
            most = max(self._bits_of(layer)[0] for layer in layers)
            scheme = replace(policy.weights, bits=most)
            axis, group = channel_axis(layers[0]), self._group_of(weight)
            insert = partial(rewriter.constant, sources=[weight], before=layers[0], origin=weight)
            parameters = [
                insert(
                    partial(_parameter, which=which, scheme=scheme, axis=axis,
                            method=self.weight_method, group=group),
                    name=f"{weight.target}_{name}",
                    trainable=self.learn and which == 0,
                )
                for which, name in enumerate(("scale", "zero_point"))
            ]  # fmt: skip
            build = partial(rewriter.insert, before=layers[0], origin=weight)
            ends, shape = (scheme.qmin, scheme.qmax), list(weight.meta["val"].shape)
            if group is None:
                rounded = build(fake_quantize, weight, *parameters, *ends, like=weight)
            else:
                groups = build(aten.reshape.default, weight, [shape[0], -1, group])
                rounded = build(fake_quantize, groups, *parameters, *ends, like=groups)
                rounded = build(aten.reshape.default, rounded, shape)
            if not rewriter.replace(weight, rounded, users=layers):
                break
            paths = tuple(layer.meta.get("path") or layer.name for layer in layers)
            words = str(scheme) if group is None else f"{scheme}, in groups of {group}"
            done.append(RoundedWeight(str(weight.target), words, paths))
        return tuple(done)

    # -- what was asked for -------------------------------------------------------------------

    def _obstacle(self, node: fx.Node) -> str | None:
        if any(fits(node, pattern) for pattern in self.keep) or self._asked(node) == _FLOAT:
            return "it is to be kept"
        return None

    def _group_of(self, weight: fx.Node) -> int | None:
        """Return how many of a weight's numbers share a scale; None for those of an output."""
        shape = weight.meta["val"].shape
        divides = self.group is not None and len(shape) == 2 and shape[1] % self.group == 0
        return self.group if divides else None

    def _asked(self, node: fx.Node) -> str:
        found = [bits for pattern, bits in self.overrides.items() if fits(node, pattern)]
        return found[0] if found else self.bits

    def _bits_of(self, node: fx.Node) -> Bits:
        """Return the bits of weights and of activations that a reader asks for."""
        asked = self._asked(node)
        return _bits(self.bits if asked == _FLOAT else asked)


def _bits(text: Any) -> Bits:
    """Read "w8a8", or "w8", which has no bits for activations, or "float", which has none at all.

    Raise OptionError for anything else.
    """
    if text == _FLOAT:
        return 8, 8
    match = _BITS.fullmatch(text) if isinstance(text, str) else None
    if match is None or not all(2 <= int(bits) <= 16 for bits in match.groups() if bits):
        raise OptionError(
            f"{text!r} says no number of bits: write 'w8a8' for weights and activations of 8 bits, "
            "2 to 16 each, 'w8' for weights alone, or 'float'."
        )
    return int(match[1]), int(match[2]) if match[2] else None


def weight_bits(insert: InsertFakeQuant) -> int:
    """Return the fewest bits that any weight was asked to have."""
    return min(_bits(text)[0] for text in (insert.bits, *insert.overrides.values()))


def _parameter(
    weight: torch.Tensor, which: int, scheme: Scheme, axis: int, method: str, group: int | None
) -> torch.Tensor:
    """Return the scale (0) or the zero point (1) of a weight."""
    return weight_parameters(weight, scheme, axis, method, group)[which]


def _moved(before: GraphModule, after: GraphModule) -> tuple[float, float]:
    """Return how far the outputs moved on the example inputs: relative, and as SQNR in dB."""
    inputs = before.info.example_inputs
    reference = list(seeded(runner(before), inputs))
    found = list(seeded(runner(after), inputs))
    floats = [at for at, value in enumerate(reference) if is_float(value)]
    ratio = sqnr([found[at] for at in floats], [reference[at] for at in floats])
    return relative_error(found, reference), ratio
