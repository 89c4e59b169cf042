"""Subjects: rarer calls, and usual ones in combinations where an identity is easily lost."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.pruning.subject import IS_OUTPUT, MIXES, Net, Table, conv, weights

table = Table()
IMAGE = (2, 3, 8, 8)
TOKENS = (2, 4, 6)


@table(IMAGE, shrinks="a", keeps={"c": IS_OUTPUT})
def slice_scatter_of_another_layer() -> nn.Module:
    """Channels 2 to 4 of one layer are overwritten by another layer's."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x).clone()
        y[:, 2:5] = m.b(x)
        return m.c(F.relu(y))
    return Net(forward, a=conv(3, 8), b=conv(3, 3), c=conv(8, 5))


@table(IMAGE, shrinks="", keeps={"c": IS_OUTPUT})
def index_put_of_channels() -> nn.Module:
    """The same through a list of channels."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x).clone()
        y[:, [6, 1, 3]] = m.b(x)
        return m.c(F.relu(y))
    return Net(forward, a=conv(3, 8), b=conv(3, 3), c=conv(8, 5))


@table(IMAGE, shrinks="a b d", keeps={"c": IS_OUTPUT})
def choices_between_layers() -> nn.Module:
    """where, maximum, lerp and addcmul tie the channels of three layers."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        a, b, d = m.a(x), m.b(x), m.d(x)
        y = torch.where(a > 0, b, d) + torch.maximum(a, d)
        return m.c(torch.lerp(y, b, 0.3).addcmul(a, d, value=0.5))
    return Net(forward, a=conv(3, 8), b=conv(3, 8), d=conv(3, 8), c=conv(8, 5))


@table(IMAGE, shrinks="a b d", keeps={"c": IS_OUTPUT})
def simple_gate() -> nn.Module:
    """NAFNet: pointwise, depthwise, halves multiplied."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        p, q = m.d(m.a(x)).chunk(2, 1)
        return m.c(F.gelu(m.b(p * q)))
    return Net(forward, a=conv(3, 12, 1), d=conv(12, 12, groups=12), b=conv(6, 8, 1), c=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"c": IS_OUTPUT})
def shuffled_groups() -> nn.Module:
    """ShuffleNet V1: a grouped layer, a shuffle, another grouped layer."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(m.b(F.relu(m.a(x))))
        y = y.view(-1, 4, 4, 8, 8).transpose(1, 2).reshape(-1, 16, 8, 8)
        return m.c(F.relu(m.d(y)))
    return Net(forward, a=conv(3, 16), b=conv(16, 16, 1, groups=4), d=conv(16, 16, 1, groups=4),
               c=conv(16, 5))


@table(IMAGE, keeps={"c": IS_OUTPUT})
def groups_across_a_concatenation() -> nn.Module:
    """A group of the reader takes channels from two layers: 6 + 10 into four groups."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        return m.c(F.relu(m.d(torch.cat([m.a(x), m.b(x)], 1))))
    return Net(forward, a=conv(3, 6), b=conv(3, 10), d=conv(16, 8, groups=4), c=conv(8, 5))


@table(IMAGE, keeps={"c": IS_OUTPUT})
def group_norm_across_a_concatenation() -> nn.Module:
    """A group of the norm spans two layers."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        return m.c(F.relu(m.n(torch.cat([m.a(x), m.b(x)], 1))))
    return Net(forward, a=conv(3, 6), b=conv(3, 10), n=nn.GroupNorm(4, 16), c=conv(16, 5))


@table(IMAGE, shrinks="a", keeps={"c": IS_OUTPUT}, groups={"a": 4})
def group_norm_and_residual() -> nn.Module:
    """A group norm inside a residual branch: its groups tie the width of the sum."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        return m.c(y + m.b(F.silu(m.n(y))))
    return Net(forward, a=conv(3, 16), n=nn.GroupNorm(4, 16), b=conv(16, 16), c=conv(16, 5))


@table(IMAGE, shrinks="a b", keeps={"c": IS_OUTPUT})
def interleaved_by_stack() -> nn.Module:
    """Two layers stacked and flattened: channels 2i of one, 2i + 1 of the other."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        return m.c(torch.stack([m.a(x), torch.sigmoid(m.b(x))], 2).flatten(1, 2))
    return Net(forward, a=conv(3, 6), b=conv(3, 6), c=conv(12, 5))


