"""Expand scaled dot-product attention into two products and a softmax.

Before                                        After
    y = scaled_dot_product_attention(             s = matmul(q · a, permute(k)) + bias
            q, k, v, mask, scale=a)               y = where(any(mask), matmul(softmax(s), v), 0)

For what has no attention of its own, as ONNX, or none that is fast. What the parts can share with
their surroundings, they do:
    the scale goes into the weights of the layer that makes q, where there is one;
    the permute of k joins one that makes k;
    a boolean mask becomes a bias of 0 and a very low number, once for all its attentions;
    only where a mask may hide all keys of a query, that query's result is set to 0, be the mask
    boolean or of floats;
    heads that share keys and values do so by broadcasting;
    (w · v)ᵀ = vᵀ · wᵀ, where that saves a permute.
Scores are float32 for bfloat16, whose eight bits are too few for them, and for a float32 mask.

With `keep_fast`, an attention stays for which PyTorch's CPU has a fused kernel; a bias that would
keep it from that kernel, because it could be trained, is detached.

Left alone: attention with dropout; heads whose size is symbolic, without a scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.affine import Affine, fold_all
from fxopt.attention.mask_sizes import MaskSizes
from fxopt.constants import Constants
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.pattern import Match
from fxopt.rewrite import Rewriter
from fxopt.shapes import is_static_shape, rank_of, shape_of
from fxopt.values import Place, Value, values_of

aten = torch.ops.aten
_ATTENTION = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class ExpandAttention:
    """Replace scaled dot-product attention by two products and a softmax."""

    keep_fast: bool = False

    name: ClassVar[str] = "expand-attention"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Expand each attention, then let layers take in the scales that stand on their outputs."""
        rewriter = Rewriter(graph)
        expansion = _Expansion(rewriter, MaskSizes(Constants(graph)))
        for attention in graph.find(_ATTENTION):
            if attention.args[4] != 0:
                rewriter.miss(attention, "its dropout draws random numbers")
            elif attention.kwargs["scale"] is None:
                rewriter.miss(attention, "its heads have a symbolic size, and it has no scale")
            elif self.keep_fast and _is_fast(attention):
                _detach_mask(rewriter, attention)
            else:
                expansion.expand(attention)
        scales = expansion.scales
        fold_all(
            rewriter, (aten.mul.Tensor,), lambda node: _scaling(node) if node in scales else None
        )
        return rewriter.result()


def _scaling(node: fx.Node) -> Affine:
    source, number = node.args
    assert isinstance(source, fx.Node)
    return Affine(node, source, scale=lambda: torch.tensor(number, dtype=torch.float64))


