"""The passes, and the order of the default pipeline."""

from fxopt.contract import Pass
from fxopt.passes.fold_affine import FoldAffine
from fxopt.passes.fold_constants import FoldConstants
from fxopt.passes.fuse_conv_bn import FuseConvBn
from fxopt.passes.merge_duplicates import MergeDuplicates
from fxopt.passes.remove_dead_nodes import RemoveDeadNodes
from fxopt.passes.remove_no_ops import RemoveNoOps
from fxopt.passes.simplify import Simplify

DEFAULT: tuple[Pass, ...] = (
    RemoveDeadNodes(),  # first, so that a user that nobody needs holds no fusion back
    FoldConstants(),  # weights that are computed become constants, which the folds below need
    RemoveNoOps(),  # a dropout or a clone between two layers would hide one from the other
    Simplify(),  # leaves one reshape where there were three, and one pad in the convolution
    FoldAffine(),  # before batch norms: conv → scale → batch norm becomes conv → batch norm
    FuseConvBn(),
    MergeDuplicates(),  # after the folds: a layer that two users share would not fold
    RemoveDeadNodes(),  # last: what the others left without users
)

__all__ = [
    "DEFAULT",
    "FoldAffine",
    "FoldConstants",
    "FuseConvBn",
    "MergeDuplicates",
    "RemoveDeadNodes",
    "RemoveNoOps",
    "Simplify",
]