@table(IMAGE, shrinks="a", keeps={"c": IS_OUTPUT})
def channels_cropped_by_a_pad() -> nn.Module:
    """A negative pad cuts channels off, and a value pads others on."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        return m.c(F.pad(F.pad(m.a(x), (0, 0, 0, 0, -2, -1)), (0, 0, 0, 0, 1, 2), value=0.7))
    return Net(forward, a=conv(3, 10), c=conv(10, 5))


@table(IMAGE, shrinks="a", keeps={"c": IS_OUTPUT})
def layer_norm_over_places() -> nn.Module:
    """A layer norm over height and width: each channel alone."""
    return Net(lambda m, x: m.c(m.n(m.a(x))), a=conv(3, 8), n=nn.LayerNorm([8, 8]), c=conv(8, 5))


@table(IMAGE, keeps={"a": MIXES, "c": IS_OUTPUT})
def layer_norm_of_everything() -> nn.Module:
    """A layer norm over channels and places."""
    return Net(lambda m, x: m.c(m.n(m.a(x))), a=conv(3, 8), n=nn.LayerNorm([8, 8, 8]), c=conv(8, 5))


@table(IMAGE, keeps={"a": MIXES, "c": IS_OUTPUT})
def softmax_of_a_flatten() -> nn.Module:
    """A softmax over channels and places, flattened, and back."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        return m.c(y.flatten(1).softmax(1).view_as(y) * y)
    return Net(forward, a=conv(3, 8), c=conv(8, 5))


@table(IMAGE, keeps={"a": "a split cuts between channels' places", "c": IS_OUTPUT})
def split_between_channels() -> nn.Module:
    """Channels and places, flattened, are cut in the middle of a channel and added."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        p, q, r = F.max_pool2d(m.a(x), 4).flatten(1).split([14, 14, 4], 1)
        return m.c(torch.cat([p * q, r], 1))
    return Net(forward, a=conv(3, 8), c=nn.Linear(18, 5))


@table(TOKENS, shrinks="attention.in_proj_weight@0", keeps={"head": IS_OUTPUT})
def multihead_cross_attention() -> nn.Module:
    """PyTorch's module with other keys: its one weight is split in the graph."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        q, k = m.embed(x), m.other(x)
        return m.head(m.attention(q, k, k, need_weights=False)[0])
    return Net(forward, embed=nn.Linear(6, 8), other=nn.Linear(6, 8), head=nn.Linear(8, 5),
               attention=nn.MultiheadAttention(8, 4, batch_first=True))


@table(TOKENS, keeps={"head": IS_OUTPUT})
def multihead_attention_with_weights() -> nn.Module:
    """Its averaged weights are an output, too: the mean is over the heads."""
    def forward(m: Net, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = m.embed(x)
        y, scores = m.attention(x, x, x)
        return m.head(y), scores
    return Net(forward, embed=nn.Linear(6, 8), head=nn.Linear(8, 5),
               attention=nn.MultiheadAttention(8, 4, batch_first=True))


@table(TOKENS, keeps={"head": IS_OUTPUT})
def multihead_attention_with_biases_of_keys() -> nn.Module:
    """Learned keys and values, and zeros, stand behind the tokens."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = m.embed(x)
        return m.head(m.attention(x, x, x, need_weights=False)[0])
    return Net(forward, embed=nn.Linear(6, 8), head=nn.Linear(8, 5),
               attention=nn.MultiheadAttention(8, 4, batch_first=True, add_bias_kv=True,
                                               add_zero_attn=True))


@table(TOKENS, keeps={"head": IS_OUTPUT}, shrinks="layer.linear1")
def transformer_encoder_layer() -> nn.Module:
    """PyTorch's own layer, norms first."""
    return Net(lambda m, x: m.head(m.layer(m.embed(x))), embed=nn.Linear(6, 8),
               layer=nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True),
               head=nn.Linear(8, 5))


