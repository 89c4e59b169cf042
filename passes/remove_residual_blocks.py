"""Remove whole residual blocks, those that change their input least.

Before                                   After
    y = x + f(x)                             users of y use x
    z = relu(y)                              z = relu(x)

Which blocks there are is found in the graph (`fxopt.blocks`): a sum of x and of what is computed
from x and used for nothing else, whatever stands in it: layer scale, drop path, attention. A block
is removed by name, or because it matters little on the example inputs or on given data:

    influence   1 − mean cosine of x and y      (Men et al. 2024, "ShortGPT", equation 1)
    norm        mean of ‖y − x‖ / ‖x‖

over the tokens of [batch, tokens, features], over the samples of anything else. The scores are
those of the network as it was, also where several blocks go. The pass itself proves that the result
is the original with zeros for f(x) in those sums, in float64, and changes nothing where it is not.

Left alone: sums whose shortcut computes something, such as a projection to another width; blocks
whose branch is used elsewhere, too, or has an effect; a sum of another shape or dtype than x; the
bodies of control flow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.blocks import ResidualBlock, residual_blocks
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.dialect import retarget
from fxopt.errors import OptionError, VerifyError, unknown_name
from fxopt.graph_module import GraphModule
from fxopt.objective import each_batch, inputs_of
from fxopt.rewrite import Rewriter, fuel
from fxopt.story import Verification
from fxopt.verify import compare, runner, seeded

aten = torch.ops.aten
IMPORTANCES = ("influence", "norm")


@dataclass(frozen=True)
class BlockScore:
    """A residual block that was found: how much it matters, and whether it went."""

    name: str
    score: float
    removed: bool


@dataclass(frozen=True)
class BlockRecord:
    """What one removal of blocks did, in the graph's order; print it."""

    importance: str
    blocks: tuple[BlockScore, ...]
    error: float
    bound: float

    def __str__(self) -> str:
        gone = sum(block.removed for block in self.blocks)
        lines = [f"residual blocks: {gone} of {len(self.blocks)} removed, by {self.importance}"]
        width = max((len(block.name) for block in self.blocks), default=0)
        lines += [
            f"  {block.name:{width}}  {block.score:.4f}{'  removed' if block.removed else ''}"
            for block in self.blocks
        ]
        if gone:
            lines.append(
                "the original with zeros for their branches computes the same: error "
                f"{self.error:.2g} (bound {self.bound:.2g})"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class RemoveResidualBlocks:
    """Remove residual blocks by name, so many of them, or a share of them.

    blocks          name patterns: of the module that adds ("layer3.*"), of one sum in it
                    ("encoder.0#2"), or of a part that only the block uses ("encoder.*.mlp")
    count           or: how many go, the least important first
    ratio           or: the share that goes, between 0 and 1
    keep            name patterns of blocks that stay, with those around them
    importance      "influence" or "norm"
    data            batches to measure it on: inputs, or pairs (inputs, targets); None: the examples
    batches         how many of them at most
    """

    blocks: tuple[str, ...] = ()
    count: int | None = None
    ratio: float | None = None
    keep: tuple[str, ...] = ()
    importance: str = "influence"
    data: Any = None
    batches: int = 16

    name: ClassVar[str] = "remove-residual-blocks"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Remove the blocks; raise OptionError for impossible wishes, VerifyError without proof."""
        self._check()
        if graph.is_subgraph:
            return PassResult()
        found, misses = residual_blocks(graph)
        scores = _scores(graph, found, self.importance, self._batches(graph))
        chosen = self._chosen(found, scores)
        saved = graph.copy()
        rewriter = Rewriter(graph)
        # From the end, since the x of a block may be the sum of the block before it.
        removed = [i for i in chosen if rewriter.replace(found[i].sum, found[i].shortcut)]
        result = rewriter.result()
        verdict = _verified(graph, saved, {found[i].sum.name: found[i].place for i in removed})
        gone = _with_inner(found, removed)
        rows = tuple(
            BlockScore(block.name, score, here)
            for block, score, here in zip(found, scores, gone, strict=True)
        )
        error, bound = (verdict.error, verdict.bound) if verdict else (0.0, 0.0)
        record = BlockRecord(self.importance, rows[::-1], error, bound)
        return replace(result, misses=misses, details=record)

    def _check(self) -> None:
        wishes = [bool(self.blocks), self.count is not None, self.ratio is not None]
        if sum(wishes) != 1:
            raise OptionError(
                f"'{self.name}' wants one of blocks=, count= and ratio=, got {sum(wishes)} of them."
            )
        for word, value in (("blocks", self.blocks), ("keep", self.keep)):
            if isinstance(value, str):
                raise OptionError(f"{word} is a tuple of name patterns: {word}=({value!r},).")
        if self.importance not in IMPORTANCES:
            raise unknown_name("importance of blocks", self.importance, IMPORTANCES)
        if self.ratio is not None and not 0 <= self.ratio <= 1:
            raise OptionError(f"ratio is a share between 0 and 1, not {self.ratio!r}.")
        if self.count is not None and self.count < 0:
            raise OptionError(f"count is a number of blocks, not {self.count!r}.")
        if self.batches < 1:
            raise OptionError(f"batches is a number of batches, at least 1, not {self.batches!r}.")

    def _batches(self, graph: GraphModule) -> Iterable[Sequence[Any]]:
        """Yield flat inputs to measure on."""
        signature = graph.info.signature
        assert signature is not None
        if self.data is None:
            yield graph.info.example_inputs
            return
        for batch in islice(each_batch(self.data), self.batches):
            inputs = inputs_of(batch)
            flat = signature.flatten(inputs.args, inputs.kwargs)
            signature.check(flat)
            yield flat

    def _chosen(self, found: Sequence[ResidualBlock], scores: Sequence[float]) -> list[int]:
        """Return the blocks to remove, without those inside others of them."""
        kept = _with_outer(found, _matching(found, self.keep))
        free = [index for index in range(len(found)) if index not in kept]
        if self.blocks:
            wanted = _matching(found, self.blocks)
            chosen = {index for index in free if index in wanted}
        else:
            count = self.count
            if count is None:
                count = min(math.floor((self.ratio or 0) * len(found) + 0.5), len(free))
            if count > len(free):
                raise OptionError(
                    f"count={count}, but the graph has {len(found)} residual blocks, of which "
                    f"{len(kept)} are kept."
                )
            chosen = set(sorted(free, key=lambda index: scores[index])[:count])
        inside = _with_inner(found, chosen)
        return [
            index
            for index in sorted(chosen)
            if (outer := found[index].outer) is None or not inside[outer]
        ]


def _matching(found: Sequence[ResidualBlock], patterns: Sequence[str]) -> set[int]:
    """Return the blocks that any pattern names; raise OptionError for one that names none."""
    matched: set[int] = set()
    for pattern in patterns:
        here = {
            index
            for index, block in enumerate(found)
            if any(fnmatchcase(name, pattern) for name in block.names)
        }
        if not here:
            raise unknown_name("residual block", pattern, [block.name for block in found])
        matched |= here
    return matched


def _with_outer(found: Sequence[ResidualBlock], some: set[int]) -> set[int]:
    """Add the blocks around some blocks; outer ones have smaller indices."""
    result = set(some)
    for index in range(len(found) - 1, -1, -1):
        outer = found[index].outer
        if index in result and outer is not None:
            result.add(outer)
    return result


def _with_inner(found: Sequence[ResidualBlock], some: Iterable[int]) -> list[bool]:
    """Return for each block whether it is one of some, or stands inside one."""
    result = [False] * len(found)
    for index in some:
        result[index] = True
    for index, block in enumerate(found):
        if block.outer is not None and result[block.outer]:
            result[index] = True
    return result


# -- how much a block matters ----------------------------------------------------------------------


def _scores(
    graph: GraphModule,
    found: Sequence[ResidualBlock],
    importance: str,
    batches: Iterable[Sequence[Any]],
) -> list[float]:
    """Return the score of each block over all batches; infinite where it is not a number."""
    if not found:
        return []
    totals = torch.zeros(len(found), 2, dtype=torch.float64)
    graph = graph.copy()  # with a state of its own
    nodes = {node.name: node for node in graph.graph.nodes}
    places = {nodes[block.sum.name]: (i, block.place) for i, block in enumerate(found)}
    for flat in batches:
        with torch.no_grad():
            seeded(lambda values: _Measuring(graph, places, importance, totals).run(*values), flat)
    means = totals[:, 0] / totals[:, 1]
    return [float(score) for score in means.nan_to_num(nan=math.inf)]


class _Measuring(fx.Interpreter):
    """Runs a graph and adds up, for each sum, its scores and their number."""

    def __init__(
        self,
        graph: GraphModule,
        places: Mapping[fx.Node, tuple[int, int]],
        importance: str,
        totals: torch.Tensor,
    ) -> None:
        super().__init__(graph)
        self._constant = graph.constant
        self._places, self._importance, self._totals = places, importance, totals

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Fetch a constant, whatever its name."""
        return self._constant(str(target))

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; at a block's sum, compare it with the block's input."""
        y = super().run_node(n)
        if n in self._places:
            index, place = self._places[n]
            args, _ = self.fetch_args_kwargs_from_env(n)
            scores = _score(self._importance, _vectors(args[place]), _vectors(y))
            self._totals[index] += torch.tensor([scores.sum().item(), scores.numel()])
        return y


def _vectors(value: torch.Tensor) -> torch.Tensor:
    """Return [vectors, features] in float64: one vector per token, or else per sample."""
    value = value.detach().double().cpu()
    if value.dim() == 3:
        return value.flatten(0, 1)
    return value.reshape(value.shape[0] if value.dim() > 1 else 1, -1)


def _score(importance: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if importance == "influence":
        return 1 - torch.nn.functional.cosine_similarity(x, y, dim=1, eps=1e-30)
    return (y - x).norm(dim=1) / x.norm(dim=1)


# -- the proof -------------------------------------------------------------------------------------


def _verified(
    graph: GraphModule, saved: GraphModule, sums: Mapping[str, int]
) -> Verification | None:
    """Compare with the original whose branches are zero; put it back and raise where it differs."""
    if not sums:
        return None
    reference = _without_branches(saved, sums)
    try:
        verdict = _compared(
            retarget(graph, dtype=torch.float64), retarget(reference, dtype=torch.float64)
        )
    except RuntimeError:  # an operator without a float64 kernel
        verdict = _compared(graph, reference)
    if not verdict.passed:
        graph.become(saved)
        raise VerifyError(
            f"Without {len(sums)} residual blocks the graph is not the original with zeros for "
            f"their branches: max |Δ| / max |reference| is {verdict.error:.3g}, and the bound is "
            f"{verdict.bound:.3g}. This is a bug of 'remove-residual-blocks', unless the model is "
            "random. The graph is as it was."
        )
    return verdict


def _compared(graph: GraphModule, reference: GraphModule) -> Verification:
    inputs = [reference.info.example_inputs]
    what = "the original with zeros for branches"
    return compare(what, runner(graph), runner(reference), reference, inputs, None)


def _without_branches(graph: GraphModule, sums: Mapping[str, int]) -> GraphModule:
    """Return a copy that computes everything, and adds zeros in these sums."""
    graph = graph.copy()
    with fuel(None):  # this is no rewrite of the graph that is optimized
        rewriter = Rewriter(graph)
        for node in graph.find(aten.add.Tensor):
            if node.name in sums:
                branch = 1 - sums[node.name]
                zeros = rewriter.insert(aten.zeros_like.default, node.args[branch], before=node)
                args = tuple(zeros if i == branch else arg for i, arg in enumerate(node.args))
                rewriter.update(node, args)
        rewriter.result()
    return graph
