"""Subjects: channels that are moved, split, repeated and flattened between the layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.pruning.subject import IS_OUTPUT, Net, Table, conv

table = Table()
IMAGE = (2, 3, 8, 8)
PERMUTATION = [5, 2, 7, 0, 3, 6, 1, 4]


@table(IMAGE, shrinks="stem a b c", keeps={"head": IS_OUTPUT})
def unequal_split() -> nn.Module:
    """Parts of 3, 5 and 8 channels, each with a reader of its own."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        p, q, r = F.relu(m.stem(x)).split([3, 5, 8], 1)
        return m.head(F.relu(m.a(p) + m.b(q) * m.c(r)))
    return Net(forward, stem=conv(3, 16), a=conv(3, 6), b=conv(5, 6), c=conv(8, 6), head=conv(6, 5))


@table(IMAGE, shrinks="stem", keeps={"head": IS_OUTPUT})
def swapped_halves() -> nn.Module:
    """Two halves of a chunk change places before they are read together."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        p, q = F.relu(m.stem(x)).chunk(2, 1)
        return m.head(torch.cat([q, torch.sigmoid(p)], 1))
    return Net(forward, stem=conv(3, 12), head=conv(12, 5))


@table(IMAGE, shrinks="stem", keeps={"head": IS_OUTPUT})
def one_half_passes() -> nn.Module:
    """Cross-stage partial: one half goes through a layer, the other passes."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        p, q = m.stem(x).chunk(2, 1)
        return m.head(torch.cat([p, q + m.b(F.relu(m.a(q)))], 1))
    return Net(forward, stem=conv(3, 12), a=conv(6, 8), b=conv(8, 6), head=conv(12, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def shuffle_by_view() -> nn.Module:
    """ShuffleNet's shuffle: view, transpose, flatten."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        n, c, h, w = y.shape
        return m.b(y.view(n, 3, c // 3, h, w).transpose(1, 2).flatten(1, 2))
    return Net(forward, a=conv(3, 12), b=conv(12, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def shuffle_by_permute() -> nn.Module:
    """The same by reshape and permute, with two groups; a reader that is grouped itself."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(m.a(x))
        y = y.reshape(-1, 2, 6, 8, 8).permute(0, 2, 1, 3, 4).reshape(-1, 12, 8, 8)
        return m.b(F.relu(y))
    return Net(forward, a=conv(3, 12), b=conv(12, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def shuffle_operator() -> nn.Module:
    """The same as one operator."""
    return Net(lambda m, x: m.b(F.channel_shuffle(m.a(x), 3)), a=conv(3, 12), b=conv(12, 5))


@table(IMAGE, shrinks="stem a", keeps={"head": IS_OUTPUT})
def shufflenet_block() -> nn.Module:
    """Chunk, a branch with a depthwise layer, concatenate, shuffle: twice, so that cycles form."""
    def block(m: Net, x: torch.Tensor, a: nn.Module, d: nn.Module) -> torch.Tensor:
        p, q = x.chunk(2, 1)
        y = torch.cat([p, F.relu(d(F.relu(a(q))))], 1)
        return y.view(-1, 2, 4, 8, 8).transpose(1, 2).reshape(-1, 8, 8, 8)
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(m.stem(x))
        return m.head(block(m, block(m, x, m.a, m.d), m.b, m.e))
    return Net(forward, stem=conv(3, 8), a=conv(4, 4, 1), d=conv(4, 4, groups=4), b=conv(4, 4, 1),
               e=conv(4, 4, groups=4), head=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def shuffle_by_index() -> nn.Module:
    """A shuffle by a computed index, as a buffer."""
    index = torch.arange(12).view(3, 4).t().flatten()
    return Net(lambda m, x: m.b(torch.index_select(m.a(x), 1, m.index)),
               a=conv(3, 12), index=index, b=conv(12, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def index_by_buffer() -> nn.Module:
    """x[:, perm] with a buffer."""
    return Net(lambda m, x: m.b(m.a(x)[:, m.order]),
               a=conv(3, 8), order=torch.tensor(PERMUTATION), b=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def index_by_list() -> nn.Module:
    """x[:, perm] with a list."""
    return Net(lambda m, x: m.b(m.a(x)[:, PERMUTATION]), a=conv(3, 8), b=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def index_with_repeats() -> nn.Module:
    """An index that names channel 2 twice, and 5 not at all."""
    return Net(lambda m, x: m.b(m.a(x)[:, [2, 0, 2, 7, 1, 3, 6, 4]]), a=conv(3, 8), b=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"c": IS_OUTPUT})
def index_and_sum() -> nn.Module:
    """A value and its permutation are added: channels go in whole cycles of the permutation."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        return m.c(F.relu(y + y[:, [1, 0, 3, 2, 5, 4, 7, 6]]))
    return Net(forward, a=conv(3, 8), c=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def flip() -> nn.Module:
    """Channels in reverse order."""
    return Net(lambda m, x: m.b(m.a(x).flip(1)), a=conv(3, 8), b=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def flip_of_space() -> nn.Module:
    """A flip of the image, not of its channels."""
    return Net(lambda m, x: m.b(m.a(x).flip(-1, 2)), a=conv(3, 8), b=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def roll() -> nn.Module:
    """A roll along the channels, not by half."""
    return Net(lambda m, x: m.b(m.a(x).roll(3, 1)), a=conv(3, 8), b=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def roll_of_space() -> nn.Module:
    """A roll of the image, not of its channels."""
    return Net(lambda m, x: m.b(m.a(x).roll((1, 2), (2, 3))), a=conv(3, 8), b=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"c": IS_OUTPUT})
def every_second_channel() -> nn.Module:
    """x[:, ::2] and x[:, 1::2], gated."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        return m.c(y[:, ::2] * torch.sigmoid(y[:, 1::2]))
    return Net(forward, a=conv(3, 12), c=conv(6, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def negative_slice() -> nn.Module:
    """x[:, -6:-2]: two channels on each side are read by nobody."""
    return Net(lambda m, x: m.b(m.a(x)[:, -6:-2]), a=conv(3, 8), b=conv(4, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT, "c": IS_OUTPUT})
def narrow() -> nn.Module:
    """narrow(1, 2, 5) beside a reader of everything."""
    def forward(m: Net, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = F.relu(m.a(x))
        return m.b(y.narrow(1, 2, 5)), m.c(y)
    return Net(forward, a=conv(3, 8), b=conv(5, 5), c=conv(8, 4))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def select_of_one() -> nn.Module:
    """One channel is taken alone, and must stay."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        return m.b(F.relu(y)) * y[:, 3].unsqueeze(1)
    return Net(forward, a=conv(3, 8), b=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def slice_scatter() -> nn.Module:
    """Some channels are overwritten in place by what a branch makes of them."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x).clone()
        y[:, 2:5] = torch.tanh(y[:, 2:5])
        return m.b(y)
    return Net(forward, a=conv(3, 8), b=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def unbind() -> nn.Module:
    """Channels in groups are taken apart and multiplied: group g of each four goes together."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        p, q, r = m.a(x).unflatten(1, (3, 4)).unbind(1)
        return m.b(p * torch.tanh(q) + r)
    return Net(forward, a=conv(3, 12), b=conv(4, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def nhwc_flatten() -> nn.Module:
    """Channels last, then flattened: reader column place · 8 + channel."""
    return Net(lambda m, x: m.b(F.max_pool2d(m.a(x), 4).permute(0, 2, 3, 1).flatten(1)),
               a=conv(3, 8), b=nn.Linear(32, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def nchw_flatten() -> nn.Module:
    """Channels first, then flattened: reader column channel · 4 + place."""
    return Net(lambda m, x: m.b(F.max_pool2d(m.a(x), 4).flatten(1)),
               a=conv(3, 8), b=nn.Linear(32, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def transposed_flatten() -> nn.Module:
    """Channels between the two places: [h, c, w], flattened."""
    return Net(lambda m, x: m.b(F.max_pool2d(m.a(x), 4).permute(0, 2, 1, 3).reshape(-1, 32)),
               a=conv(3, 8), b=nn.Linear(32, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def flatten_and_back() -> nn.Module:
    """Flattened, normalised place by place, and viewed as an image again."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.n(F.max_pool2d(m.a(x), 4).flatten(1))
        return m.b(y.view(-1, 8, 2, 2))
    return Net(forward, a=conv(3, 8), n=nn.BatchNorm1d(32), b=conv(8, 5))


@table(IMAGE, shrinks="a b", keeps={"c": IS_OUTPUT})
def global_pool() -> nn.Module:
    """Pooled to one place, flattened."""
    return Net(lambda m, x: m.c(F.relu(m.b(F.adaptive_avg_pool2d(F.relu(m.a(x)), 1).flatten(1)))),
               a=conv(3, 8), b=nn.Linear(8, 6), c=nn.Linear(6, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def mean_of_places() -> nn.Module:
    """x.mean((2, 3)), and the largest, side by side."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        return m.b(torch.cat([y.mean((-1, -2)), y.amax((2, 3))], 1))
    return Net(forward, a=conv(3, 8), b=nn.Linear(16, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT}, groups={"a": 4})
def pixel_shuffle() -> nn.Module:
    """Four channels become one: they go together."""
    return Net(lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)), a=conv(3, 16), b=conv(4, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def pixel_unshuffle() -> nn.Module:
    """One channel becomes four: reader columns 4i … 4i + 3."""
    return Net(lambda m, x: m.b(F.pixel_unshuffle(m.a(x), 2)), a=conv(3, 8), b=conv(32, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT}, groups={"a": 4})
def pixel_shuffle_by_hand() -> nn.Module:
    """The same by views and one permute."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x).view(-1, 4, 2, 2, 8, 8).permute(0, 1, 4, 2, 5, 3)
        return m.b(y.reshape(-1, 4, 16, 16))
    return Net(forward, a=conv(3, 16), b=conv(4, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def patch_merging() -> nn.Module:
    """Swin: four strided slices of a channels-last image, concatenated: column k · 8 + channel."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x).permute(0, 2, 3, 1)
        y = torch.cat([y[:, ::2, ::2], y[:, 1::2, ::2], y[:, ::2, 1::2], y[:, 1::2, 1::2]], -1)
        return m.b(y)
    return Net(forward, a=conv(3, 8), b=nn.Linear(32, 5, bias=False))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def patch_merging_by_reshape() -> nn.Module:
    """The same by one reshape and one permute."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x).permute(0, 2, 3, 1).reshape(-1, 4, 2, 4, 2, 8)
        return m.b(y.permute(0, 1, 3, 4, 2, 5).flatten(3))
    return Net(forward, a=conv(3, 8), b=nn.Linear(32, 5, bias=False))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def focus() -> nn.Module:
    """YOLO's focus layer, on the model's input: its columns stay."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return m.b(F.silu(m.a(torch.cat(y, 1))))
    return Net(forward, a=conv(12, 8), b=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"one": "it is the only channel", "b": IS_OUTPUT})
def expand_of_one() -> nn.Module:
    """One channel, expanded to the width of another layer."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        return m.b(y * m.one(x).expand(-1, 8, -1, -1) + m.one(x).expand_as(y))
    return Net(forward, a=conv(3, 8), one=conv(3, 1), b=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def repeat() -> nn.Module:
    """Channels twice, one block after the other: columns i and i + 8."""
    return Net(lambda m, x: m.b(m.a(x).repeat(1, 2, 1, 1)), a=conv(3, 8), b=conv(16, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def repeat_interleave() -> nn.Module:
    """Each channel twice in a row: columns 2i and 2i + 1."""
    return Net(lambda m, x: m.b(m.a(x).repeat_interleave(2, dim=1)), a=conv(3, 8), b=conv(16, 5))


@table(IMAGE, shrinks="a c", keeps={"b": IS_OUTPUT}, groups={"c": 2})
def repeated_against_another() -> nn.Module:
    """Channels repeated in a row multiply another layer's: channel i ties rows 2i and 2i + 1."""
    return Net(lambda m, x: m.b(m.a(x).repeat_interleave(2, dim=1) * m.c(x)),
               a=conv(3, 6), c=conv(3, 12), b=conv(12, 5))


@table(IMAGE, keeps={"b": IS_OUTPUT})
def unfold() -> nn.Module:
    """im2col: column channel · 9 + place in the window."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        return m.b(F.unfold(m.a(x), 3, padding=1).transpose(1, 2))
    return Net(forward, a=conv(3, 8), b=nn.Linear(72, 5))


@table((3, 2, 6), shrinks="a b", keeps={"c": IS_OUTPUT})
def time_first() -> nn.Module:
    """Transposes move time and batch, the channels stay last."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(m.a(x)).transpose(0, 1)
        return m.c(torch.relu(m.b(y)).movedim(-1, 0).movedim(0, -1))
    return Net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 5))


@table((2, 4, 6), shrinks="t1 c1", keeps={"head": IS_OUTPUT})
def mlp_mixer() -> nn.Module:
    """Token mixing by a transpose: tokens are the channels of the first MLP."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = m.embed(x)
        x = x + m.t2(F.gelu(m.t1(x.transpose(1, 2)))).transpose(1, 2)
        x = x + m.c2(F.gelu(m.c1(x)))
        return m.head(x.mean(1))
    return Net(forward, embed=nn.Linear(6, 8), t1=nn.Linear(4, 6), t2=nn.Linear(6, 4),
               c1=nn.Linear(8, 16), c2=nn.Linear(16, 8), head=nn.Linear(8, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def squeeze_and_back() -> nn.Module:
    """Unsqueeze, swap axes, squeeze, contiguous, view as itself."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x).unsqueeze(1).transpose(1, 2).contiguous().squeeze(2)
        return m.b(y.view(y.shape).swapaxes(2, 3))
    return Net(forward, a=conv(3, 8), b=conv(8, 5))


@table(IMAGE, shrinks="a b", keeps={"c": IS_OUTPUT}, groups={"a": 2})
def view_of_half_pairs() -> nn.Module:
    """A view [4, 2] of eight channels meets a layer of four: pairs of one go with rows of other."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x).unflatten(1, (4, 2)) * torch.sigmoid(m.b(x)).unsqueeze(2)
        return m.c(y.flatten(1, 2))
    return Net(forward, a=conv(3, 8), b=conv(3, 4), c=conv(8, 5))
