"""What a graph computes whatever its inputs are: channels that are zero, or another constant.

An abstract interpretation (Cousot & Cousot, POPL 1977): each value is followed as the numbers that
are known of it, and everything else is unknown. The sources are constants, what is multiplied by 0,
a batch norm whose scale is 0 (then it is its shift) and rows of weights that are 0 (then it is
their bias). Elementwise calls run on what is known, data movement moves it, pools and means keep
it, and a contraction whose weights are 0 wherever its input is unknown is known in turn.

Assumed is that activations are finite, as anywhere a product with 0 is folded: 0 · ∞ is NaN.
Each node is visited once. Along dimensions in which nothing varies (the batch, places in an image)
one element stands for all, so that sizes may be symbolic and nothing large is computed.
"""

from __future__ import annotations

from fxopt.pruning.constancy import elementwise, layers, moves, reductions
from fxopt.pruning.constancy.known import Constancy, Known

_EVALUATED = (elementwise, layers, moves, reductions)  # importing them registers the operators
__all__ = ["Constancy", "Known"]
