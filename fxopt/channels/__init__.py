"""Channels by identity: which indices of which tensors must go together.

    partition       union-find over identities, by vectors; which are frozen, and why
    follower        one walk over a graph; what each operator does stands in elementwise,
                    contractions, norms, recurrent, moves, indexing, reshapes and images
    analysis        walks until every split has found a factor that may shrink
    families        channels that stand in the same places, so that any may go for another
    network         layers and families for networkx, and as a picture
"""

from fxopt.channels.analysis import Channels, Frozen
from fxopt.channels.groups import Appearance, Family, Member, Role
from fxopt.channels.network import channels_network, draw

__all__ = [
    "Appearance", "Channels", "Family", "Frozen", "Member", "Role", "channels_network", "draw",
]  # fmt: skip
