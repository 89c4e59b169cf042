"""fxopt.quantize: the passes that round a model to integers, in one call."""

from __future__ import annotations

from typing import Any

from fxopt.compile import optimize
from fxopt.graph_module import GraphModule
from fxopt.quantization.policy import Policy, policy_of


def quantize(
    model: Any,
    example_inputs: Any = None,
    *,
    calibration: Any = None,
    target: str | Policy = "openvino",
    bits: str = "w8a8",
    together: bool | None = None,
    dynamic_shapes: Any = None,
    **options: Any,
) -> GraphModule:
    """Return the graph of a model, fake-quantized for the integer kernels of an engine.

    The default passes run, then `InsertFakeQuant`, which takes `options`, then, where `together`,
    `RoundWeights`; None is for weights of fewer than 8 bits, where there are data. Compile the
    graph for that engine with `passes=[]`, or train it first. Both passes look at `calibration`, so
    it must be something that can be iterated again; bits="w8" needs none. Raises what
    `fxopt.optimize` and these passes raise.
    """
    from fxopt.passes.expand_attention import ExpandAttention
    from fxopt.passes.insert_fake_quant import InsertFakeQuant, weight_bits
    from fxopt.passes.round_weights import RoundWeights

    insert = InsertFakeQuant(calibration, target=target, bits=bits, **options)
    passes: list[Any] = ["default"]
    if policy_of(target).products:
        passes.append(ExpandAttention())
    passes.append(insert)
    few = weight_bits(insert) < 8 and calibration is not None
    if few if together is None else together:
        passes.append(RoundWeights(calibration, samples=insert.samples))
    return optimize(model, example_inputs, passes=passes, dynamic_shapes=dynamic_shapes)