@table(TOKENS, (2, 3, 8), keeps={"head": IS_OUTPUT}, shrinks="layer.linear1")
def transformer_decoder_layer() -> nn.Module:
    """PyTorch's own layer with a memory from outside, norms behind."""
    return Net(lambda m, x, y: m.head(m.layer(m.embed(x), y)), embed=nn.Linear(6, 8),
               layer=nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), head=nn.Linear(8, 5))


@table(TOKENS, keeps={"out": IS_OUTPUT})
def rotary_embedding_by_complex_numbers() -> nn.Module:
    """Llama's: pairs of dimensions as complex numbers."""
    turn = torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(0))

    def rotate(m: Net, x: torch.Tensor) -> torch.Tensor:
        z = torch.view_as_complex(x.unflatten(-1, (2, 2))) * torch.view_as_complex(m.turn)
        return torch.view_as_real(z).flatten(-2)
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).view(2, 4, 2, 4).transpose(1, 2) for layer in (m.q, m.k, m.v))
        y = F.scaled_dot_product_attention(rotate(m, q), rotate(m, k), v)
        return m.out(y.transpose(1, 2).flatten(2))
    return Net(forward, q=nn.Linear(6, 8), k=nn.Linear(6, 8), v=nn.Linear(6, 8), turn=turn,
               out=nn.Linear(8, 5))


@table(TOKENS, shrinks="q1 v", keeps={"out": IS_OUTPUT})
def two_attentions_share_keys() -> nn.Module:
    """Two query layers over one pair of keys and values; the results are added."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        q1, q2, k, v = (
            layer(x).view(2, 4, 4, 2).transpose(1, 2) for layer in (m.q1, m.q2, m.k, m.v)
        )
        y = F.scaled_dot_product_attention(q1, k, v) + F.scaled_dot_product_attention(q2, k, v)
        return m.out(y.transpose(1, 2).flatten(2))
    return Net(forward, q1=nn.Linear(6, 8), q2=nn.Linear(6, 8), k=nn.Linear(6, 8),
               v=nn.Linear(6, 8), out=nn.Linear(8, 5))


@table((2, 6), shrinks="a", keeps={"c": IS_OUTPUT})
def slices_of_a_weight() -> nn.Module:
    """Rows of one weight are used by two calls."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(m.a(x))
        p, q = F.linear(x, m.w[:5], m.b[:5]), F.linear(x, m.w[5:], m.b[5:])
        return m.c(torch.cat([torch.tanh(p), F.relu(q)], 1))
    return Net(forward, a=nn.Linear(6, 8), w=weights(12, 8), b=weights(12), c=nn.Linear(12, 5))


@table((2, 3, 4, 4), keeps={"c": IS_OUTPUT})
def one_weight_as_conv_and_linear() -> nn.Module:
    """One weight is a pointwise convolution and a linear layer."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(m.a(x))
        image = F.conv2d(y, m.w[:, :, None, None])
        gate = torch.sigmoid(F.linear(y.mean((2, 3)), m.w))
        return m.c(image * gate[:, :, None, None])
    return Net(forward, a=conv(3, 8), w=weights(6, 8), c=conv(6, 5))


@table(IMAGE, keeps={"a": "a buffer of the model's state holds one number for each",
                     "c": IS_OUTPUT})
def state_of_channels() -> nn.Module:
    """A running mean that the model itself writes: its width is the state's."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        m.seen.mul_(0.9).add_(y.mean((0, 2, 3)), alpha=0.1)
        return m.c(F.relu(y - m.seen[:, None, None]))
    return Net(forward, a=conv(3, 8), seen=torch.zeros(8), c=conv(8, 5))


