"""Gradients: how much the loss changes when the weights of a channel become 0.

The loss around the weights w of a model, when those of the channel c (the set S) become 0:

    ΔL ≈ − Σ_{i ∈ S} g_i w_i  +  ½ Σ_{i ∈ S} h_ii w_i²        g = ∂L/∂w,  h = diag ∂²L/∂w²

S are, by default, the columns that read the channel: all of them at 0 is exactly the channel gone,
norms and activations before them included, since for a contraction y = Σ_c w_c a_c

    Σ_{i ∈ S} g_i w_i  =  Σ a_c · ∂L/∂a_c

which is the gate behind the activation of Molchanov et al. (2019). Where no columns read a channel
(those of queries meet those of keys), S are the rows and biases that compute it.

    taylor    mean over batches of (Σ_S g w)²      "squared-sum": Molchanov et al., "Importance
                                                   Estimation for Neural Network Pruning", CVPR
                                                   2019, equation 8 with one gate per channel
                                 |Σ_S g w|         "absolute-sum": the same in units of the loss
                                  Σ_S (g w)²       "sum-of-squares": equation 8 summed over weights
    hessian   mean over batches of ½ Σ_S h w²      "Optimal Brain Damage", LeCun, Denker and Solla,
                                                   NIPS 1990, equation 4

The mean of the gradient itself is near 0 in a trained model: so it is squared per batch, and small
batches say more. `sum-of-squares` is, up to ½, Optimal Brain Damage with the diagonal of the
empirical Fisher information in the place of the Hessian's (exactly so with batches of one).
The Hessian's diagonal is estimated with random signs z, after Hutchinson (Bekas, Kokiopoulou and
Saad, 2007): h ⊙ w² = E[u ⊙ (H u)] with u = z ⊙ w.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxopt.channels.groups import Family, Member, Role
from fxopt.errors import FxoptError, OptionError
from fxopt.graph_module import GraphModule
from fxopt.interpreter import in_evaluation
from fxopt.objective import batch_loss, check_loss
from fxopt.pruning.importance.batches import check_batches, first_batches
from fxopt.pruning.importance.members import check_roles, members_of, total
from fxopt.pruning.importance.normalization import Normalized

FORMS = ("squared-sum", "absolute-sum", "sum-of-squares")
Tensors = dict[str, torch.Tensor]  # by the names of constants


@dataclass(frozen=True, eq=False)
class Differentiated(Normalized):
    """Base of what differentiates a loss; the graph runs on a copy, in evaluation mode.

    `data` gives batches again and again, `loss(outputs, targets)` is a scalar; see
    `fxopt.objective`. `batches` limits how many are looked at. `roles` says which weights of a
    channel count; None for the columns that read it, or else what computes it.
    """

    normalize: str | None = field(default=None, kw_only=True)
    data: Any = field(default=None, repr=False)
    loss: Any = field(default=None, repr=False)
    batches: int | None = None
    roles: tuple[str, ...] | None = None

    name: ClassVar[str] = "differentiated"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_batches(self, self.data, self.batches)
        check_loss(self.loss)
        if self.roles is not None:
            check_roles(self.roles)

    def members(self, family: Family) -> list[Member]:
        """Return the members whose weights count."""
        if self.roles is not None:
            return members_of(family, self.roles, self.name)
        reading = [member for member in family.members if member.role is Role.INPUT]
        return reading or members_of(family, ("output", "shift"), self.name)

    def measure(self, graph: GraphModule, families: Sequence[Family]) -> list[torch.Tensor]:
        """Return the mean over batches of what one batch says, per family and channel."""
        members = [self.members(family) for family in families]
        sums = [torch.zeros(family.channels, dtype=torch.float64) for family in families]
        twin, count = in_evaluation(graph), 0
        weights = _leaves(twin, members)
        for batch in first_batches(self.data, self.batches):
            with torch.enable_grad(), self.kernels():
                found = self.of_batch(batch_loss(twin, batch, self.loss), weights, count)
            count += 1
            for one, places in zip(sums, members, strict=True):
                one += self.of_channels(found, places).cpu()
        return [one / count for one in sums]

    def kernels(self) -> contextlib.AbstractContextManager[Any]:
        """Choose the kernels that the graph runs with."""
        return contextlib.nullcontext()

    def of_batch(self, loss: torch.Tensor, weights: Tensors, number: int) -> Tensors:
        """Return what the batch of this number says of each weight, in tensors of their shapes."""
        raise NotImplementedError

    def of_channels(self, found: Tensors, members: Sequence[Member]) -> torch.Tensor:
        """Return what a batch says of each channel, [channels] in float64."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Taylor(Differentiated):
    """The change of the loss to first order when a channel goes; `form` says how it is taken."""

    form: str = "squared-sum"

    name: ClassVar[str] = "taylor"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in FORMS:
            raise OptionError(f"form={self.form!r}: it is one of {', '.join(map(repr, FORMS))}.")

    def of_batch(self, loss: torch.Tensor, weights: Tensors, number: int) -> Tensors:
        """Return g · w, squared where single weights are."""
        products = {
            name: weights[name].detach() * gradient
            for name, gradient in _gradients(loss, weights).items()
        }
        if self.form == "sum-of-squares":
            return {name: product.double().square() for name, product in products.items()}
        return products

    def of_channels(self, found: Tensors, members: Sequence[Member]) -> torch.Tensor:
        """Return (Σ g w)², |Σ g w| or Σ (g w)²."""
        sums = _sums(found, members)
        if self.form == "squared-sum":
            return sums.square()
        return sums.abs() if self.form == "absolute-sum" else sums


