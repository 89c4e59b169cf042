"""What the analysis of channels finds: families of channels, and where each of them stands."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]


class Role(enum.Enum):
    """What a dimension of a constant is to the channels that stand along it."""

    OUTPUT = "output"  # rows of a weight that compute the channels
    INPUT = "input"  # columns of a weight that read them
    SCALE = "scale"  # a norm's weight: one factor per channel
    SHIFT = "shift"  # a bias: of a contraction or of a norm
    STATISTIC = "statistic"  # a norm's running mean or variance
    OTHER = "other"  # anything else that meets the channels: a position embedding, a table


@dataclass(frozen=True)
class Member:
    """Where the channels of a family stand along one dimension of one constant.

    `positions` has shape [channels, k]: removing channel i removes indices `positions[i]` of
    dimension `dim` (k > 1 where several indices go together, such as those of an attention head).
    """

    constant: str
    dim: int
    role: Role
    positions: Positions


@dataclass(frozen=True)
class Appearance:
    """Where the channels of a family stand along one dimension of the value of one node."""

    node: str
    dim: int
    positions: Positions


@dataclass(frozen=True)
class Family:
    """Channels that stand side by side in the same places: any one can go in place of another.

    `kind` is "heads" where each is a head of an attention, else "channels". `layers` are the module
    paths of the contractions that compute them (several where a residual sum ties them), `computed`
    the values that those contractions return.
    """

    name: str
    layers: tuple[str, ...]
    channels: int
    members: tuple[Member, ...]
    computed: tuple[Appearance, ...] = ()
    kind: str = "channels"
