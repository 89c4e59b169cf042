"""Formulas of reductions, scans, sorting and scattered sums."""

from __future__ import annotations

import math

from fxopt.cost.call import Call, Size, largest, log2
from fxopt.cost.formula import Work, formula, reduction

# What PyTorch does not mark as a reduction, as it does sum, amax, argmax, any and their kin.
formula(
    "bincount", "col2im", "cummax", "cummin", "cumprod", "cumsum", "histc", "sum_to_size", "trace"
)(reduction)


@formula("mean", "nanmean")
def mean(call: Call) -> Work:
    """One per input element, and the division per output element."""
    return Work(0, call.first_elements + call.out_elements)


@formula("var", "std", "var_mean", "std_mean")
def variance(call: Call) -> Work:
    """4 per input element: mean, x − μ, square, sum; 3 per output element."""
    return Work(0, 4 * call.first_elements + 3 * call.out_elements)


@formula("norm", "linalg_vector_norm", "linalg_norm", "frobenius_norm", "dist")
def norm(call: Call) -> Work:
    """2 per input element: power and sum; the root per output element."""
    return Work(0, 2 * call.first_elements + call.out_elements)


@formula("logsumexp", "logcumsumexp")
def logsumexp(call: Call) -> Work:
    """4 per input element: max, x − max, exp, sum; 2 per output element."""
    return Work(0, 4 * call.first_elements + 2 * call.out_elements)


@formula("softmax", "_softmax", "_safe_softmax")
def softmax(call: Call) -> Work:
    """5 per element: max, x − max, exp, sum, ÷."""
    return Work(0, 5 * call.out_elements)


@formula("log_softmax", "_log_softmax")
def log_softmax(call: Call) -> Work:
    """5 per element: max, x − max, exp, sum, −; one logarithm per row."""
    rows = [n for at, n in enumerate(call.out_shape) if at != call["dim"]]
    return Work(0, 5 * call.out_elements + math.prod(rows))


@formula("sort", "argsort", "topk", "kthvalue", "median", "nanmedian", "msort", "mode")
@formula("quantile", "nanquantile", "_unique2", "unique_dim")
def sorting(call: Call) -> Work:
    """n · ⌈log₂ n⌉ comparisons for each row of n."""
    length = _length(call)
    return Work(0, call.first_elements * log2(length))


@formula("searchsorted", "bucketize")
def search(call: Call) -> Work:
    """⌈log₂ n⌉ comparisons per output element, in a row of n."""
    boundaries = call["sorted_sequence"] or call["boundaries"]
    return Work(0, call.out_elements * log2(call.sizes(boundaries)[-1]))


@formula("scatter_add", "scatter_reduce", "index_add", "index_reduce", "segment_reduce")
def scattered_sum(call: Call) -> Work:
    """One per element of the source."""
    source = call["src"] or call["source"] or call["data"]
    return Work(0, math.prod(call.sizes(source)))


@formula("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(call: Call) -> Work:
    """Indices × features: each row that is looked up is added once."""
    return Work(0, call.elements("indices") * call.shape("weight")[-1])


@formula("pairwise_distance")
def pairwise_distance(call: Call) -> Work:
    """4 per pair of elements: −, + ε, power, sum; the root per output element."""
    pairs = largest(call.elements("x1"), call.elements("x2"))
    return Work(0, 4 * pairs + call.out_elements)


@formula("cosine_similarity")
def cosine_similarity(call: Call) -> Work:
    """6 per pair of elements: three products, three sums; 4 per output element."""
    pairs = largest(call.elements("x1"), call.elements("x2"))
    return Work(0, 6 * pairs + 4 * call.out_elements)


@formula("cdist", "_cdist_forward", "_euclidean_dist")
def distances(call: Call) -> Work:
    """3 per pair and feature: −, power, sum; and the root per pair."""
    return Work(0, call.out_elements * (3 * call.shape("x1")[-1] + 1))


def _length(call: Call) -> Size:
    """Return the size of the dimension that a call works along; all elements without one."""
    shape = call.first
    dim = 0 if call.name == "msort" else call["dim"]
    if dim is None:
        return math.prod(shape)
    return shape[dim] if shape else 1
