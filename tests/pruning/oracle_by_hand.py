"""An oracle for pruning that knows nothing of channels: what is removed is NaN, and NaN spreads.

Every removed entry of every constant becomes NaN, and the original graph runs in float64. A NaN
then marks whatever was computed from what is gone, through any activation, norm, view or
permutation, with no analysis of ours: PyTorch's own kernels move it. Only where terms are summed
does a rule say what pruning means:

    a sum over products (linear, conv, matmul, einsum, attention, sum) goes over its known terms,
    and is unknown where a weight has no known term left for it (a removed row), or where no term of
    a sum over activations is known (a removed head).

So a removed channel counts as zero at the input of each contraction, and nowhere else: behind a
sigmoid, too, where zero weights would leave one half. The pruned graph must compute these numbers;
no NaN may reach an output (`leaks`), and no layer may read one through a column that it kept
(`disagreements`): either would be a kept value that depends on a removed channel.

It catches: columns of a reader that are not those of the removed channels (the kept ones then meet
the wrong channels, and `disagreements` names the layer), a bias, norm or table cut at other places,
a removed channel that something else still reads, an operator that looks at all channels.

It cannot judge: what computes with the number of channels (behind a mean or a layer norm over
channels all is unknown, although a pass may well define it as a mean over the rest); comparisons,
whose False carries no NaN; integers, which have none; a group of a convolution that lost all its
inputs and kept its rows (taken as its bias); whether *good* channels were removed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxopt.dialect import retarget
from fxopt.graph_module import GraphModule

aten = torch.ops.aten
# Of a constant: the indices along each dimension, or a mask of its entries.
Cut = Mapping[int, Sequence[int]] | torch.Tensor
Removed = Mapping[str, Cut]  # by the name of a constant, or of a node that computes a weight
NAN = float("nan")


@dataclass
class Verdict:
    """What the oracle computed: flat outputs in float64, and where readers disagree with them."""

    outputs: list[torch.Tensor]
    disagreements: list[str] = field(default_factory=list)

    @property
    def leaks(self) -> int:
        """How many elements of outputs depend on what was removed."""
        return sum(int(out.isnan().sum()) for out in self.outputs if out.is_floating_point())

    def error(self, found: Sequence[torch.Tensor]) -> float:
        """Return max |found − expected| / max |expected|; infinite for a leak or another shape."""
        if self.leaks or len(found) != len(self.outputs):
            return float("inf")
        worst = 0.0
        for ours, theirs in zip(found, self.outputs, strict=True):
            if ours.shape != theirs.shape:
                return float("inf")
            scale = max(theirs.double().abs().max().item(), 1e-30) if theirs.numel() else 1.0
            distance = (ours.double() - theirs.double()).abs()
            worst = max(worst, distance.max().item() / scale if theirs.numel() else 0.0)
        return worst


def judge(graph: GraphModule, removed: Removed, inputs: Sequence[Any]) -> Verdict:
    """Run the original graph without what was removed, on flat inputs, in float64."""
    wide = retarget(graph, dtype=torch.float64)
    run = _WithUnknowns(wide, removed)
    flat = [
        value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for value in inputs
    ]
    with torch.no_grad():
        outputs = run.run(*flat)
    return Verdict(list(outputs), run.disagreements)


def removed_entries(original: GraphModule, pruned: GraphModule) -> dict[str, torch.Tensor]:
    """Return which entries of each constant are gone, as what became of it says; this is no report.

    The recipes of the pruned graph's constants are replayed on the numbers of the entries. A recipe
    that does more than pick entries stands for a node of the original that computes a weight from
    others: the one that has these values. Raises AssertionError where a constant was cut in two
    different ways, or no node has these values.
    """
    values = dict(original.constants())
    roots = {name: name for name in values}
    numbers = {name: _numbers(value) for name, value in values.items()}
    live = set(pruned.constants())
    found: dict[str, torch.Tensor] = {}
    for recipe in pruned.info.recipes:
        with torch.no_grad():
            value = recipe.compute(*(values[source] for source in recipe.sources))
        values[recipe.name] = value
        if not value.is_floating_point() or not recipe.sources:
            continue  # an index or a mask, made anew
        source, picked = recipe.sources[0], None
        if len(recipe.sources) == 1:
            picked = recipe.compute(numbers[source])
        if picked is None or not torch.isin(picked, numbers[source]).all():
            numbers[recipe.name] = _numbers(value)
            roots[recipe.name] = _computed_weight(original, value)
            continue
        numbers[recipe.name], roots[recipe.name] = picked, roots[source]
        if recipe.name in live:
            name = roots[source]
            root = next(one for one, of in roots.items() if of == name)
            gone = ~torch.isin(numbers[root], picked)
            assert name not in found or torch.equal(found[name], gone), f"{name} has two cuts"
            found[name] = gone
    return found


def _numbers(value: torch.Tensor) -> torch.Tensor:
    """Return the numbers of the entries, from a range that weights do not reach."""
    return torch.arange(value.numel(), dtype=torch.float64).reshape(value.shape) + 1000


def _computed_weight(graph: GraphModule, value: torch.Tensor) -> str:
    """Return the name of the node that computes this from constants alone."""
    known: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            known[node] = graph.value(node)
        elif node.op == "call_function" and all(one in known for one in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    same = [
        node.name
        for node, one in known.items()
        if isinstance(one, torch.Tensor) and one.shape == value.shape and torch.allclose(one, value)
    ]
    assert same, "a constant of the pruned graph is computed from others in a way of its own"
    return same[-1]


class _WithUnknowns(fx.Interpreter):
    """Runs a graph node by node on values of which some are NaN, that is, unknown."""

    def __init__(self, graph: GraphModule, removed: Removed) -> None:
        super().__init__(graph)
        self.graph_module = graph
        self.removed = removed
        self.disagreements: list[str] = []

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        value = super().run_node(n)
        cut = self.removed.get(n.name) if n.op == "call_function" else None
        return value if cut is None else value.masked_fill(cut, NAN)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = self.graph_module.constant(str(target))
        cut = self.removed.get(str(target))
        if cut is None or not value.is_floating_point():
            return value
        if isinstance(cut, torch.Tensor):
            return value.detach().masked_fill(cut, NAN)
        value = value.detach().clone()
        for dim, indices in cut.items():
            value.index_fill_(dim, torch.as_tensor(indices, dtype=torch.int64), NAN)
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        handler = _CONTRACTIONS.get(target)
        if handler is None:
            return super().call_function(target, args, kwargs)
        return handler(self, target, args, kwargs)

    def note(self, x: torch.Tensor, dim: int, columns: torch.Tensor) -> None:
        """Compare which channels of x are unknown with which columns of their reader are.

        A channel of zeros may go: attention to added zeros is all that a removed head leaves.
        """
        kept = ~_any_of(x, dim) & (x != 0).movedim(dim, 0).reshape(x.shape[dim], -1).any(1)
        for words, which in (
            ("reads removed channels", _all_of(x, dim) & ~columns),
            ("has lost the columns of kept channels", columns & kept),
        ):
            if which.any():
                places = which.nonzero().flatten().tolist()
                self.disagreements.append(f"{self.node.name} {words}: {places}")


def _zero(value: torch.Tensor) -> torch.Tensor:
    return value.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def _known(value: torch.Tensor) -> torch.Tensor:
    return (~value.isnan()).to(value.dtype)


def _all_of(value: torch.Tensor, dim: int) -> torch.Tensor:
    """Whether all elements of each slice along `dim` are unknown."""
    return value.isnan().movedim(dim, 0).reshape(value.shape[dim], -1).all(1)


def _any_of(value: torch.Tensor, dim: int) -> torch.Tensor:
    """Whether any element of each slice along `dim` is unknown."""
    return value.isnan().movedim(dim, 0).reshape(value.shape[dim], -1).any(1)


def _mask(value: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
    """Make unknown what no known term contributed to."""
    return torch.where(terms == 0, torch.full_like(value, NAN), value)


def _linear(run: _WithUnknowns, target: Any, args: Any, kwargs: Any) -> torch.Tensor:
    x, weight, bias = args
    rows = _all_of(weight, 0)
    if not rows.all():
        run.note(x, -1, _all_of(weight[~rows], 1))
    y = target(_zero(x), _zero(weight), None)
    y = torch.where(rows, torch.full_like(y, NAN), y)
    return y if bias is None else y + bias


def _convolution(transposed: bool, groups_at: int) -> Callable[..., torch.Tensor]:
    def handler(run: _WithUnknowns, target: Any, args: Any, kwargs: Any) -> torch.Tensor:
        x, weight, bias, *rest = args
        groups = args[groups_at]
        places = weight.dim() - 2
        taps = _known(weight).flatten(2).amax(2)  # whether any tap of an entry is known
        if transposed:  # [inputs, outputs / groups]
            rows = taps.unflatten(0, (groups, -1)).amax(1).flatten() == 0
        else:
            rows = taps.amax(1) == 0
        channel_dim = x.dim() - places - 1
        if groups == 1 and not rows.all():
            kept = weight[:, ~rows] if transposed else weight[~rows]
            run.note(x, channel_dim, _all_of(kept, 0 if transposed else 1))
        y = target(_zero(x), _zero(weight), None, *rest)
        shape = (-1, *[1] * places)
        y = torch.where(rows.view(shape), torch.full_like(y, NAN), y)
        return y if bias is None else y + bias.view(shape)
    return handler


def _is_weight(node: Any) -> bool:
    """Whether a value is computed from constants alone."""
    pending, seen = [node], set()
    while pending:
        one = pending.pop()
        if not isinstance(one, fx.Node) or one in seen:
            continue
        if one.op == "placeholder":
            return False
        seen.add(one)
        pending += one.all_input_nodes
    return isinstance(node, fx.Node)


def _product(*places: int, base: int | None = None) -> Callable[..., torch.Tensor]:
    """A product of the operands at `places`, to which the one at `base` is added."""
    def handler(run: _WithUnknowns, target: Any, args: Any, kwargs: Any) -> torch.Tensor:
        values, terms = list(args), list(args)
        constant = [_is_weight(run.node.args[place]) for place in places]
        for place, is_weight in zip(places, constant, strict=True):
            values[place] = _zero(args[place])
            # A weight decides alone which of its rows are gone.
            decides = is_weight or not any(constant)
            terms[place] = _known(args[place]) if decides else torch.ones_like(args[place])
        if base is None:
            return _mask(target(*values, **kwargs), target(*terms, **kwargs))
        values[base] = terms[base] = torch.zeros_like(args[base])
        beta = kwargs.get("beta", 1)
        return _mask(target(*values, **kwargs), target(*terms, **kwargs)) + beta * args[base]
    return handler


def _einsum(run: _WithUnknowns, target: Any, args: Any, kwargs: Any) -> torch.Tensor:
    equation, operands, *rest = args
    constant = [_is_weight(one) for one in run.node.args[1]]
    terms = [
        _known(one) if is_weight or not any(constant) else torch.ones_like(one)
        for one, is_weight in zip(operands, constant, strict=True)
    ]
    return _mask(
        target(equation, [_zero(one) for one in operands], *rest), target(equation, terms, *rest)
    )


def _attention(run: _WithUnknowns, target: Any, args: Any, kwargs: Any) -> torch.Tensor:
    q, k, v, mask, *rest = args
    bias = _zero(mask) if isinstance(mask, torch.Tensor) and mask.is_floating_point() else mask
    y = target(_zero(q), _zero(k), _zero(v), bias, *rest, **kwargs)
    terms = target(
        torch.zeros_like(_zero(q)), torch.zeros_like(_zero(k)), _known(v), None, 0.0, False,
        **kwargs,
    )
    return _mask(y, terms)


def _sum(run: _WithUnknowns, target: Any, args: Any, kwargs: Any) -> torch.Tensor:
    x, *rest = args
    if not x.is_floating_point():
        return target(x, *rest, **kwargs)
    return _mask(target(_zero(x), *rest, **kwargs), target(_known(x), *rest, **kwargs))


def _recurrent(run: _WithUnknowns, target: Any, args: Any, kwargs: Any) -> Any:
    """Units whose rows are gone are unknown in what leaves; inside, nobody reads them."""
    x, state, weights, has_biases, layers, _, _, is_bidirectional, _ = args
    states = [_zero(one) for one in state] if isinstance(state, list) else _zero(state)
    found = target(_zero(x), states, [_zero(one) for one in weights], *args[3:], **kwargs)
    per_layer = 4 if has_biases else 2
    if len(weights) != per_layer * layers * (2 if is_bidirectional else 1):
        return target(*args, **kwargs)  # projected: nothing is ever removed
    recurrent = weights[1::per_layer]  # one for each layer and direction, as states stand
    gone = torch.stack([_all_of(w, 0).view(-1, w.shape[1]).all(0) for w in recurrent])
    last = gone[-2:].reshape(-1) if is_bidirectional else gone[-1]
    output = torch.where(last, torch.full_like(found[0], NAN), found[0])
    rest = [torch.where(gone[:, None], torch.full_like(one, NAN), one) for one in found[1:]]
    return (output, *rest)


_CONTRACTIONS: dict[Any, Callable[..., torch.Tensor]] = {
    aten.linear.default: _linear,
    aten.conv1d.default: _convolution(False, 6),
    aten.conv2d.default: _convolution(False, 6),
    aten.conv3d.default: _convolution(False, 6),
    aten.conv_transpose1d.default: _convolution(True, 6),
    aten.conv_transpose2d.input: _convolution(True, 6),
    aten.conv_transpose3d.input: _convolution(True, 6),
    aten.matmul.default: _product(0, 1),
    aten.mm.default: _product(0, 1),
    aten.bmm.default: _product(0, 1),
    aten.addmm.default: _product(1, 2, base=0),
    aten.baddbmm.default: _product(1, 2, base=0),
    aten.einsum.default: _einsum,
    aten.scaled_dot_product_attention.default: _attention,
    aten.lstm.input: _recurrent,
    aten.gru.input: _recurrent,
    aten.rnn_tanh.input: _recurrent,
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
}