class _Expansion:
    """Expands the attentions of one graph, which share masks."""

    def __init__(self, rewriter: Rewriter, sizes: MaskSizes) -> None:
        self.rewriter, self.sizes, self.constants = rewriter, sizes, sizes.constants
        self.scales: set[fx.Node] = set()  # the products of a query and its scale
        self._made: dict[Any, fx.Node] = {}

    def expand(self, attention: fx.Node) -> None:
        """Replace one attention."""
        place = Place(self.rewriter, Match((attention,), (attention,), {}), attention)
        args: Any = values_of(attention.args, place)
        q, k, v = args[:3]
        scale: Any = attention.kwargs["scale"]
        inner = torch.float32 if q.dtype is torch.bfloat16 else q.dtype
        bias, shown = self._bias(place, attention, inner)
        key = self._once(place, (k.node, "transposed"), lambda: _transposed(k))
        q, key, v = (_to(x, inner) for x in (self._scaled(place, q, scale), key, v))
        heads = _sharing(attention)
        if heads is not None:
            axis = q.ndim - 3
            q = q.unflatten(axis, heads)
            key, v = key.unsqueeze(axis + 1), v.unsqueeze(axis + 1)
            bias = _unflattened(bias, heads)
        scores = q @ key
        if bias is not None:
            scores = _to(scores, bias.dtype) + bias
        weights = _to(scores.softmax(-1), inner)
        turned = self._turned(attention) if heads is None and shown is None else None
        result = weights @ v if turned is None else _transposed(v) @ _transposed(weights)
        if heads is not None:
            result = result.flatten(q.ndim - 4, q.ndim - 3)
        result = _to(result, attention.meta["val"].dtype)
        if shown is not None:
            result = torch.where(shown, result, 0.0)
        self.rewriter.replace(turned or attention, result.node)

    def _once(self, place: Place, key: Any, make: Callable[[], Any]) -> Any:
        """Make something for the first attention that needs it, and give it to the others."""
        if key not in self._made:
            self._made[key] = make().node
        return Value(self._made[key], place)

    def _scaled(self, place: Place, q: Value, scale: float) -> Any:
        if scale == 1:
            return q
        scaled = self._once(place, (q.node, scale), lambda: q * scale)
        self.scales.add(scaled.node)
        return scaled

    def _bias(self, place: Place, attention: fx.Node, dtype: torch.dtype) -> tuple[Any, Any]:
        """Return what is added to the scores, and which queries are shown anything (None: all)."""
        args: Any = values_of(attention.args, place)
        q, k, _, mask, _, causal = args
        if causal:
            sizes = str(q.shape[-2]), str(k.shape[-2])
            return self._once(place, (*sizes, dtype), lambda: _causal(place, q, k, dtype)), None
        if mask is None:
            return None, None
        if mask.dtype is not torch.bool:
            wide = torch.float32 if dtype.itemsize < 4 and mask.dtype is torch.float32 else dtype
            mask = _without_front(mask)
            shown = self._shown_by(place, mask)
            if shown is not None:  # a softmax of −∞ alone has no gradient, whatever follows it
                mask = self._once(place, (mask.node, "0"), lambda: torch.where(shown, mask, 0.0))
            return _to(mask, wide), shown
        bias = self._once(place, (mask.node, dtype), lambda: self._bias_of(place, mask, dtype))
        if self._shows_all(mask.node):
            return bias, None
        return bias, self._once(place, (mask.node, "any"), lambda: mask.any(-1, True))

    def _bias_of(self, place: Place, mask: Any, dtype: torch.dtype) -> Any:
        if self._shows_all(mask.node):
            bias = place.rewriter.constant(
                lambda shown: torch.where(shown, 0.0, -math.inf).to(dtype), [mask.node],
                name=f"{mask.node.target}_bias", before=place.before,
            )  # fmt: skip
            return Value(bias, place)
        # half the lowest number: it hides as well as −∞, and gradients stay finite
        zero = mask.new_zeros([], dtype=dtype)
        return torch.where(mask, zero, torch.finfo(dtype).min / 2)

    def _shown_by(self, place: Place, mask: Any) -> Any:
        """Return which queries a float mask shows anything; None where it shows all of them."""
        if self.sizes.of(mask.node) < math.inf:
            return None
        if not self.constants.fixes(mask.node):
            return self._once(place, (mask.node, "any"), lambda: mask.amax(-1, True) != -math.inf)
        shown = self.constants.value(mask.node).amax(-1, keepdim=True) != -math.inf
        if bool(shown.all()):
            return None
        return self._once(place, (mask.node, "any"), lambda: Value(place.rewriter.constant(
            lambda value: value.amax(-1, keepdim=True) != -math.inf, [mask.node],
            name=f"{mask.node.target}_shown", before=place.before,
        ), place))

    def _shows_all(self, mask: fx.Node) -> bool:
        """Whether a mask is a constant that shows every query something."""
        return self.constants.fixes(mask) and bool(self.constants.value(mask).any(-1).all())

    def _turned(self, attention: fx.Node) -> fx.Node | None:
        """Return the only user of an attention, where it undoes the permute of the values."""
        users = list(attention.users)
        if len(users) == 1 and _swaps(users[0]) and _swaps(attention.args[2]):
            return users[0]
        return None