@table(IMAGE, keeps={"a": "the scale of its channels is an output, too", "c": IS_OUTPUT})
def scale_is_an_output() -> nn.Module:
    """A weight is used, and returned."""
    return Net(lambda m, x: (m.c(m.a(x) * m.gamma[:, None, None]), m.gamma * 2),
               a=conv(3, 8), gamma=weights(8), c=conv(8, 5))


@table(IMAGE, keeps={"c": IS_OUTPUT})
def max_unpool() -> nn.Module:
    """Indices of maxima, within each channel, put values back."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y, where = F.max_pool2d(m.a(x), 2, return_indices=True)
        return m.c(F.max_unpool2d(F.relu(y), where, 2))
    return Net(forward, a=conv(3, 8), c=conv(8, 5))


@table(IMAGE, keeps={"a": MIXES, "c": IS_OUTPUT})
def pool_over_channels() -> nn.Module:
    """A pool slides over the channels."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x).flatten(2).transpose(1, 2)
        return m.c(F.avg_pool1d(y, 2).transpose(1, 2).unflatten(2, (8, 8)))
    return Net(forward, a=conv(3, 8), c=conv(4, 5))


@table(IMAGE, keeps={"a": MIXES, "c": IS_OUTPUT})
def statistics_over_channels() -> nn.Module:
    """logsumexp, prod, std, median and norm over the channels."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        parts = [y.logsumexp(1), y.prod(1), y.std(1), y.median(1)[0], y.norm(dim=1)]
        return m.c(torch.stack(parts, 1))
    return Net(forward, a=conv(3, 8), c=conv(5, 5))


@table(IMAGE, shrinks="a b", keeps={"c": IS_OUTPUT})
def products_summed_over_channels() -> nn.Module:
    """A correlation: two layers multiplied and summed over the channels."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        a, b = m.a(x), m.b(x)
        cost = torch.stack([(a * b.roll(shift, 3)).sum(1) for shift in (-1, 0, 1)], 1)
        return m.c(F.relu(cost))
    return Net(forward, a=conv(3, 8), b=conv(3, 8), c=conv(3, 5))


@table(IMAGE, shrinks="a", keeps={"d": "the model returns it whole"})
def a_loss_is_returned() -> nn.Module:
    """One number, the sum of everything, beside the output."""
    def forward(m: Net, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = m.a(x)
        return m.d(F.relu(y)), y.square().sum()
    return Net(forward, a=conv(3, 8), d=conv(8, 5))


@table(TOKENS, shrinks="a", keeps={"c": IS_OUTPUT})
def norm_of_merged_tokens() -> nn.Module:
    """Tokens and batch are merged for a batch norm, and parted again."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.n(m.a(x).reshape(-1, 8)).view(2, 4, 8)
        return m.c(F.relu(y))
    return Net(forward, a=nn.Linear(6, 8), n=nn.BatchNorm1d(8), c=nn.Linear(8, 5))


@table(TOKENS, keeps={"c": IS_OUTPUT})
def bilinear_layer() -> nn.Module:
    """A bilinear layer: its weight is [outputs, left, right]."""
    return Net(lambda m, x: m.c(torch.tanh(m.d(m.a(x), m.b(x)))), a=nn.Linear(6, 8),
               b=nn.Linear(6, 4), d=nn.Bilinear(8, 4, 6), c=nn.Linear(6, 5))


@table(TOKENS, shrinks="a b", keeps={"c": IS_OUTPUT})
def products_of_three() -> nn.Module:
    """An einsum over two activations and a weight (low-rank bilinear pooling)."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        return m.c(torch.einsum("bti,btj,ijk->btk", m.a(x), m.b(x), m.w))
    return Net(forward, a=nn.Linear(6, 8), b=nn.Linear(6, 4), w=weights(8, 4, 6),
               c=nn.Linear(6, 5))


@table((2, 6), shrinks="a", keeps={"c": IS_OUTPUT})
def addmm_and_addbmm() -> nn.Module:
    """The products with a sum in one call."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = torch.addmm(m.bias, F.relu(m.a(x)), m.w, beta=0.5, alpha=2.0)
        return m.c(F.relu(y))
    return Net(forward, a=nn.Linear(6, 8), w=weights(8, 12), bias=weights(12), c=nn.Linear(12, 5))


@table((2, 6), shrinks="a", keeps={"c": IS_OUTPUT})
def vectors() -> nn.Module:
    """A matrix times a vector of weights, and no batch dimension at all behind it."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(m.a(x))
        return m.c(y) * (y @ m.v).unsqueeze(1)
    return Net(forward, a=nn.Linear(6, 8), v=weights(8), c=nn.Linear(8, 5))


@table((6,), shrinks="a b", keeps={"c": IS_OUTPUT})
def no_batch() -> nn.Module:
    """Linear layers on one vector: dimension 0 holds the channels."""
    return Net(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x)).flip(0)))),
               a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 5))


