"""Scaled dot-product attention, where `ExpandAttention` has left it: it cannot be said in ONNX.

Written out as products and a softmax it was measured as fast as opset 23's Attention, and runs
anywhere; and only written out it shares scales, masks and permutes with what surrounds it.
"""

from __future__ import annotations

from typing import Any, NoReturn

from fxopt.backends.onnx.emit import Emitter
from fxopt.backends.onnx.registry import emits


@emits("scaled_dot_product_attention")
def _attention(
    e: Emitter, q: Any, k: Any, v: Any, mask: Any, dropout: float, *rest: Any, **named: Any
) -> NoReturn:
    if dropout:
        e.fail("attention with dropout is random", "Call model.eval() before compiling.")
    e.fail("attention over heads of a symbolic size needs an explicit scale")
