"""Single weights at 0: which of a tensor to keep, where such weights stand, and keeping them 0."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxopt.errors import OptionError
from fxopt.graph_module import GraphModule
from fxopt.shapes import is_tensor, rank_of

aten = torch.ops.aten
_FORWARD, _TRANSPOSED = {1: 1}, {1: 0}  # which argument is a weight: its dimension of inputs
_WEIGHTS: dict[Any, dict[int, int]] = {
    aten.linear.default: _FORWARD,
    aten.conv1d.default: _FORWARD, aten.conv1d.padding: _FORWARD,
    aten.conv2d.default: _FORWARD, aten.conv2d.padding: _FORWARD,
    aten.conv3d.default: _FORWARD, aten.conv3d.padding: _FORWARD,
    aten.conv_transpose1d.default: _TRANSPOSED,
    aten.conv_transpose2d.input: _TRANSPOSED,
    aten.conv_transpose3d.input: _TRANSPOSED,
    aten.matmul.default: {0: -1, 1: -2},
    aten.mm.default: {0: -1, 1: -2},
    aten.bmm.default: {0: -1, 1: -2},
    aten.mv.default: {0: -1},
    aten.addmm.default: {1: -1, 2: -2},
    aten.baddbmm.default: {1: -1, 2: -2},
}  # fmt: skip

_RECURRENT = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)


# -- which weights stay ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """`kept` of every `size` weights side by side along the inputs stay: written "2:4"."""

    kept: int
    size: int

    @classmethod
    def of(cls, text: str) -> Blocks:
        """Read "n:m"; raise OptionError for what is none."""
        read = re.fullmatch(r"(\d+):(\d+)", text.strip())
        if read is None or not 0 < int(read[1]) < int(read[2]):
            raise OptionError(
                f"'{text}' is no pattern of sparsity: write how many of how many weights stay, "
                "such as '2:4'."
            )
        return cls(int(read[1]), int(read[2]))

    def __str__(self) -> str:
        return f"{self.kept}:{self.size}"


def count_of(ratio: float, weights: int) -> int:
    """Return how many of so many weights a ratio sets to 0: the nearest number, a half upwards."""
    return int(ratio * weights + 0.5)


def largest(scores: torch.Tensor, removed: int) -> torch.Tensor:
    """Return a mask of the shape of `scores`: False at exactly the `removed` smallest.

    Of equal ones the first go. Takes time in proportion to the number of scores.
    """
    if removed == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    flat = scores.reshape(-1)
    limit = flat.kthvalue(removed).values
    below, equal = flat < limit, flat == limit
    room = removed - below.sum()
    goes = below | (equal & (equal.cumsum(0) <= room))
    return ~goes.reshape(scores.shape)


def largest_in_blocks(scores: torch.Tensor, blocks: Blocks, dim: int) -> torch.Tensor:
    """Return a mask that is True at the `kept` largest of each block along `dim`; equal: the first.

    Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021. The size along `dim` must be a
    multiple of the blocks' size.
    """
    moved = scores.movedim(dim, -1)
    grouped = moved.reshape(*moved.shape[:-1], -1, blocks.size)
    order = grouped.sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros_like(grouped, dtype=torch.bool)
    mask.scatter_(-1, order[..., : blocks.kept], True)
    return mask.reshape(moved.shape).movedim(-1, dim)


def masked(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return a weight with 0 where the mask is False."""
    return torch.where(mask.to(weight.device), weight, torch.zeros_like(weight))


def shortfall(weight: torch.Tensor, dim: int, goal: int | Blocks) -> str | None:
    """Return by how much a weight misses so many zeros, or a pattern along `dim`; None if it fits.

    Counted on the numbers alone, whatever mask made them.
    """
    if isinstance(goal, int):
        found = int((weight == 0).sum())
        return None if found >= goal else f"{found} of its weights are 0, not {goal}"
    moved = weight.movedim(dim, -1)
    filled = (moved.reshape(*moved.shape[:-1], -1, goal.size) != 0).sum(-1)
    dense = int((filled > goal.kept).sum())
    return f"{dense} blocks keep more than {goal}" if dense else None


# -- where they stand ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """A constant that contractions multiply by; `dim` is the dimension that their inputs meet."""

    name: str
    node: fx.Node
    dim: int
    layers: tuple[str, ...]  # the paths of the contractions
    obstacle: str | None = None  # why its numbers must stay

    def matches(self, pattern: str) -> bool:
        """Whether a pattern, such as `blocks.*`, fits the path of one of the layers."""
        return any(fnmatchcase(layer, pattern) for layer in self.layers)


def weights_of(graph: GraphModule) -> list[Weight]:
    """Return the weights of all convolutions, linear layers and products, in graph order."""
    found: dict[fx.Node, list[tuple[fx.Node, int]]] = {}
    for node in graph.graph.nodes:
        for place, dim in _WEIGHTS.get(node.target, {}).items():
            argument = node.args[place]
            if isinstance(argument, fx.Node) and argument.op == "get_attr" and is_tensor(argument):
                found.setdefault(argument, []).append((node, dim % max(rank_of(argument), 1)))
    return [_weight(graph, node, places) for node, places in found.items()]