@table((3, 8, 8), shrinks="a", keeps={"c": IS_OUTPUT})
def image_without_batch() -> nn.Module:
    """Convolutions on [C, H, W], with a linear layer behind a flatten of everything."""
    return Net(lambda m, x: m.c(F.max_pool2d(F.relu(m.a(x)), 4).flatten()),
               a=conv(3, 8), c=nn.Linear(32, 5))


@table(IMAGE, shrinks="a", keeps={"c": IS_OUTPUT})
def depthwise_transposed() -> nn.Module:
    """A transposed convolution with a group for each channel."""
    return Net(lambda m, x: m.c(F.relu(m.up(m.a(x)))), a=conv(3, 8),
               up=nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8), c=conv(8, 5))


@table(IMAGE, keeps={"c": IS_OUTPUT})
def sinusoids_of_channels() -> nn.Module:
    """A position code computed from the number of channels, at run time."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        rate = torch.exp(-torch.arange(y.shape[1], dtype=y.dtype) / y.shape[1])
        return m.c(y + torch.sin(rate)[:, None, None])
    return Net(forward, a=conv(3, 8), c=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"c": IS_OUTPUT})
def constant_along_channels() -> nn.Module:
    """zeros_like, ones_like, full_like and new_zeros of what has channels."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        z = torch.cat([y, torch.zeros_like(y), y.new_ones(y.shape)], 1)
        return m.c(F.relu(z) + torch.full_like(z, 0.5))
    return Net(forward, a=conv(3, 8), c=conv(24, 5))


@table(IMAGE, shrinks="a", keeps={"c": IS_OUTPUT})
def concatenated_along_width() -> nn.Module:
    """Two layers side by side along the image: their channels are tied."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        return m.c(F.relu(torch.cat([m.a(x), m.b(x)], 3)))
    return Net(forward, a=conv(3, 8), b=conv(3, 8), c=conv(8, 5))


@table(IMAGE, shrinks="a b", keeps={"c": IS_OUTPUT})
def reader_of_parts() -> nn.Module:
    """Parts that overlap: channels 0 to 5 and 3 to 9 of ten, each with a reader."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(m.a(x))
        return m.c(m.b(y[:, :6]) + m.d(y[:, 3:]))
    return Net(forward, a=conv(3, 10), b=conv(6, 8), d=conv(7, 8), c=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"c": IS_OUTPUT})
def tied_parts_of_one_layer() -> nn.Module:
    """Overlapping parts are added: channel i and i + 4 of twelve are one chain of three."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        return m.c(F.relu(y[:, :8] * y[:, 4:]))
    return Net(forward, a=conv(3, 12), c=conv(8, 5))


@table(IMAGE, keeps={"c": IS_OUTPUT})
def parts_that_tie_everything() -> nn.Module:
    """Neighbours are added, so that all channels are one: none can go."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        return m.c(y[:, 1:] + y[:, :-1])
    return Net(forward, a=conv(3, 8), c=conv(7, 5))


