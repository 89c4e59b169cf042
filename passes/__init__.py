"""The passes, and the order of the default pipeline."""

from fxopt.contract import Pass
from fxopt.passes.expand_attention import ExpandAttention
from fxopt.passes.fold_affine import FoldAffine
from fxopt.passes.fold_constants import FoldConstants
from fxopt.passes.fold_linear_chains import FoldLinearChains
from fxopt.passes.fold_pads import FoldPads
from fxopt.passes.fold_scaled_sums import FoldScaledSums
from fxopt.passes.fuse_activations import FuseActivations
from fxopt.passes.fuse_attention import FuseAttention
from fxopt.passes.fuse_conv_bn import FuseConvBn
from fxopt.passes.fuse_norms import FuseNorms
from fxopt.passes.fuse_pixel_shuffle import FusePixelShuffle
from fxopt.passes.insert_fake_quant import InsertFakeQuant
from fxopt.passes.lower_precision import LowerPrecision
from fxopt.passes.merge_conv_branches import MergeConvBranches
from fxopt.passes.merge_duplicates import MergeDuplicates
from fxopt.passes.merge_moves import MergeMoves
from fxopt.passes.merge_parallel_layers import MergeParallelLayers
from fxopt.passes.merge_parts import MergeParts
from fxopt.passes.move_permutes import MovePermutes
from fxopt.passes.prune_channels import PruneChannels
from fxopt.passes.remove_dead_nodes import RemoveDeadNodes
from fxopt.passes.remove_expands import RemoveExpands
from fxopt.passes.remove_no_ops import RemoveNoOps
from fxopt.passes.remove_residual_blocks import RemoveResidualBlocks
from fxopt.passes.remove_zero_channels import RemoveZeroChannels
from fxopt.passes.replace_einsum import ReplaceEinsum
from fxopt.passes.replace_pools import ReplacePools
from fxopt.passes.replace_shuffles import ReplaceShuffles
from fxopt.passes.replace_slices import ReplaceSlices
from fxopt.passes.round_weights import RoundWeights
from fxopt.passes.simplify import Simplify
from fxopt.passes.sink_permutes import SinkPermutes
from fxopt.passes.sparsify_weights import SparsifyWeights

DEFAULT: tuple[Pass, ...] = (
    RemoveDeadNodes(),  # first, so that a user that nobody needs holds no fusion back
    FoldConstants(),  # weights that are computed become constants, which the folds below need
    RemoveNoOps(),  # a dropout or a clone between two layers would hide one from the other
    ReplaceEinsum(),  # before all that looks for matrix products
    RemoveExpands(),
    FuseActivations(),  # before chains are simplified: x + 1 + 3 is no argument of hardsigmoid
    FuseNorms(),  # before the folds: they would take the weight of a norm in pieces for a scale
    Simplify(),  # leaves one reshape where there were three, and one pad in the convolution
    FusePixelShuffle(),  # before its reshapes are merged with others
    ReplaceSlices(),
    ReplacePools(),
    SinkPermutes(),  # before the folds: a permute between two layers would hide one from the other
    FoldPads(),  # before branches: a convolution that pads by itself may be one
    MergeConvBranches(),  # before the folds: of a batch norm over a sum, it leaves one layer
    FoldAffine(),  # before batch norms: conv → scale → batch norm becomes conv → batch norm
    FuseConvBn(),
    FoldScaledSums(),  # when each term of a sum is a layer without a norm of its own
    FoldLinearChains(),  # when the scales and norms between two layers are gone
    MovePermutes(),  # when what two linear layers share is a plain permute
    MergeParts(),
    MergeMoves(),  # when the norms between two reshapes are gone, and selections are splits
    ReplaceShuffles(),  # of moves that are as few as they get
    FuseAttention(),  # after moves: it turns keys and values as their layer left them
    MergeDuplicates(),  # after the folds: a layer that two users share would not fold
    RemoveDeadNodes(),  # last: what the others left without users
)

__all__ = [
    "DEFAULT",
    "ExpandAttention",
    "FoldAffine",
    "FoldConstants",
    "FoldLinearChains",
    "FoldPads",
    "FoldScaledSums",
    "FuseActivations",
    "FuseAttention",
    "FuseConvBn",
    "FuseNorms",
    "FusePixelShuffle",
    "InsertFakeQuant",
    "LowerPrecision",
    "MergeConvBranches",
    "MergeDuplicates",
    "MergeMoves",
    "MergeParallelLayers",
    "MergeParts",
    "MovePermutes",
    "PruneChannels",
    "RemoveDeadNodes",
    "RemoveExpands",
    "RemoveNoOps",
    "RemoveResidualBlocks",
    "RemoveZeroChannels",
    "ReplaceEinsum",
    "ReplacePools",
    "ReplaceShuffles",
    "ReplaceSlices",
    "RoundWeights",
    "Simplify",
    "SinkPermutes",
    "SparsifyWeights",
]
