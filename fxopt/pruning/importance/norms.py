"""The scale of batch norms: what training with an L1 penalty on it drives to 0.

    s_c = mean |γ_c|        over the norms on the way of channel c

Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017. The
paper ranks over the whole network without normalising.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from fxopt.channels.groups import Family, Role
from fxopt.errors import FxoptError
from fxopt.graph_module import GraphModule
from fxopt.pruning.importance.members import PowerSums
from fxopt.pruning.importance.normalization import Normalized


@dataclass(frozen=True)
class BnScale(Normalized):
    """The mean absolute scale of the norms over a channel.

    A family without a norm is an error, unless `fallback` names the importance that scores it:
    "l2", an object, or a function. Its scores are normalised its own way.
    """

    normalize: str | None = field(default=None, kw_only=True)
    fallback: Any = None

    name: ClassVar[str] = "bn-scale"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fallback()

    def _fallback(self) -> Any:
        from fxopt.pruning.importance.naming import importance_of

        return None if self.fallback is None else importance_of(self.fallback)

    def scores(self, graph: GraphModule, families: Sequence[Family]) -> list[torch.Tensor]:
        """Return a float64 tensor of shape [channels] per family; see `Importance`."""
        normed = [family for family in families if _scales(family)]
        bare = [family for family in families if not _scales(family)]
        if bare and self.fallback is None:
            raise FxoptError(
                f"The importance 'bn-scale' needs a norm with a weight, and {len(bare)} of "
                f"{len(families)} families have none: {_listed(bare)}. Name what scores those: "
                "fallback='l2'. (A pass such as fuse-conv-bn removes norms: prune before it.)"
            )
        found = dict(zip(map(id, normed), super().scores(graph, normed), strict=True))
        if bare:
            found.update(zip(map(id, bare), self._fallback().scores(graph, bare), strict=True))
        return [found[id(family)] for family in families]

    def measure(self, graph: GraphModule, families: Sequence[Family]) -> list[torch.Tensor]:
        """Return mean |γ| per channel."""
        powers = PowerSums(graph, 1)
        return [powers.of(_scales(one)) / _places(one) for one in families]


def _scales(family: Family) -> list[Any]:
    return [member for member in family.members if member.role is Role.SCALE]


def _places(family: Family) -> int:
    """Return how many factors of norms each channel has."""
    return sum(member.positions.shape[1] for member in _scales(family))


def _listed(families: Sequence[Family]) -> str:
    names = [f"'{family.name}'" for family in families]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
