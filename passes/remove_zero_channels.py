"""Remove channels that are zero, or that nobody listens to: the layers shrink, the function stays.

Before                                          After
    y = relu(batch_norm(conv2d(x, w: [64, 3, …]), γ, β))
    z = conv2d(y, v: [128, 64, …], b)               the same, with 47 instead of 64 channels

Training with sparsity leaves channels without effect: network slimming drives scales γ to 0 (Liu et
al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017), masks make
weights 0, units of a ReLU die. Such a channel goes where at each contraction that reads it

    v = 0 at it         for all outputs that do not go themselves,
    it is 0             whatever the inputs are: γ = β = 0, a row of weights and its bias 0, and
                        what elementwise calls, sums, pools, moves and depthwise layers make of it,
    it is a constant c  and the bias takes what it adds: b' = b + Σ v · c. A layer without a bias
                        gets one.

Which channels must go together is found by identity (`fxopt.channels`), and what is constant by an
abstract interpretation (`fxopt.pruning.constant_channels`). Activations and weights are taken to be
finite: 0 · ∞ is NaN. In training a scale of 0 could grow again, so this is for inference, or for a
network that is to stay small. The numbers of weights decide, so `CompiledModel.update` refuses new
weights in which a channel that has gone is not what it was.

Left alone: constants other than 0 in front of a convolution that pads with zeros (its borders see
fewer of them) or is transposed, and where there is no bias; what the model returns, and channels
that a mean, a norm or a softmax reduces; batch norms that use batch statistics; the last channel of
each dimension. The report says how many stay for which reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.pruning.computed_weights import analysed
from fxopt.pruning.dead_channels import DeadChannels
from fxopt.pruning.dead_removal import RemovedChannels, without
from fxopt.pruning.zero_lines import may_have_any


@dataclass(frozen=True)
class RemoveZeroChannels:
    """Remove channels that are zero, constant, or that nobody listens to."""

    name: ClassVar[str] = "remove-zero-channels"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Remove channels until there are no more; `details` says from which layers.

        One rewrite removes all that are found. What they leave may be split into channels in
        another way, so the graph is looked at again.
        """
        if graph.is_subgraph or not may_have_any(graph):
            return PassResult()
        result = latest = self._remove(graph)
        while latest.modified and may_have_any(graph):
            latest = self._remove(graph)
            if latest.modified:
                record = result.details.plus(latest.details)
                both = result.followed_by(latest)
                result = replace(both, misses=result.misses, details=record)
        return result

    def _remove(self, graph: GraphModule) -> PassResult:
        channels, folded = analysed(graph, heads="heads", reduced=False)
        dead = DeadChannels(channels)
        misses = tuple(dead.misses())
        if not dead.gone.any():
            return PassResult(misses=misses)
        smaller, result = without(dead, self.name)
        if not result.modified:
            return PassResult(misses=misses)  # bisection has stopped the pass
        record = RemovedChannels.of(dead)
        graph.become(smaller)
        return replace(folded.followed_by(result), misses=misses, details=record)

