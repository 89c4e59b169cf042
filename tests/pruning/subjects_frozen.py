"""Subjects: operators that look at all channels, so that what they read must stay whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.pruning.subject import IS_OUTPUT, MIXES, Net, Table, conv, weights

table = Table()
IMAGE = (2, 3, 8, 8)
WIDTH_STAYS = {"b": MIXES, "c": IS_OUTPUT}

_library = torch.library.Library("fxopt_pruning", "FRAGMENT")
_library.define("mystery(Tensor x) -> Tensor")
_library.impl("mystery", lambda x: x.flip(1) * 2, "CompositeExplicitAutograd")
_library.impl("mystery", lambda x: torch.empty_like(x), "Meta")


def _around(function: object, **parts: object) -> nn.Module:
    """Return a, b and c with a function of the model and of b's output between b and c."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        return m.c(function(m, m.b(F.relu(m.a(x)))))  # type: ignore[operator]
    return Net(forward, a=conv(3, 8), b=conv(8, 8), c=conv(8, 5), **parts)


@table(IMAGE, shrinks="a", keeps=WIDTH_STAYS)
def softmax_over_channels() -> nn.Module:
    """A softmax over channels: its sum is over all."""
    return _around(lambda m, y: y.softmax(1))


@table(IMAGE, shrinks="a", keeps=WIDTH_STAYS)
def log_softmax_over_channels() -> nn.Module:
    """The same from the other end: dim −3."""
    return _around(lambda m, y: F.log_softmax(y, -3))


@table(IMAGE, shrinks="a", keeps=WIDTH_STAYS)
def mean_over_channels() -> nn.Module:
    """CBAM's spatial gate: mean and maximum over the channels."""
    def gate(m: Net, y: torch.Tensor) -> torch.Tensor:
        stats = torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)
        return y * torch.sigmoid(m.gate(stats))
    return _around(gate, gate=conv(2, 1, 5))


@table(IMAGE, shrinks="a", keeps=WIDTH_STAYS)
def argmax_over_channels() -> nn.Module:
    """The number of the largest channel."""
    return _around(lambda m, y: y * y.argmax(1, keepdim=True))


@table(IMAGE, shrinks="a", keeps=WIDTH_STAYS)
def sort_over_channels() -> nn.Module:
    """Channels sorted by value: none has an identity behind it."""
    return _around(lambda m, y: y.sort(1)[0])


@table(IMAGE, shrinks="a", keeps=WIDTH_STAYS)
def cumsum_over_channels() -> nn.Module:
    """Each channel is the sum of those before it."""
    return _around(lambda m, y: y.cumsum(1))


@table(IMAGE, shrinks="a", keeps=WIDTH_STAYS)
def topk_over_channels() -> nn.Module:
    """The eight largest of eight: a number of channels as an argument."""
    return _around(lambda m, y: y.topk(8, 1)[0])


@table(IMAGE, shrinks="a", keeps=WIDTH_STAYS)
def efficient_channel_attention() -> nn.Module:
    """ECA: a convolution slides over the channels."""
    def gate(m: Net, y: torch.Tensor) -> torch.Tensor:
        s = F.adaptive_avg_pool2d(y, 1).squeeze(-1).transpose(-1, -2)
        return y * torch.sigmoid(m.eca(s).transpose(-1, -2).unsqueeze(-1))
    return _around(gate, eca=nn.Conv1d(1, 1, 3, padding=1, bias=False))


@table(IMAGE, shrinks="a", keeps=WIDTH_STAYS)
def local_response_norm() -> nn.Module:
    """AlexNet: each channel is divided by its neighbours."""
    return _around(lambda m, y: F.local_response_norm(y, 3))


@table(IMAGE, shrinks="a", keeps=WIDTH_STAYS)
def normalize_over_channels() -> nn.Module:
    """Unit length over the channels."""
    return _around(lambda m, y: F.normalize(y, dim=1))


@table(IMAGE, shrinks="a", keeps=WIDTH_STAYS)
def variance_over_channels() -> nn.Module:
    """A layer norm over channels, written by hand."""
    return _around(lambda m, y: (y - y.mean(1, True)) / (y.var(1, keepdim=True) + 1e-5).sqrt())


@table(IMAGE, shrinks="a", keeps={"b": MIXES, "c": IS_OUTPUT})
def unknown_operator() -> nn.Module:
    """A custom operator: nobody knows what it does with channels."""
    return _around(lambda m, y: torch.ops.fxopt_pruning.mystery(y))


@table(IMAGE, keeps={"b": "a branch of a condition reads it", "c": IS_OUTPUT})
def condition() -> nn.Module:
    """torch.cond: its branches are graphs of their own."""
    def choose(m: Net, y: torch.Tensor) -> torch.Tensor:
        return torch.cond(y.sum() > 0, lambda t: t.relu(), lambda t: t * 2, (y,))
    return _around(choose)


@table(IMAGE, shrinks="a", keeps=WIDTH_STAYS)
def sort_of_the_last_dimension() -> nn.Module:
    """A sort along the channels of a channels-last view."""
    return _around(lambda m, y: y.permute(0, 2, 3, 1).sort(-1)[0].permute(0, 3, 1, 2))


@table(IMAGE, shrinks="a", keeps=WIDTH_STAYS)
def channels_become_batch() -> nn.Module:
    """One convolution for each channel alone, by folding channels into the batch."""
    def each(m: Net, y: torch.Tensor) -> torch.Tensor:
        return (m.each(y.reshape(-1, 1, 8, 8)).view(2, 8, 8, 8) + m.tail).cumsum(1)
    return _around(each, each=conv(1, 1), tail=weights(8, 8))


@table(IMAGE, shrinks="a", keeps=WIDTH_STAYS)
def gather_over_channels() -> nn.Module:
    """An index that is computed from values picks channels."""
    return _around(lambda m, y: torch.gather(y, 1, y.argsort(1)))


@table(IMAGE, shrinks="a b", keeps={"c": IS_OUTPUT})
def softmax_over_places() -> nn.Module:
    """A softmax over space: each channel alone."""
    return _around(lambda m, y: y.flatten(2).softmax(-1).view_as(y))


@table(IMAGE, shrinks="a b", keeps={"c": IS_OUTPUT})
def cumsum_over_places() -> nn.Module:
    """A running sum along a row of the image: each channel alone."""
    return _around(lambda m, y: y.cumsum(-1).sort(2)[0])


@table(IMAGE, shrinks="a", keeps={"b": MIXES, "c": IS_OUTPUT})
def batch_statistics_of_everything() -> nn.Module:
    """A reduction over all dimensions: channels, too."""
    return _around(lambda m, y: y / y.abs().max())


@table(IMAGE, shrinks="a", keeps={"b": MIXES, "c": IS_OUTPUT})
def fourier_over_channels() -> nn.Module:
    """FNet: a Fourier transform along the channels."""
    return _around(lambda m, y: torch.fft.fft(y, dim=1).real)