@dataclass(frozen=True, eq=False)
class Hessian(Differentiated):
    """Optimal Brain Damage: ½ Σ h w², with the Hessian's diagonal estimated by random signs.

    `samples` sign vectors are drawn per batch, each of which costs one more pass backwards; `seed`
    makes them the same every time. Scores may be negative where the loss curves downwards.
    """

    samples: int = 1
    seed: int = 0

    name: ClassVar[str] = "hessian"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.samples, int) or self.samples < 1:
            raise OptionError(f"samples={self.samples!r}: it is a number above 0.")

    def kernels(self) -> contextlib.AbstractContextManager[Any]:
        """Fused attention cannot be differentiated twice."""
        return sdpa_kernel(SDPBackend.MATH)

    def of_batch(self, loss: torch.Tensor, weights: Tensors, number: int) -> Tensors:
        """Return the mean of ½ · u ⊙ (H u) with u = z ⊙ w, whose expectation is ½ · h · w²."""
        slopes = _gradients(loss, weights, create_graph=True)
        found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + number)
        for _ in range(self.samples):
            probe = {
                name: _signs_like(weight, generator) * weight.detach()
                for name, weight in weights.items()
            }
            along = sum((slopes[name] * probe[name]).sum() for name in weights)
            for name, curve in _gradients(along, weights, retain_graph=True).items():
                found[name] += 0.5 / self.samples * probe[name] * curve
        return found

    def of_channels(self, found: Tensors, members: Sequence[Member]) -> torch.Tensor:
        """Return ½ Σ h w²."""
        return _sums(found, members)


def _leaves(graph: GraphModule, members: Sequence[Sequence[Member]]) -> Tensors:
    """Return the constants that count, and let gradients flow to these alone."""
    for tensor in graph.constants().values():
        tensor.requires_grad_(False)
    names = dict.fromkeys(member.constant for places in members for member in places)
    for name in names:
        if not graph.constant(name).is_floating_point():
            raise FxoptError(
                f"'{name}' is {graph.constant(name).dtype}: a loss has no gradient there. Take an "
                "importance that reads magnitudes, such as 'l2'."
            )
    return {name: graph.constant(name).requires_grad_(True) for name in names}


def _gradients(
    loss: Any, weights: Tensors, *, create_graph: bool = False, retain_graph: bool | None = None
) -> Tensors:
    """Return the gradient of each weight; 0 where the loss does not depend on it."""
    if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
        return {name: torch.zeros_like(weight) for name, weight in weights.items()}
    return torch.autograd.grad(
        loss, weights, retain_graph=retain_graph, create_graph=create_graph, materialize_grads=True
    )


def _signs_like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.randint(2, tensor.shape, generator=generator, dtype=torch.int8)
    return (2 * drawn - 1).to(tensor)


def _sums(found: Tensors, members: Sequence[Member]) -> torch.Tensor:
    return torch.stack([total(found[member.constant], member) for member in members]).sum(0)
