"""Formulas of element-wise operators, and the list of those that compute nothing.

An operation is what a scalar machine has a name for: + − × ÷, a comparison, a root, an exponential,
a logarithm, tanh or erf. What is not listed here, and PyTorch calls pointwise, is one of these.
"""

from __future__ import annotations

from fxopt.cost.call import Call
from fxopt.cost.formula import Work, formula, nothing, pointwise

# No arithmetic, though PyTorch may call them pointwise. Views are told by their schema.
formula(
    "affine_grid_generator", "cat", "channel_shuffle", "clone", "column_stack", "complex",
    "contiguous", "copy", "copy_", "diag", "diag_embed", "dstack", "embedding", "fill", "flip",
    "gather", "hstack", "im2col", "index", "index_copy", "index_fill", "index_put", "index_select",
    "masked_fill", "masked_scatter", "masked_select", "max_unpool2d", "max_unpool3d", "meshgrid",
    "nonzero", "nonzero_static",
    "one_hot", "pad", "pixel_shuffle", "pixel_unshuffle", "positive", "put", "repeat",
    "repeat_interleave", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
    "replication_pad1d", "replication_pad2d", "replication_pad3d", "constant_pad_nd", "rot90",
    "roll", "scatter", "select_scatter", "slice_scatter", "diagonal_scatter", "as_strided_scatter",
    "stack", "take", "take_along_dim", "tile", "to", "_to_copy", "tril", "triu",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "vstack", "where", "_unsafe_index",
    "_unsafe_index_put", "_assert_tensor_metadata", "block_diag", "unfold_copy",
)(nothing)  # fmt: skip

CREATING = frozenset((
    "arange", "bernoulli", "empty", "empty_like", "empty_permuted", "empty_strided", "exponential",
    "eye", "full", "full_like", "linspace", "logspace", "multinomial", "new_empty",
    "new_empty_strided", "new_full", "new_ones", "new_zeros", "normal", "normal_functional", "ones",
    "ones_like", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm",
    "scalar_tensor", "tril_indices", "triu_indices", "uniform", "zeros", "zeros_like",
))  # fmt: skip
formula(*sorted(CREATING))(nothing)

_OPERATIONS = {
    "sigmoid": (4, "1 / (1 + exp(−x))"),
    "silu": (4, "x / (1 + exp(−x))"),
    "log_sigmoid": (4, "−log(1 + exp(−x))"),
    "mish": (5, "x · tanh(log(1 + exp x))"),
    "softplus": (6, "log(1 + exp(β x)) / β, or x above the threshold"),
    "hardsigmoid": (4, "min(max(x + 3, 0), 6) / 6"),
    "hardswish": (5, "x · min(max(x + 3, 0), 6) / 6"),
    "hardtanh": (2, "min(max(x, a), b)"),
    "elu": (4, "x, or α (exp x − 1) below 0"),
    "celu": (5, "x, or α (exp(x / α) − 1) below 0"),
    "selu": (5, "λ times elu"),
    "leaky_relu": (2, "x, or a x below 0"),
    "prelu": (2, "x, or a x below 0"),
    "rrelu": (2, "x, or a x below 0"),
    "softshrink": (2, "x ∓ λ beyond ±λ"),
    "glu": (5, "a · sigmoid(b)"),
    "logit": (3, "log(x / (1 − x))"),
    "lerp": (3, "a + w (b − a)"),
    "hypot": (4, "√(a² + b²)"),
    "linalg_cross": (3, "a b − c d"),
}  # name: operations per output element, and what they are


def _register(name: str, operations: int, words: str) -> None:
    def count(call: Call) -> Work:
        return Work(0, operations * call.out_elements)

    count.__doc__ = f"{operations} operations per output element: {words}."
    formula(name)(count)


for _name, (_operations, _words) in _OPERATIONS.items():
    _register(_name, _operations, _words)

formula("outer", "ger", "kron", "diff", "isclose")(pointwise)


@formula("add", "sub", "rsub", "__and__", "__or__", "__xor__")
def addition(call: Call) -> Work:
    """One operation per output element; two where `alpha` is not 1."""
    return Work(0, call.out_elements * (1 if call["alpha"] in (1, None) else 2))


@formula("addcmul", "addcdiv")
def scaled_addition(call: Call) -> Work:
    """Two operations per output element; three where `value` is not 1."""
    return Work(0, call.out_elements * (2 if call["value"] in (1, None) else 3))


@formula("clamp")
def clamp(call: Call) -> Work:
    """One comparison per output element and bound."""
    bounds = sum(call[name] is not None for name in ("min", "max"))
    return Work(0, call.out_elements * bounds)


@formula("gelu")
def gelu(call: Call) -> Work:
    """5 operations per output element: x · ½ (1 + erf(x / √2)); 9 in the tanh approximation."""
    return Work(0, call.out_elements * (9 if call["approximate"] == "tanh" else 5))


formula("atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "meshgrid")(nothing)


@formula("floor_divide")
def floor_division(call: Call) -> Work:
    """Two operations per output element: a quotient, rounded."""
    return Work(0, 2 * call.out_elements)


@formula("mse_loss", "l1_loss")
def distance(call: Call) -> Work:
    """Two operations per input element, and one more where they are summed up."""
    return Work(0, call.first_elements * (2 if call["reduction"] == 0 else 3))


@formula("div")
def division(call: Call) -> Work:
    """One operation per output element; two where the quotient is rounded."""
    return Work(0, call.out_elements * (1 if call["rounding_mode"] is None else 2))


@formula("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")
def dropout(call: Call) -> Work:
    """Nothing in evaluation; in training two operations per element, for mask and scale."""
    return Work(0, 2 * call.out_elements if call["train"] else 0)