def _weight(graph: GraphModule, node: fx.Node, places: Sequence[tuple[fx.Node, int]]) -> Weight:
    layers = tuple(dict.fromkeys(str(user.meta.get("path") or user.name) for user, _ in places))
    others = [user.name for user in node.users if user not in {user for user, _ in places}]
    obstacle = None
    if not (node.meta["val"].is_floating_point() or node.meta["val"].is_complex()):
        obstacle = f"it is {node.meta['val'].dtype}"
    elif rank_of(node) < 2:
        obstacle = "it is a vector"
    elif node.target in graph.info.mutated:
        obstacle = "it is state"
    elif others:
        obstacle = f"{others[0]} reads it, too, as something else than the weight of a layer"
    elif len({dim for _, dim in places}) > 1:
        obstacle = "two layers read it along different dimensions"
    return Weight(str(node.target), node, places[0][1], layers, obstacle)


def unreadable(graph: GraphModule) -> Iterator[tuple[fx.Node, str]]:
    """Yield the calls whose weights `weights_of` does not see, and why."""
    for node in graph.graph.nodes:
        if node.target in _RECURRENT:
            yield node, "the weights of recurrent layers stay dense"
        for place in _WEIGHTS.get(node.target, ()):
            argument = node.args[place]
            sources = getattr(argument, "all_input_nodes", ())
            if sources and all(source.op == "get_attr" for source in sources):
                yield node, f"its weight is computed from '{sources[0].target}' by {argument.name}"


@dataclass(frozen=True)
class Share:
    """How many of a weight's numbers are 0."""

    layers: tuple[str, ...]
    zeros: int
    weights: int

    def __str__(self) -> str:
        share = self.zeros / self.weights if self.weights else 0.0
        return f"{self.zeros:,} of {self.weights:,} weights are 0 ({share:.2%})"


@dataclass(frozen=True)
class SparsityRecord:
    """What one run made sparse; `dense` counts the weights that held it back. Print it."""

    shares: tuple[Share, ...]
    dense: int = 0

    def table(self) -> str:
        """Return a line of text for each weight."""
        names = [", ".join(share.layers) for share in self.shares]
        width = max(map(len, names), default=0)
        return "\n".join(
            f"{name:{width}}  {share}" for name, share in zip(names, self.shares, strict=True)
        )

    def __str__(self) -> str:
        whole = Share((), sum(s.zeros for s in self.shares), sum(s.weights for s in self.shares))
        layers = f"in {len(self.shares)} layers {whole}"
        return layers + (f"; {self.dense} stayed dense" if self.dense else "")


def zeros(graph: GraphModule) -> dict[str, float]:
    """Return the share of zeros in each weight of a convolution, linear layer or product."""
    return {
        weight.name: float((graph.value(weight.node).detach() == 0).double().mean())
        for weight in weights_of(graph)
        if graph.value(weight.node).numel()
    }


# -- training on -----------------------------------------------------------------------------------


class KeptZeros:
    """The zeros of some weights, as they were; `restore` sets them to 0 again."""

    def __init__(self, weights: dict[str, torch.nn.Parameter]) -> None:
        self.weights = weights
        self._gone = {name: weight.detach() == 0 for name, weight in weights.items()}

    def __len__(self) -> int:
        return len(self.weights)

    def restore(self) -> None:
        """Set to 0 whatever was 0; an optimizer from torch.optim has that done after each step."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.masked_fill_(self._gone[name].to(weight.device), 0)


@contextlib.contextmanager
def keep_zeros(graph: GraphModule, layers: Sequence[str] = ("*",)) -> Iterator[KeptZeros]:
    """Keep weights at 0 while the graph is trained inside the block.

        with keep_zeros(graph):
            for batch in data:
                ...
                optimizer.step()

    Whatever is 0 in the trainable weights of layers that match `layers` stays so: after each step
    of any optimizer of torch.optim the zeros are put back, whatever its momentum or weight decay
    did, and once more at the end. A weight that is 0 everywhere was not pruned but initialised so,
    and trains. A loop that writes weights without such an optimizer calls `restore()` itself.

    Yields the weights that are kept. Raises OptionError where no weight of these layers has zeros.
    """
    graph.own_storage()
    kept = KeptZeros(_with_zeros(graph, layers))
    if not kept:
        raise OptionError(
            f"No trainable weight of the layers {', '.join(layers)} has zeros to keep. Run the "
            "pass sparsify-weights first."
        )
    owned = {id(weight) for weight in kept.weights.values()}

    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if any(id(p) in owned for group in optimizer.param_groups for p in group["params"]):
            kept.restore()

    hook = register_optimizer_step_post_hook(after_step)
    try:
        yield kept
    finally:
        hook.remove()
        kept.restore()


def _with_zeros(graph: GraphModule, layers: Sequence[str]) -> dict[str, torch.nn.Parameter]:
    found = {}
    for weight in weights_of(graph):
        value = graph.value(weight.node)
        if isinstance(value, torch.nn.Parameter) and value.requires_grad:
            empty = value.detach() == 0
            if empty.any() and not empty.all() and any(map(weight.matches, layers)):
                found[weight.name] = value
    return found
