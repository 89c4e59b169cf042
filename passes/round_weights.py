"""Choose the integers of each layer's weights together, on data, so that errors cancel.

Before                                        After
    y = conv2d(Q(x), Q(w), b)                     y = conv2d(Q(x), Q(w'), b')

For each layer of a fake-quantized graph, from the first to the last, w' and b' make what it returns
for the rounded values that it reads as near as can be to what it returned in floats; w' lies on the
grid of Q, so that Q(w') = w'. The best real weights follow by least squares; from there each column
of weights is rounded in turn, and what that changes is spread over the columns not rounded yet, as
the data weigh it (Frantar et al., "GPTQ", ICLR 2023). Each output keeps what is best on inputs that
nothing was fit to, of this, of the nearest integers, and of these with a bias that makes good the
mean error (Nagel et al., "Data-Free Quantization", ICCV 2019, section 4.2). What a layer's output
is added to counts as well: the residual sum is what is fit.

Left alone: layers whose weight is not rounded, or is read by others, too; transposed convolutions;
weights in groups; layers that are looked at in too few positions to judge by.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.errors import OptionError
from fxopt.graph_module import GraphModule
from fxopt.quantization.calibration import inputs_for
from fxopt.quantization.fitting import Rounded, fit_rounding
from fxopt.quantization.operator import fake_quantize
from fxopt.rewrite import Rewriter


def _is_not_rounded(graph: GraphModule) -> str | None:
    rounded = [node.all_input_nodes[0] for node in graph.find(fake_quantize)]
    if graph.is_subgraph or any(node.op == "get_attr" for node in rounded):
        return None
    return "it has no rounded weights; put InsertFakeQuant in front"


@dataclass(frozen=True)
class RoundWeights:
    """Choose the integers of weights together, so that layers return what they did in floats.

    calibration    batches as for `InsertFakeQuant`; all of them are held in memory
    samples        how many inputs to look at
    """

    calibration: Any = field(default=None, repr=False, compare=False)
    samples: int = 256

    name: ClassVar[str] = "round-weights"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[Precondition, ...]] = (
        Precondition("a graph with rounded weights", _is_not_rounded),
    )

    def __post_init__(self) -> None:
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise OptionError(f"samples={self.samples!r}: it is a whole number above 0.")

    def run(self, graph: GraphModule) -> PassResult:
        """Replace weights and biases. `details` is a `fxopt.reconstruction.Reconstruction`."""
        rewriter = Rewriter(graph)
        if graph.is_subgraph:
            return rewriter.result()
        batches = [flat for flat, _ in inputs_for(graph, self.calibration, self.samples)]
        found, record = fit_rounding(graph, batches)
        for path, why in record.skipped:
            node = next((n for n in graph.graph.nodes if n.meta.get("path") == path), None)
            if node is not None:
                rewriter.miss(node, f"its weights stay: {why}")
        for layer, new in found.items():
            if not _replace(rewriter, layer, new):
                break
        return replace(rewriter.result(), details=record)


def _replace(rewriter: Rewriter, layer: fx.Node, new: Rounded) -> bool:
    """Give a layer its new weight and bias: one rewrite. Return False without fuel."""
    args: Any = layer.args
    rounded: fx.Node = args[1]
    pairs = [(rounded.all_input_nodes[0], new.weight)]
    if new.bias is not None:
        pairs.append((args[2], new.bias))
    made = {}
    for old, tensor in pairs:
        made[old] = rewriter.constant_of(
            tensor, partial(torch.clone, tensor), [old], name=f"{old.target}_rounded",
            before=rounded if old is pairs[0][0] else layer, origin=old, is_part=True,
        )  # fmt: skip
        rewriter.graph.info.fitted |= {str(made[old].target)}
    return rewriter.replace(made)
