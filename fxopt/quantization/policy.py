"""What the integer kernels of an engine read and write: where fake-quants belong, as a table.

An engine is not made faster by rounding, but by kernels that read integers, and slower by each
conversion in between. So a policy names the calls that have such kernels, and what these kernels
take in on the way to their result.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxopt.errors import OptionError, unknown_name
from fxopt.naming import operators
from fxopt.quantization.scheme import Scheme

_CONVOLUTIONS = operators("conv1d conv2d conv3d")
_TRANSPOSED = operators("conv_transpose1d conv_transpose2d conv_transpose3d")
_PRODUCTS = operators("matmul bmm mm")
_POOLS = operators("mean avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d")
_CLAMPS = operators("relu relu6 hardtanh clamp clamp_min")
_ACTIVATIONS = _CLAMPS | operators("""
    hardswish hardsigmoid sigmoid tanh silu gelu elu leaky_relu mish softplus
""")

# What has weights, and kernels of integers in some engine or other.
LAYERS = _CONVOLUTIONS | _TRANSPOSED | operators("""
    convolution linear addmm lstm gru rnn_tanh rnn_relu
""")
# The same numbers at other places: rounded before, they are rounded behind.
MOVES = operators("""
    alias clone contiguous view reshape flatten unflatten permute transpose t squeeze unsqueeze
    expand expand_as select slice narrow split split_with_sizes chunk unbind flip roll index_select
    repeat tile pixel_shuffle pixel_unshuffle channel_shuffle constant_pad_nd pad
    reflection_pad1d reflection_pad2d reflection_pad3d
    replication_pad1d replication_pad2d replication_pad3d
    max_pool1d max_pool2d max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d
""")
# Numbers of several tensors, side by side: those must share a scale.
JOINS = operators("cat stack")


AFFINE = Scheme(symmetric=False, signed=False)
PER_CHANNEL = Scheme(symmetric=True, signed=True, per_channel=True)


@dataclass(frozen=True)
class Policy:
    """Where an engine computes on integers.

    layers      calls with a constant weight whose kernels read integers
    products    products of two activations whose kernels do
    reads       other calls with a kernel for integers, where all that they read can be had as such
    absorbs     what the kernel before it computes on its way out, before it rounds; "aten::add" of
                a second tensor stands for the residual sum
    rounds      layers and calls whose kernels return integers only, whoever reads them
    centered    calls whose kernels take the zero point 0 only
    """

    name: str
    layers: frozenset[str]
    products: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    absorbs: frozenset[str] = frozenset()
    rounds: frozenset[str] = frozenset()
    centered: frozenset[str] = frozenset()
    activations: Scheme = AFFINE
    weights: Scheme = PER_CHANNEL


POLICIES = {
    policy.name: policy
    for policy in (
        # ONNX Runtime: QLinearConv, QLinearAdd and their like read and write integers; a QGemm and
        # a MatMulIntegerToFloat may write floats. ReLU becomes the saturation of the rounding.
        Policy(
            "onnx",
            layers=_CONVOLUTIONS | operators("linear"),
            products=_PRODUCTS,
            reads=operators("add mul sigmoid leaky_relu avg_pool2d adaptive_avg_pool2d"),
            absorbs=_CLAMPS,
            rounds=_CONVOLUTIONS
            | operators("add mul sigmoid leaky_relu avg_pool2d adaptive_avg_pool2d"),
        ),
        # OpenVINO: a kernel takes in activations and sums, and rounds only what is read rounded.
        Policy(
            "openvino",
            layers=_CONVOLUTIONS | _TRANSPOSED | operators("linear"),
            products=_PRODUCTS,
            reads=operators("add mul") | _POOLS,
            absorbs=_ACTIVATIONS,
            centered=_PRODUCTS | _TRANSPOSED,
        ),
        # oneDNN from PyTorch: like OpenVINO, whose kernels are oneDNN's, but products stay float.
        Policy(
            "eager",
            layers=_CONVOLUTIONS | operators("linear"),
            absorbs=_ACTIVATIONS | operators("add"),
        ),
    )
}


def policy_of(target: str | Policy) -> Policy:
    """Return the policy of that name, or the one given; raise OptionError for another name."""
    if isinstance(target, Policy):
        return target
    if not isinstance(target, str):
        raise OptionError(f"target={target!r}: it is one of {', '.join(POLICIES)}, or a Policy.")
    if target not in POLICIES:
        raise unknown_name("engine to quantize for:", target, POLICIES)
    return POLICIES[target]
