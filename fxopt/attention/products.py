"""Products of two tensors, each read as an einsum."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from string import ascii_letters
from typing import Any

import torch
from torch import fx

from fxopt.shapes import rank_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """A product that sums over axes of two tensors; each axis bears a letter, as in an einsum."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_axes: str
    right_axes: str
    axes: str  # of the result
    scale: float = 1.0
    added: fx.Node | None = None

    def sides(self) -> tuple[tuple[fx.Node, str], tuple[fx.Node, str]]:
        """Return both operands with their axes."""
        return (self.left, self.left_axes), (self.right, self.right_axes)


def product_of(node: Any) -> Product | None:
    """Read a matmul, bmm, mm, baddbmm, addmm or einsum of two tensors."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    args: Any = node.args
    if node.target in (aten.matmul.default, aten.bmm.default, aten.mm.default):
        return _matrices(node, *args)
    if node.target in (aten.baddbmm.default, aten.addmm.default):
        product = _matrices(node, *args[1:])
        beta, alpha = node.kwargs["beta"], node.kwargs["alpha"]
        if product is None or beta not in (0, 1) or not isinstance(alpha, (int, float)):
            return None
        return replace(product, scale=float(alpha), added=args[0] if beta else None)
    if node.target is aten.einsum.default and len(args[1]) == 2:
        return _einsum(node, args[0].replace(" ", ""), *args[1])
    return None


def _matrices(node: fx.Node, left: fx.Node, right: fx.Node) -> Product | None:
    ranks = rank_of(left), rank_of(right)
    if min(ranks) < 2:
        return None
    batch = ascii_letters[: max(ranks) - 2]
    own = [batch[len(batch) - rank + 2 :] for rank in ranks]
    return Product(node, left, right, own[0] + "IK", own[1] + "KJ", batch + "IJ")


def _einsum(node: fx.Node, equation: str, left: fx.Node, right: fx.Node) -> Product | None:
    """Name the axes behind `...`, which broadcast from the right: "...ik,kj->...ij"."""
    parts = re.split(",|->", equation)
    if len(parts) != 3:
        return None
    free = "".join(letter for letter in ascii_letters if letter not in equation)
    widths = [rank_of(x) - len(part) + 3 for x, part in zip((left, right), parts, strict=False)]
    dots = [width for width, part in zip(widths, parts, strict=False) if "..." in part]
    widths.append(max(dots, default=0))
    for place, width in enumerate(widths):
        parts[place] = parts[place].replace("...", free[widths[2] - width : widths[2]])
    if any(len(set(part)) < len(part) for part in parts):
        return None  # a diagonal
    return Product(node, left, right, parts[0], parts[1], parts[2])
