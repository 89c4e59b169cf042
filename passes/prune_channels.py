"""Remove the least important channels, whole: the layers that compute and read them shrink.

Before                                          After
    y = relu(conv2d(x, w₁: [64, 3, 3, 3]))          y = relu(conv2d(x, w₁': [32, 3, 3, 3]))
    z = conv2d(y, w₂: [128, 64, 3, 3])              z = conv2d(y, w₂': [128, 32, 3, 3])

Which channels must go together is found by identity (`fxopt.channels`): a residual sum makes two
channels one, a concatenation or a shuffle moves them, a split into attention's heads ties those of
a head. What the graph computes afterwards is what it computed before with exactly those channels
zeroed at the input of every contraction that reads them. The pass itself proves that on the example
inputs, and changes nothing where it does not hold.

Left alone: what the model returns; channels that a softmax, a mean or a norm reduces, since without
some of them it is another function (a layer norm over the residual width: `residual=True` prunes
that, too, and says how far off the result is); channels that meet something of fixed size, such as
an input; what passes through a call of which nothing is known. The report names them, and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fxopt.channels.analysis import Channels
from fxopt.channels.partition import Mask
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.objective import each_batch
from fxopt.pruning import selection
from fxopt.pruning.budget import Budget
from fxopt.pruning.computed_weights import analysed
from fxopt.pruning.importance import importance_of, score
from fxopt.pruning.latency import Stopwatch
from fxopt.pruning.removal import remove_proven
from fxopt.pruning.selection import Selection, Wish


@dataclass(frozen=True)
class PruneChannels:
    """Remove a share of the channels, or as many as save a share of what the graph costs.

    ratio           the share that goes, between 0 and 1
    of              of what: "channels"; or "macs", "params", "bytes" (of the weights), "latency"
                    (measured on the example inputs)
    backend         where the latency is measured
    scope           "layer": each loses that share of its channels; "global": the least important of
                    all go, wherever they are; "isomorphic": of all layers of one kind
    overrides       the share for layers by name, {"layer4": 0.3, "*.fc1": 0.7}: a pattern for the
                    path of a layer, or of a module with layers in it; of several that match, and of
                    layers that are tied to one another, the least
    keep            names of layers whose channels all stay
    importance      a name, an object or a function: see `fxopt.pruning.importance`
    round_to        make widths a multiple of this, where they are larger
    min_channels    how many of each family of channels stay at least
    max_ratio       how much of a family may go at most
    kinds           "channels", "heads" (of attention), or both: ("heads",) prunes nothing else
    heads           what attention loses: whole heads, or the "width" of each
    residual        also remove channels that norms and means reduce, which is approximate
    reconstruct     batches: pairs (inputs, targets) as for `fxopt.finetune`, or inputs alone, a
                    tensor or a dict. The layers that stay are fit to what those of the graph before
                    return on them, without training; some hundreds of inputs do, all of which are
                    held in memory. Targets are not looked at. See `fxopt.reconstruction`
    widths          the widths that shares are shares of, by family, where they are no longer the
                    widths as they are: for pruning in steps
    """

    ratio: float = 0.5
    of: str = "channels"
    scope: str = "layer"
    overrides: Mapping[str, float] = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    importance: Any = "l2"
    round_to: int = 1
    min_channels: int = 1
    max_ratio: float = 0.95
    kinds: tuple[str, ...] = ("channels", "heads")
    heads: str = "heads"
    residual: bool = False
    backend: str = "eager"
    reconstruct: Any = field(default=None, repr=False, compare=False)
    widths: Mapping[str, int] = field(default_factory=dict)

    name: ClassVar[str] = "prune-channels"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Prune the graph, once the result is proven. Raises OptionError for impossible options."""
        wish = self._wish()
        if graph.is_subgraph:
            return PassResult()  # the channels of a branch belong to the graph around it
        channels, folded = analysed(graph, heads=self.heads, reduced=self.residual)
        scores = score(importance_of(self.importance), channels.graph, channels.families)
        chosen = Selection(channels, [one.numpy() for one in scores], wish)
        masks = self._masks(chosen, channels)
        batches = self._batches() if any(mask.any() for mask in masks) else []
        result = remove_proven(graph, channels, masks, chosen.gone(masks), self.name, batches)
        return folded.followed_by(result) if result.modified else result

    def _batches(self) -> list[Any]:
        """Return the batches to reconstruct with; none where that was not asked for."""
        if self.reconstruct is None:
            return []
        return list(each_batch(self.reconstruct, "reconstruct"))

    def _wish(self) -> Wish:
        selection.check_overrides(self.overrides)
        overrides = {**self.overrides, **dict.fromkeys(self.keep, 0.0)}
        wish = Wish(
            self.ratio, self.scope, overrides, self.kinds, self.round_to, self.min_channels,
            self.max_ratio, self.widths,
        )  # fmt: skip
        selection.check(wish, self.of)
        return wish

    def _masks(self, chosen: Selection, channels: Channels) -> list[Mask]:
        if self.of == "channels":
            return chosen.spare(chosen.at_ratio(self.ratio))
        if self.of == "latency":
            return chosen.at_budget(Stopwatch(channels, self.backend), self.of, trials=6)
        return chosen.at_budget(Budget(channels, self.of), self.of)