@table(IMAGE, shrinks="a b", keeps={"c": IS_OUTPUT})
def dead_channels() -> nn.Module:
    """Some channels are read by nobody, a whole layer's result neither."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(m.a(x))
        m.d(y).sum()
        return m.c(F.relu(m.b(y[:, 2:8])))
    return Net(forward, a=conv(3, 10), b=conv(6, 6), d=conv(10, 4), c=conv(6, 5))


@table(IMAGE, shrinks="a", keeps={"c": IS_OUTPUT})
def double_flatten() -> nn.Module:
    """Two values with channels at different places, flattened, concatenated, read as one."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = F.max_pool2d(m.a(x), 4)
        return m.c(torch.cat([y.permute(0, 2, 3, 1).flatten(1), y.flatten(1).flip(1)], 1))
    return Net(forward, a=conv(3, 8), c=nn.Linear(64, 5))


@table(IMAGE, shrinks="a", keeps={"c": IS_OUTPUT})
def upsampled_by_repeats() -> nn.Module:
    """Nearest upsampling by hand: expand and reshape of the image's places."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = F.max_pool2d(m.a(x), 2)
        y = y[:, :, :, None, :, None].expand(2, 8, 4, 2, 4, 2).reshape(2, 8, 8, 8)
        return m.c(y)
    return Net(forward, a=conv(3, 8), c=conv(8, 5))


@table(IMAGE, (2, 8, 8, 8), shrinks="", keeps={"a": "the caller's input is concatenated along "
                                                    "another dimension", "c": IS_OUTPUT})
def input_beside_it() -> nn.Module:
    """An input of the model stands beside a layer's output along the width."""
    return Net(lambda m, x, y: m.c(F.relu(torch.cat([m.a(x), y], 2))), a=conv(3, 8), c=conv(8, 5))


@table((1, 3, 8, 8), shrinks="a", keeps={"c": IS_OUTPUT})
def batch_of_one_squeezed() -> nn.Module:
    """A batch of one is squeezed away, and channels stand first."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x).squeeze(0)
        return m.c(F.relu(y * y.mean((1, 2), keepdim=True)).unsqueeze(0))
    return Net(forward, a=conv(3, 8), c=conv(8, 5))


@table(TOKENS, shrinks="a lstm.weight_hh_l0@1", keeps={"c": IS_OUTPUT})
def lstm() -> nn.Module:
    """A recurrent layer: its weights are blocks of four gates."""
    return Net(lambda m, x: m.c(m.lstm(m.a(x))[0]),
               a=nn.Linear(6, 8), lstm=nn.LSTM(8, 6, batch_first=True), c=nn.Linear(6, 5))


@table(TOKENS, shrinks="a lstm.weight_ih_l1_reverse@1", keeps={"c": IS_OUTPUT})
def deep_lstm_in_both_directions() -> nn.Module:
    """All layers and directions share one width, and the next layer reads two of them."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y, (h, _) = m.lstm(F.relu(m.a(x)))
        return m.c(torch.cat([y[-1], h[-1]], 1))
    lstm = nn.LSTM(8, 6, num_layers=2, bidirectional=True)
    return Net(forward, a=nn.Linear(6, 8), lstm=lstm, c=nn.Linear(18, 5))


@table(TOKENS, shrinks="gru.weight_hh_l0@1", keeps={"c": IS_OUTPUT})
def gru_with_a_state() -> nn.Module:
    """The first state is computed by a layer, whose rows go with the units."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        return m.c(m.gru(x, m.first(x[0])[None])[1][0])
    return Net(forward, gru=nn.GRU(6, 8), first=nn.Linear(6, 8), c=nn.Linear(8, 5))


@table(TOKENS, shrinks="", keeps={"c": IS_OUTPUT})
def projected_lstm() -> nn.Module:
    """An LSTM whose state is projected is left alone."""
    return Net(lambda m, x: m.c(m.lstm(m.a(x))[0]),
               a=nn.Linear(6, 8), lstm=nn.LSTM(8, 6, proj_size=4), c=nn.Linear(4, 5))
