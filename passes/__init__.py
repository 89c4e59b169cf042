"""The passes, and the order of the default pipeline."""

from fxopt.contract import Pass
from fxopt.passes.fold_constants import FoldConstants
from fxopt.passes.merge_duplicates import MergeDuplicates
from fxopt.passes.remove_dead_nodes import RemoveDeadNodes

DEFAULT: tuple[Pass, ...] = (
    FoldConstants(),
    MergeDuplicates(),
    RemoveDeadNodes(),
)

__all__ = ["DEFAULT", "FoldConstants", "MergeDuplicates", "RemoveDeadNodes"]
