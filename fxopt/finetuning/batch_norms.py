"""Batch-norm re-estimation: what a channel looks like now, without training anything.

Pruning changes what every later layer sees, and the running statistics are those of before. To
measure them again is the cheapest recovery there is. See Wu and Johnson: Rethinking "Batch" in
BatchNorm, 2021, section 3, on averages over many batches instead of moving ones.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from fxopt.errors import OptionError
from fxopt.finetuning import weights
from fxopt.finetuning.history import Model
from fxopt.graph_module import GraphModule
from fxopt.objective import Batches, ObjectiveError, call, each_batch, inputs_of

_NORM = torch.nn.modules.batchnorm._BatchNorm


def reestimate_batch_norms(model: Model, data: Batches, *, batches: int | None = None) -> Model:
    """Return a copy whose batch norms have the mean and variance of `data`; nothing else changes.

    Each batch norm gets the exact mean and (unbiased) variance, per channel, over all values that
    reach it in all batches, while it and the batch norms before it normalize by the statistics of
    the batch, as in training. Dropout stays off; no gradients are computed.

    `data` is as for `finetune`; batches may also be inputs alone, a tensor or a dict. `batches` is
    how many of them are used: all by default. Raises OptionError for a model without batch norms
    that keep statistics, and ObjectiveError for data that cannot be used.
    """
    if batches is not None and batches < 1:
        raise OptionError(f"`batches` must be a whole number above 0, got {batches!r}.")
    twin: Model = weights.copy_of(model)
    training = [module.training for module in twin.modules()]
    if isinstance(twin, GraphModule):
        twin.eval()
        graphs: list[GraphModule] = [twin, *twin.subgraphs()]
        some = sum(map(_let_train, graphs)) > 0
    else:
        some = _only_norms_train(twin)
    if not some:
        raise OptionError(
            "The model has no batch norm with statistics to estimate: none was captured, or "
            "training leaves all of them alone."
        )
    gathered, before = _Gathering(), weights.kept(twin)
    with torch.no_grad():
        for batch in itertools.islice(each_batch(data), batches):
            with gathered:
                call(twin, inputs_of(batch))
    weights.put_back(twin, before)  # counters, and whatever else a call changes
    gathered.write()
    if isinstance(twin, GraphModule):
        twin.train(model.training)
    for module, flag in zip(twin.modules(), training, strict=True):
        module.training = flag
    return twin


def _let_train(graph: GraphModule) -> bool:
    """Let the batch norms of a graph that training switches use the statistics of the batch."""
    some = False
    for node in graph.find(torch.ops.aten.batch_norm.default):
        if node.meta.get("switch") == 5 and node.args[3] is not None:
            node.args = (*node.args[:5], True, *node.args[6:])
            some = True
    graph.recompile()
    return some


def _only_norms_train(model: torch.nn.Module) -> bool:
    """Put a module into evaluation mode, but for the batch norms that its `train()` switches."""
    model.train()
    some = False
    for module in model.modules():
        module.training = module.training and isinstance(module, _NORM)
        some = some or (module.training and module.running_mean is not None)
    return some


@dataclass
class _Moments:
    """Count, mean and sum of squared deviations, in double precision, and where they belong."""

    running_mean: torch.Tensor
    running_var: torch.Tensor
    count: int = 0
    mean: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, values: torch.Tensor) -> None:
        """Take in values [batch, channels, …].

        Two sets are joined as by Chan, Golub and LeVeque: Updating Formulae and a Pairwise
        Algorithm for Computing Sample Variances, 1979, equation 2.1.
        """
        rows = values.transpose(0, 1).flatten(1).double()  # [channels, values]
        count = rows.shape[1]
        mean = rows.mean(1)
        squares = (rows - mean[:, None]).square().sum(1)
        total = self.count + count
        off = mean - self.mean
        self.mean = self.mean + off * (count / total)
        self.squares = self.squares + squares + off.square() * (self.count * count / total)
        self.count = total


class _Gathering(TorchFunctionMode):
    """Sees every batch norm in training mode, of modules and graphs alike, and leaves no trace."""

    def __init__(self) -> None:
        super().__init__()
        self.moments: dict[int, _Moments] = {}  # by the identity of the running mean

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        norm = _norm_call(func, args, kwargs)
        if norm is None:
            return func(*args, **kwargs)
        x, weight, bias, mean, var, eps = norm
        self.moments.setdefault(id(mean), _Moments(mean, var)).add(x)
        return torch.batch_norm(x, weight, bias, None, None, True, 0.0, eps, True)

    def write(self) -> None:
        """Put what was gathered into the running statistics."""
        for one in self.moments.values():
            if one.count < 2:
                raise ObjectiveError("A batch norm saw one value per channel: no variance in that.")
            one.running_mean.copy_(one.mean)
            one.running_var.copy_(one.squares / (one.count - 1))


_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def _norm_call(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any, Any, Any, Any, float] | None:
    """Return (x, weight, bias, mean, var, eps) of a batch norm in training mode, else None."""
    if func in (torch.batch_norm, torch.ops.aten.batch_norm.default):
        x, weight, bias, mean, var, training, _, eps, _ = args
    elif func is F.batch_norm:
        usual: dict[str, Any] = {"weight": None, "bias": None, "training": False, "eps": 1e-5}
        given = {**usual, **dict(zip(_NAMES, args, strict=False)), **kwargs}
        x, weight, bias, training = (given[n] for n in ("input", "weight", "bias", "training"))
        mean, var, eps = given["running_mean"], given["running_var"], given["eps"]
    else:
        return None
    if not training or mean is None or var is None:
        return None
    return x, weight, bias, mean, var, eps
