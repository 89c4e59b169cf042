"""Contractions that read channels, and which of these each of them can do without."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from fxopt.channels.analysis import Channels
from fxopt.channels.follower import arguments, operand
from fxopt.channels.partition import Ids
from fxopt.pruning.constancy.layers import LAYERS, channel_dim, in_groups, inputs_of
from fxopt.pruning.constant_channels import Constancy, Known
from fxopt.pruning.mending import Mask

aten = torch.ops.aten
PRODUCTS = (
    aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.addmm.default,
    aten.baddbmm.default, aten.scaled_dot_product_attention.default,
)  # fmt: skip
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """A contraction over channels: the classes that it reads, and those that it computes."""

    node: fx.Node
    operands: tuple[tuple[fx.Node, int], ...]  # of a product, each with its dimension
    entering: Ids
    leaving: Ids | None  # of a layer


class Judgement(NamedTuple):
    """What is known of each channel that is read."""

    fine: Mask  # nothing is lost when it goes
    fold: Mask  # if what it adds is given to the bias
    heard: Mask  # a weight that is not 0 reads it
    values: Numbers  # where it is known to be a constant


def judge(reading: Reading, seen: Constancy, gone: Mask) -> Judgement:
    """Return which channels a contraction can do without, when others have gone."""
    node, count = reading.node, len(reading.entering)
    if node.target not in LAYERS:
        zero = np.zeros(count, np.bool_)
        for one_read, dim in reading.operands:
            found = seen.of(one_read)
            if found is not None:
                one = found.along(dim)
                zero |= (one.is_zero).expand(count).cpu().numpy()
        return Judgement(zero, np.zeros(count, np.bool_), ~zero, np.zeros(count))
    found, weight = seen.of(arguments(node)[0]), seen.of(arguments(node)[1])
    if weight is None or not weight.is_whole:
        zero = _flat(found, node, count)
        return Judgement(zero, np.zeros(count, np.bool_), np.ones(count, np.bool_), np.zeros(count))
    apart = in_groups(node, weight.values)
    heard = _heard(reading, apart, gone)
    c = inputs_of(found, node, apart)
    known, values = c.known.cpu().numpy(), c.values.cpu().numpy()
    if not has_constant_bias(node):
        known = known & (values == 0)
    fine = ~heard | known
    return Judgement(fine, fine & heard & (values != 0), heard, np.where(known, values, 0.0))


def _flat(found: Known | None, node: fx.Node, count: int) -> Mask:
    """Return which channels are 0 where the weight that reads them is not a constant."""
    if found is None:
        return np.zeros(count, np.bool_)
    zero: Mask = found.along(channel_dim(node)).is_zero.expand(count).cpu().numpy()
    return zero


def has_constant_bias(node: fx.Node) -> bool:
    """Whether a layer's bias may be given something, or it may be given one."""
    weight, bias = arguments(node)[1:3]
    return weight.op == "get_attr" and (bias is None or bias.op == "get_attr")


def _heard(reading: Reading, apart: torch.Tensor, gone: Mask) -> Mask:
    """Return which input channels an output listens to that does not go, with or without them."""
    groups, outputs, inputs, _ = apart.shape
    device = apart.device
    entering = torch.from_numpy(reading.entering).to(device).reshape(groups, inputs)
    if reading.leaving is None:
        leaving = torch.full((groups, outputs), -1, device=device)
        live = torch.ones((groups, outputs), dtype=torch.bool, device=device)
    else:
        leaving = torch.from_numpy(reading.leaving).to(device).reshape(groups, outputs)
        live = torch.from_numpy(~gone[reading.leaving]).to(device).reshape(groups, outputs)
    first = live.to(torch.uint8).argmax(1)  # most channels are heard by the first output that stays
    group = torch.arange(groups, device=device)
    quiet = (apart[group, first] == 0).all(-1) | (leaving[group, first][:, None] == entering)
    quiet |= ~live.any(1, keepdim=True)
    columns = quiet.any(0).nonzero().flatten()
    if len(columns):
        listens = (apart[:, :, columns] != 0).any(-1) & live[:, :, None]
        listens &= leaving[:, :, None] != entering[:, None, columns]
        quiet[:, columns] &= ~listens.any(1)
    heard: Mask = (~quiet).reshape(-1).cpu().numpy()
    return heard


def readings_of(channels: Channels) -> list[Reading]:
    """Return what reads channels; both operands of a product of activations are one reading."""
    found: dict[tuple[fx.Node, Any], Reading] = {}
    computed = {node: ids for node, _, ids in channels.follower.computed}
    for node, position, dim in channels.follower.read:
        read, letter = _operand(node, position, dim)
        ids = channels.along(read)[dim]
        if ids is None:
            continue
        together = letter if node.target in PRODUCTS or letter else (position, dim)
        known = found.get((node, together))
        if known is not None and len(known.entering) == len(ids):
            found[node, together] = replace(known, operands=(*known.operands, (read, dim)))
            continue
        made = computed.get(node) if node.target in LAYERS else None
        leaving = None if made is None else channels.partition.roots(made)
        roots = channels.partition.roots(ids)
        found[node, together] = Reading(node, ((read, dim),), roots, leaving)
    return list(found.values())


def _operand(node: fx.Node, position: int, dim: int) -> tuple[fx.Node, str]:
    """Return the tensor that is read, and the letter that an einsum calls its dimension."""
    first: Any = arguments(node)[0]
    if isinstance(first, str):
        terms = first.replace(" ", "").partition("->")[0].split(",")
        operands: Any = arguments(node)[1]
        return operands[position], terms[position][dim]
    return operand(node, position), ""
