"""Operators by family, the kinds that a person thinks in: pictures colour nodes by them."""

from __future__ import annotations

import re
from typing import Any

from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

# The first pattern that an operator's name begins with decides.
_NAMES = {
    "attention": r"\w*(scaled_dot_product|attention)",
    "convolution": r"\w*conv",
    "normalization": r"(batch|layer|group|instance|rms|native\w*|local_response|cudnn\w*)_norm|"
    r"normalize",
    "recurrent": r"lstm|gru|rnn",
    "contraction": r"(linear|bilinear|matmul|mm|_int_mm|bmm|mv|dot|vdot|linalg_vecdot|"
    r"linalg_multi_dot|addmm|addbmm|baddbmm|addmv|einsum|tensordot|inner|outer|ger|kron|"
    r"chain_matmul)$",
    "pooling": r"\w*pool|_?upsample|grid_sampl|interpolate|pixel_(un)?shuffle",
    "activation": r"\w*relu|gelu|silu|mish|elu|selu|celu|glu|sigmoid|tanh|softmax|log_softmax|"
    r"softplus|hardtanh|hardsigmoid|hardswish|log_sigmoid|softsign|threshold|\w*dropout|clamp|\w*shrink",
    "reduction": r"sum|mean|amax|amin|max$|min$|prod|var|std|argmax|argmin|any|all|logsumexp|topk|"
    r"m?sort|argsort|linalg_\w*norm|frobenius_norm|cdist|cumsum|cumprod|norm$|aminmax|median|mode|count_nonzero|nansum|nanmean",
    "indexing": r"embedding|index|gather|scatter|slice|select|take|masked|where|narrow|one_hot|"
    r"nonzero|searchsorted|bucketize|tril|triu",
    "shape": r"view|reshape|_unsafe_view|flatten|unflatten|permute|transpose|t$|mT|squeeze|"
    r"unsqueeze|expand|repeat|cat|concat|stack|split|chunk|unbind|movedim|contiguous|clone|roll|"
    r"flip|pad|constant_pad|as_strided|unfold|tile|getitem|to$|_to_copy|detach|alias|copy|diagonal|"
    r"channel_shuffle|sym_size|swapaxes|hsplit|vsplit|rot90|ravel|column_stack|meshgrid",
    "creation": r"arange|full|zeros|ones|empty|rand|linspace|eye|scalar_tensor|new_|bernoulli|"
    r"normal|multinomial",
}
_COMPILED = {family: re.compile(pattern) for family, pattern in _NAMES.items()}

FAMILIES = ("input", "output", "constant", *_NAMES, "control", "elementwise", "other")


def family_of(node: fx.Node | Any) -> str:
    """Return a node's family, one of FAMILIES; "elementwise" for ATen's remaining operators."""
    fixed = {"placeholder": "input", "output": "output", "get_attr": "constant"}.get(node.op)
    if fixed is not None:
        return fixed
    target: Any = node.target
    if isinstance(target, HigherOrderOperator):
        return "control"
    overload = isinstance(target, OpOverload)
    name = target._schema.name.split("::")[1] if overload else getattr(target, "__name__", "")
    for family, pattern in _COMPILED.items():
        if pattern.match(name):
            return family
    in_aten = overload and target.namespace == "aten"
    return "elementwise" if in_aten or not overload else "other"
