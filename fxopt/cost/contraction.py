"""Formulas of contractions: each product of two numbers that goes into a sum is one MAC."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from fxopt.cost.call import Call, Size, smallest
from fxopt.cost.formula import Work, formula


@formula("conv1d", "conv2d", "conv3d")
def convolution(call: Call) -> Work:
    """Output elements × (input channels / groups) × kernel elements; a bias adds one operation per
    output element. Padding counts as if it were data.
    """
    out = call.out_elements
    return Work(out * math.prod(call.shape("weight")[1:]), _bias(call, out))


@formula("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(call: Call) -> Work:
    """Input elements × (output channels / groups) × kernel elements; a bias adds one operation per
    output element.
    """
    macs = call.elements("input") * math.prod(call.shape("weight")[1:])
    return Work(macs, _bias(call, call.out_elements))


@formula("convolution", "_convolution")
def either_convolution(call: Call) -> Work:
    """As a convolution or a transposed convolution, whichever it is."""
    return (transposed_convolution if call["transposed"] else convolution)(call)


@formula("torchvision::deform_conv2d")
def deformable_convolution(call: Call) -> Work:
    """As a convolution, and 7 operations (8 with a mask) for each value that is sampled between
    four others: batch × output positions × input channels × kernel elements.
    """
    batch, _, height, width = call.out_shape
    kernel = math.prod(call.shape("weight")[2:])
    sampled = batch * height * width * call.shape("input")[1] * kernel
    work = convolution(call)
    return Work(work.macs, work.operations + sampled * (8 if call["use_mask"] else 7))


@formula("linear")
def linear(call: Call) -> Work:
    """Output elements × input features; a bias adds one operation per output element."""
    out = call.out_elements
    return Work(out * call.shape("input")[-1], _bias(call, out))


@formula("matmul", "mm", "bmm", "mv", "dot", "vdot", "_int_mm", "_scaled_mm")
@formula("_weight_int8pack_mm", "_weight_int4pack_mm")
def product(call: Call) -> Work:
    """Output elements × the length of the contracted dimension."""
    return Work(call.out_elements * call.first[-1])


@formula("addmm", "addmv", "baddbmm", "addbmm")
def product_and_sum(call: Call) -> Work:
    """The product as `matmul`; one operation per output element for the sum, and one each for a
    factor `alpha` or `beta` that is not 1.
    """
    left = call["mat1"] or call["mat"] or call["batch1"]
    right = call["mat2"] or call["vec"] or call["batch2"]
    columns = call.sizes(right)[-1] if call["vec"] is None else 1
    factors = sum(call[name] not in (1, None) for name in ("alpha", "beta"))
    return Work(math.prod(call.sizes(left)) * columns, call.out_elements * (1 + factors))


@formula("linalg_vecdot")
def vector_products(call: Call) -> Work:
    """Output elements × the length of the contracted dimension."""
    return Work(call.out_elements * call.shape("x")[call["dim"]])


@formula("linalg_multi_dot", "chain_matmul")
def product_of_many(call: Call) -> Work:
    """The products of matrices in the cheapest order (Cormen et al., "Introduction to Algorithms",
    matrix-chain multiplication).
    """
    shapes = [call.sizes(matrix) for matrix in call["tensors"] or call["matrices"]]
    sizes = [shapes[0][0] if len(shapes[0]) == 2 else 1, *(shape[-1] for shape in shapes)]
    if len(shapes[-1]) == 1:
        sizes[-2:] = [shapes[-1][0], 1]
    return Work(_cheapest(tuple(sizes)))


@functools.lru_cache(maxsize=1024)
def _cheapest(sizes: tuple[Size, ...]) -> Size:
    """Return the MACs of a chain of matrices, matrix i being sizes[i] × sizes[i + 1]."""
    if len(sizes) < 3:
        return 0
    ways = (
        _cheapest(sizes[: cut + 1]) + _cheapest(sizes[cut:]) + sizes[0] * sizes[cut] * sizes[-1]
        for cut in range(1, len(sizes) - 1)
    )
    return functools.reduce(smallest, ways)


@formula("inner")
def inner(call: Call) -> Work:
    """Elements of the left × rows of the right."""
    return Work(call.elements("self") * math.prod(call.shape("other")[:-1]))


@formula("tensordot")
def tensordot(call: Call) -> Work:
    """Elements of the left × the sizes of the right that are not contracted."""
    kept = [n for at, n in enumerate(call.shape("other")) if at not in call["dims_other"]]
    return Work(call.elements("self") * math.prod(kept))


@formula("bilinear")
def bilinear(call: Call) -> Work:
    """xᵀ · W · y for each output element: first features × (second features + 1)."""
    out = call.out_elements
    _, first, second = call.shape("weight")
    return Work(out * first * (second + 1), _bias(call, out))


@formula("scaled_dot_product_attention")
@formula("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu")
@formula("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")
def attention(call: Call) -> Work:
    """softmax(q · kᵀ · scale + mask) · v, with as many scores as queries × keys: scores × (q's
    features + v's features) MACs; 6 operations per score for scale and softmax, 7 with a mask. A
    causal mask saves nothing here.
    """
    *rows, features = call.out_shape  # those of the query's heads, which may be more than the keys'
    scores = math.prod(rows) * call.shape("key")[-2]
    masks = (call["attn_mask"], call["attn_bias"], call["is_causal"] or None)
    masked = any(mask is not None for mask in masks)
    return Work(scores * (call.shape("query")[-1] + features), scores * (7 if masked else 6))


@formula("einsum")
def einsum(call: Call) -> Work:
    """Operands are contracted from left to right, each pair at the product of the sizes of all its
    indices; an index that only one operand has, and no other needs, is summed first. A pair that
    sums over nothing is one operation per element instead.
    """
    inputs, output = _equation(call)
    sizes = _index_sizes(inputs, [call.sizes(operand) for operand in call["tensors"]])
    macs: Size = 0
    operations: Size = 0
    left: set[str] = set()
    for position, indices in enumerate(inputs):
        later = set(output).union(*inputs[position + 1 :])
        right = set(indices)
        lonely = right - later - left
        if lonely:
            operations += math.prod(sizes[index] for index in right)
            right -= lonely
        if position == 0:
            left = right
            continue
        lonely = left - later - right
        if lonely:
            operations += math.prod(sizes[index] for index in left)
            left -= lonely
        volume = math.prod(sizes[index] for index in left | right)
        summed = (left & right) - later
        macs, operations = (macs + volume, operations) if summed else (macs, operations + volume)
        left = (left | right) - summed
    return Work(macs, operations)


def _equation(call: Call) -> tuple[list[list[str]], list[str]]:
    """Return the indices of each operand and of the output; those of `...` are numbers."""
    left, arrow, right = call["equation"].replace(" ", "").partition("->")
    ranks = [len(call.sizes(operand)) for operand in call["tensors"]]
    inputs = [_indices(t, rank) for t, rank in zip(left.split(","), ranks, strict=True)]
    if arrow:
        return inputs, _indices(right, len(call.out_shape))
    every = [index for indices in inputs for index in indices]
    return inputs, [index for index in every if every.count(index) == 1 or index.isdigit()]


def _indices(text: str, rank: int) -> list[str]:
    """Split an operand's text into indices; `...` becomes "2", "1", "0", the last one "0"."""
    before, dots, after = text.partition("...")
    missing = rank - len(before) - len(after) if dots else 0
    return [*before, *map(str, reversed(range(missing))), *after]


def _index_sizes(
    inputs: Sequence[Sequence[str]], shapes: Sequence[Sequence[Size]]
) -> dict[str, Size]:
    """Return the size of each index; where an operand is broadcast, that of the others."""
    sizes: dict[str, Size] = {}
    for indices, shape in zip(inputs, shapes, strict=True):
        for index, size in zip(indices, shape, strict=True):
            if sizes.get(index, 1) == 1:
                sizes[index] = size
    return sizes


def _bias(call: Call, out: Size) -> Size:
    return out if call["bias"] is not None else 0