def _causal(place: Place, q: Value, k: Value, dtype: torch.dtype) -> Any:
    """−∞ above the diagonal that starts at the top left."""
    rows, columns = q.shape[-2], k.shape[-2]
    device = q.fake.device
    if isinstance(rows, int) and isinstance(columns, int):

        def compute() -> torch.Tensor:
            return torch.full((rows, columns), -math.inf, dtype=dtype, device=device).triu(1)

        bias = place.rewriter.constant(compute, [], name="causal_bias", before=place.before)
        return Value(bias, place)
    sizes = [
        x.shape[-2] if isinstance(x.shape[-2], int) else aten.sym_size.int(x, x.ndim - 2)
        for x in (q, k)
    ]
    named = {"dtype": dtype, "device": device}
    full: Any = place.insert(aten.full.default, (sizes, -math.inf), named)
    return full.triu(1)


def _to(x: Any, dtype: torch.dtype) -> Any:
    return x if x.dtype is dtype else x.to(dtype)


def _sharing(attention: fx.Node) -> list[int] | None:
    """Return [heads of the keys, queries' heads for each], where several share keys."""
    query, key = attention.args[:2]
    if not attention.kwargs["enable_gqa"]:
        return None
    heads, few = shape_of(query)[-3], shape_of(key)[-3]
    return None if few == 1 or few == heads else [few, heads // few]


def _unflattened(x: Any, heads: list[int]) -> Any:
    """Split the axis of heads of a bias, if it has one."""
    if x is None or x.ndim < 3:
        return x
    axis = x.ndim - 3
    if x.shape[axis] != 1:
        return x.unflatten(axis, heads)
    return x if all(isinstance(n, int) and n == 1 for n in x.shape[:axis]) else x.unsqueeze(axis)


def _without_front(x: Value) -> Value:
    """Return a tensor without axes of size 1 in front, which broadcasting does not need."""
    while x.target is aten.unsqueeze.default and x.node.args[1] == 0:
        x = x.args[0]
    return x


def _transposed(x: Value) -> Any:
    order = [*range(x.ndim - 2), x.ndim - 1, x.ndim - 2]
    if x.target is aten.permute.default:
        x, order = x.args[0], [x.args[1][axis] for axis in order]
    return x if order == sorted(order) else x.permute(order)


def _swaps(node: Any) -> bool:
    """Whether a call exchanges the last two axes, and nothing else."""
    if not isinstance(node, fx.Node) or node.target is not aten.permute.default:
        return False
    *front, last, first = list(node.args[1])  # type: ignore[arg-type]
    return [*front, first, last] == list(range(rank_of(node)))


# -- attention that PyTorch computes in one go -----------------------------------------------------


def _is_fast(attention: fx.Node) -> bool:
    """Whether PyTorch has a fused kernel for an attention: it is asked, with empty tensors."""
    given = [x for x in attention.args[:4] if x is not None]
    if not all(map(is_static_shape, given)):
        return True
    if any(x.meta["val"].device.type != "cpu" for x in given):  # type: ignore[union-attr]
        return True
    empty: list[Any] = [x if x is None else _empty_like(x) for x in attention.args[:4]]
    with torch.no_grad():
        rest: Any = attention.args[4:]
        named: Any = attention.kwargs
        choice = torch._fused_sdp_choice(*empty, *rest, **named)
    return choice != 0  # 0: as plain products


def _empty_like(node: Any) -> torch.Tensor:
    fake = node.meta["val"]
    return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype)


def _detach_mask(rewriter: Rewriter, attention: fx.Node) -> None:
    """PyTorch's fused kernels take no mask that requires grad."""
    mask: Any = attention.args[3]
    if mask is None or mask.op != "get_attr" or not rewriter.graph.value(mask).requires_grad:
        return
    detached = rewriter.insert(aten.detach.default, mask, before=attention)
    args = attention.args
    rewriter.update(attention, (*args[:3], detached, *args[4:]))
