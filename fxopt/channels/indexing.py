"""Picking by index: known places move identities, others freeze them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from fxopt.channels.follower import Along, Follower, arguments, follows
from fxopt.channels.partition import Ids
from fxopt.graph_module import GraphModule
from fxopt.shapes import is_tensor, rank_of

aten = torch.ops.aten


@follows(aten.index_select.default)
def _index_select(follow: Follower, node: fx.Node) -> Along:
    x, dim, index = arguments(node)
    return _picked(follow, node, follow.of(x), dim, index)


@follows(aten.index.Tensor)
def _index(follow: Follower, node: fx.Node) -> Along:
    x, indices = arguments(node)
    along = follow.of(x)
    given = [dim for dim, index in enumerate(indices) if index is not None]
    if len(given) == 1 and not _is_mask(indices[given[0]]):
        return _picked(follow, node, along, given[0], indices[given[0]])
    for dim in given:
        follow.freeze(node, along[dim], "they are picked by an index")
    if given != list(range(given[0], given[-1] + 1)) or any(_is_mask(indices[d]) for d in given):
        return follow.unknown(node, "it is not known how channels pass through this index")
    inner = rank_of(node) - (len(along) - len(given))
    return (*along[: given[0]], *[None] * inner, *along[given[-1] + 1 :])


def _is_mask(index: Any) -> bool:
    return is_tensor(index) and index.meta["val"].dtype in (torch.bool, torch.uint8)


def _picked(follow: Follower, node: fx.Node, along: Along, dim: Any, index: Any) -> Along:
    """Pick along one dimension: known places move identities, others freeze them."""
    ids, places = along[dim], known_indices(follow.graph, index)
    if ids is None:
        picked: Ids | None = None
    elif places is None or len(places) < 2:
        follow.freeze(node, ids, "they are picked by an index that is known only when it runs")
        picked = None
    else:
        picked = ids[places]
    inner = (None,) * rank_of(index) if picked is None else (picked,)
    return (*along[:dim], *inner, *along[dim + 1 :])


def known_indices(graph: GraphModule, index: Any) -> Ids | None:
    """Return the places of a one-dimensional index that is a constant; None where it is not."""
    source = index_source(index)
    if source is None or source.target in graph.info.mutated or rank_of(index) != 1:
        return None
    places = graph.value(source).detach()
    if places.dtype not in (torch.int64, torch.int32):
        return None
    return np.asarray(places.cpu().numpy(), np.int64)


def index_source(index: Any) -> fx.Node | None:
    """Return the constant that an index is, or is a copy of."""
    copies = (aten.clone.default, aten.alias.default, aten.contiguous.default, aten.detach.default)
    while isinstance(index, fx.Node) and index.target in copies:
        index = index.args[0]
    return index if isinstance(index, fx.Node) and index.op == "get_attr" else None
