"""Subjects: convolutions of every kind, and the sums, norms and gates between them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from tests.pruning.subject import BAKED, IS_OUTPUT, MIXES, Net, Table, conv, weights

table = Table()
IMAGE = (2, 3, 8, 8)


@table(IMAGE, shrinks="a b", keeps={"c": IS_OUTPUT})
def conv_chain() -> nn.Module:
    """Three convolutions, an activation between."""
    return Net(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))),
               a=conv(3, 8), b=conv(8, 12), c=conv(12, 5))


@table(IMAGE, shrinks="a b", keeps={"c": IS_OUTPUT})
def conv_chain_without_bias() -> nn.Module:
    """No biases: what is removed computes a plain product."""
    return Net(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))),
               a=conv(3, 8, bias=False), b=conv(8, 8, bias=False), c=conv(8, 5, bias=False))


@table(IMAGE, shrinks="a b", keeps={"c": IS_OUTPUT})
def conv_bn_relu() -> nn.Module:
    """Batch norms: five vectors follow each channel."""
    return Net(lambda m, x: m.c(F.relu(m.bn(m.b(F.relu(m.an(m.a(x))))))),
               a=conv(3, 8, bias=False), an=nn.BatchNorm2d(8), b=conv(8, 8), bn=nn.BatchNorm2d(8),
               c=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def conv_bn_without_affine() -> nn.Module:
    """A batch norm without scale and shift: a channel of zeros is not zero behind it."""
    return Net(lambda m, x: m.b(m.n(m.a(x))),
               a=conv(3, 8), n=nn.BatchNorm2d(8, affine=False), b=conv(8, 5))


@table((2, 6), shrinks="a b", keeps={"c": IS_OUTPUT})
def linear_chain() -> nn.Module:
    """Linear layers, one without bias."""
    return Net(lambda m, x: m.c(F.gelu(m.b(torch.tanh(m.a(x))))),
               a=nn.Linear(6, 8), b=nn.Linear(8, 8, bias=False), c=nn.Linear(8, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def not_zero_at_zero() -> nn.Module:
    """A sigmoid: zero weights leave one half in a channel, so only its reader can be zeroed."""
    return Net(lambda m, x: m.b(torch.sigmoid(m.a(x))), a=conv(3, 8), b=conv(8, 5))


@table(IMAGE, shrinks="stem a1 a2 b1 b2", keeps={"head": IS_OUTPUT})
def residual_chain() -> nn.Module:
    """Two sums share one width, stem and all branches must lose the same channels."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(m.stem(x))
        x = F.relu(x + m.a2(F.relu(m.a1(x))))
        x = F.relu(m.b2(F.relu(m.b1(x))) + x)
        return m.head(x)
    return Net(forward, stem=conv(3, 8), a1=conv(8, 6), a2=conv(6, 8), b1=conv(8, 10),
               b2=conv(10, 8), head=conv(8, 5, 1))


@table(IMAGE, shrinks="stem a1 a2 short", keeps={"head": IS_OUTPUT})
def residual_projection() -> nn.Module:
    """The shortcut is a strided convolution of its own, with a batch norm."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(m.stem(x))
        return m.head(F.relu(m.norm(m.short(x)) + m.a2(F.relu(m.a1(x)))))
    return Net(forward, stem=conv(3, 8), a1=conv(8, 6, stride=2), a2=conv(6, 12),
               short=conv(8, 12, 1, stride=2, bias=False), norm=nn.BatchNorm2d(12),
               head=conv(12, 5, 1))


@table(IMAGE, shrinks="a1", keeps={"head": IS_OUTPUT})
def option_a_shortcut() -> nn.Module:
    """The shortcut is a strided slice with zero channels padded on both sides (8 → 12)."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(m.stem(x))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return m.head(F.relu(short + m.a2(F.relu(m.a1(x)))))
    return Net(forward, stem=conv(3, 8), a1=conv(8, 6, stride=2), a2=conv(6, 12),
               head=conv(12, 5, 1))


@table(IMAGE, shrinks="a b c", keeps={"head": IS_OUTPUT})
def dense_concatenation() -> nn.Module:
    """Each layer reads all outputs before it, at offsets that move."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        x = torch.cat([x, m.b(F.relu(m.bn(x)))], 1)
        x = torch.cat([x, m.c(F.relu(m.cn(x)))], 1)
        return m.head(x)
    return Net(forward, a=conv(3, 8), bn=nn.BatchNorm2d(8), b=conv(8, 4), cn=nn.BatchNorm2d(12),
               c=conv(12, 6), head=conv(18, 5, 1))


@table(IMAGE, shrinks="stem a b c d", keeps={"head": IS_OUTPUT})
def inception_branches() -> nn.Module:
    """Four branches of unequal widths, one behind a pool, concatenated."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        y = [m.a(x), m.c(F.relu(m.b(x))), m.d(F.max_pool2d(x, 3, 1, 1)), F.avg_pool2d(x, 3, 1, 1)]
        return m.head(F.relu(torch.cat(y, 1)))
    return Net(forward, stem=conv(3, 6), a=conv(6, 4, 1), b=conv(6, 6, 1), c=conv(6, 8),
               d=conv(6, 2, 1), head=conv(20, 5, 1))


@table((2, 6, 8, 8), shrinks="b", keeps={"c": IS_OUTPUT})
def concatenation_with_the_input() -> nn.Module:
    """The model's input stands in front of what is pruned: its channels stay, offsets move."""
    return Net(lambda m, x: m.c(torch.cat([x, m.b(x), x], 1)), b=conv(6, 8), c=conv(20, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def concatenation_with_itself() -> nn.Module:
    """One value stands twice in a concatenation: its channels go in both places."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        return m.b(torch.cat([F.relu(x), F.relu(-x)], 1))
    return Net(forward, a=conv(3, 8), b=conv(16, 5))


@table(IMAGE, shrinks="a b d", keeps={"head": IS_OUTPUT})
def depthwise() -> nn.Module:
    """A depthwise convolution: its rows follow its inputs."""
    return Net(lambda m, x: m.head(F.relu(m.b(F.relu6(m.dn(m.d(F.relu6(m.a(x)))))))),
               a=conv(3, 8), d=conv(8, 8, groups=8, bias=False), dn=nn.BatchNorm2d(8),
               b=conv(8, 6, 1), head=conv(6, 5, 1))


@table(IMAGE, shrinks="a d", keeps={"head": IS_OUTPUT}, groups={"d": 3})
def depthwise_multiplier() -> nn.Module:
    """Three outputs for each input: rows 3i, 3i+1, 3i+2 stand for channel i."""
    return Net(lambda m, x: m.head(F.relu(m.d(m.a(x)))),
               a=conv(3, 8), d=conv(8, 24, groups=8), head=conv(24, 5, 1))


@table(IMAGE, shrinks="a b c", keeps={"head": IS_OUTPUT})
def grouped() -> nn.Module:
    """A ResNeXt block: a convolution in four groups between two pointwise ones."""
    return Net(lambda m, x: m.head(F.relu(m.c(F.relu(m.b(F.relu(m.a(x))))))),
               a=conv(3, 16, 1), b=conv(16, 16, groups=4), c=conv(16, 8, 1), head=conv(8, 5, 1))


@table(IMAGE, shrinks="a b", keeps={"head": IS_OUTPUT})
def grouped_to_fewer() -> nn.Module:
    """Groups of four inputs and two outputs."""
    return Net(lambda m, x: m.head(F.relu(m.b(F.relu(m.a(x))))),
               a=conv(3, 16, 1), b=conv(16, 8, groups=4), head=conv(8, 5, 1))


@table(IMAGE, shrinks="a", keeps={"head": IS_OUTPUT})
def grouped_behind_a_sum() -> nn.Module:
    """A grouped convolution inside a residual: its groups tie the width of the sum."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        return m.head(F.relu(x + m.b(F.relu(x))))
    return Net(forward, a=conv(3, 16, 1), b=conv(16, 16, groups=4), head=conv(16, 5, 1))


@table(IMAGE, keeps={"b": IS_OUTPUT})
def grouped_output() -> nn.Module:
    """The output is a grouped convolution: its groups stay, and each needs an input."""
    return Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(3, 16, 1), b=conv(16, 8, groups=4))


@table(IMAGE, shrinks="a up", keeps={"head": IS_OUTPUT})
def transposed() -> nn.Module:
    """A transposed convolution: its weight is [inputs, outputs, …]."""
    return Net(lambda m, x: m.head(F.relu(m.up(F.relu(m.a(x))))),
               a=conv(3, 8), up=nn.ConvTranspose2d(8, 12, 2, stride=2), head=conv(12, 5, 1))


@table(IMAGE, shrinks="a", keeps={"head": IS_OUTPUT})
def transposed_grouped() -> nn.Module:
    """A transposed convolution in groups: [inputs, outputs / groups, …]."""
    return Net(lambda m, x: m.head(F.relu(m.up(F.relu(m.a(x))))),
               a=conv(3, 8), up=nn.ConvTranspose2d(8, 12, 2, stride=2, groups=4),
               head=conv(12, 5, 1))


@table((2, 3, 16), shrinks="a b", keeps={"c": IS_OUTPUT})
def conv1d() -> nn.Module:
    """Convolutions over time, dilated."""
    return Net(lambda m, x: m.c(F.relu(m.n(m.b(F.relu(m.a(x)))))),
               a=nn.Conv1d(3, 8, 3), b=nn.Conv1d(8, 8, 3, dilation=2), n=nn.BatchNorm1d(8),
               c=nn.Conv1d(8, 5, 1))


@table((1, 3, 4, 6, 6), shrinks="a b", keeps={"c": IS_OUTPUT})
def conv3d() -> nn.Module:
    """Convolutions over volumes, and a transposed one."""
    return Net(lambda m, x: m.c(F.relu(m.b(F.relu(m.n(m.a(x)))))),
               a=nn.Conv3d(3, 8, 3, padding=1), n=nn.BatchNorm3d(8),
               b=nn.ConvTranspose3d(8, 6, 2, stride=2), c=nn.Conv3d(6, 5, 1))


@table(IMAGE, shrinks="a b", keeps={"c": IS_OUTPUT})
def dilated() -> nn.Module:
    """Dilated and circularly padded convolutions."""
    return Net(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))),
               a=conv(3, 8, padding=2, dilation=2), b=conv(8, 8, padding_mode="circular"),
               c=conv(8, 5))


@table(IMAGE, shrinks="a down up", keeps={"head": IS_OUTPUT})
def squeeze_excitation() -> nn.Module:
    """A gate from the pooled channels: its rows are tied to what it multiplies."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(m.a(x))
        gate = torch.sigmoid(m.up(F.relu(m.down(F.adaptive_avg_pool2d(x, 1)))))
        return m.head(x * gate)
    return Net(forward, a=conv(3, 8), down=conv(8, 4, 1), up=conv(4, 8, 1), head=conv(8, 5, 1))


@table(IMAGE, shrinks="a down up", keeps={"head": IS_OUTPUT})
def squeeze_excitation_by_linears() -> nn.Module:
    """The gate by linear layers and a hard sigmoid: views from four dimensions to two and back."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = F.hardswish(m.a(x))
        gate = F.hardsigmoid(m.up(F.relu(m.down(x.mean((2, 3))))))
        return m.head(x * gate.view(x.shape[0], -1, 1, 1))
    return Net(forward, a=conv(3, 8), down=nn.Linear(8, 4), up=nn.Linear(4, 8), head=conv(8, 5, 1))


@table(IMAGE, shrinks="a d b", keeps={"head": IS_OUTPUT})
def mobilenet_v3_block() -> nn.Module:
    """Expand, depthwise, squeeze and excite, project, add."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = F.hardswish(m.stem(x))
        y = F.hardswish(m.n1(m.a(x)))
        y = F.hardswish(m.n2(m.d(y)))
        y = y * F.hardsigmoid(m.up(F.relu(m.down(F.adaptive_avg_pool2d(y, 1)))))
        return m.head(x + m.n3(m.b(y)))
    return Net(forward, stem=conv(3, 6), a=conv(6, 12, 1, bias=False), n1=nn.BatchNorm2d(12),
               d=conv(12, 12, groups=12, bias=False), n2=nn.BatchNorm2d(12), down=conv(12, 4, 1),
               up=conv(4, 12, 1), b=conv(12, 6, 1, bias=False), n3=nn.BatchNorm2d(6),
               head=conv(6, 5, 1))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def glu_by_chunk() -> nn.Module:
    """A gate by chunk: channel i and channel i + 6 go together."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        value, gate = m.a(x).chunk(2, dim=1)
        return m.b(value * torch.sigmoid(gate))
    return Net(forward, a=conv(3, 12), b=conv(6, 5))


@table((2, 6), shrinks="a", keeps={"b": IS_OUTPUT})
def glu() -> nn.Module:
    """The same as one operator, along the last dimension."""
    return Net(lambda m, x: m.b(F.glu(m.a(x), -1)), a=nn.Linear(6, 16), b=nn.Linear(8, 5))


@table((2, 6), shrinks="gate up", keeps={"down": IS_OUTPUT})
def swiglu() -> nn.Module:
    """Two layers whose outputs are multiplied: their channels go together."""
    return Net(lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)),
               gate=nn.Linear(6, 12, bias=False), up=nn.Linear(6, 12), down=nn.Linear(12, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT}, groups={"a": 3})
def maxout() -> nn.Module:
    """The largest of three consecutive channels: whole groups go."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        return m.b(y.reshape(y.shape[0], 4, 3, 8, 8).amax(2))
    return Net(forward, a=conv(3, 12), b=conv(4, 5))


@table(IMAGE, keeps={"c": IS_OUTPUT})
def layer_norm_of_channels() -> nn.Module:
    """ConvNeXt's norm: mean and variance over the channels, between two permutes."""
    return Net(lambda m, x: m.c(m.b(m.n(m.a(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)),
               a=conv(3, 8), n=nn.LayerNorm(8), b=nn.Linear(8, 8), c=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT}, groups={"a": 4})
def group_norm() -> nn.Module:
    """Statistics over four channels each: whole groups may go, and the number of groups falls."""
    return Net(lambda m, x: m.b(F.relu(m.n(m.a(x)))),
               a=conv(3, 16), n=nn.GroupNorm(4, 16), b=conv(16, 5))


@table(IMAGE, keeps={"a": MIXES, "b": IS_OUTPUT})
def group_norm_of_one_group() -> nn.Module:
    """One group of all channels."""
    return Net(lambda m, x: m.b(F.relu(m.n(m.a(x)))),
               a=conv(3, 8), n=nn.GroupNorm(1, 8), b=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def instance_norm() -> nn.Module:
    """Statistics per channel: any may go."""
    return Net(lambda m, x: m.b(F.relu(m.n(m.a(x)))),
               a=conv(3, 8), n=nn.InstanceNorm2d(8, affine=True), b=conv(8, 5))


@table((2, 4, 6), keeps={"b": IS_OUTPUT})
def rms_norm_by_hand() -> nn.Module:
    """The mean of squares over the channels."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        return m.b(m.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)))
    return Net(forward, a=nn.Linear(6, 8), scale=weights(8), b=nn.Linear(8, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def prelu() -> nn.Module:
    """A slope for each channel."""
    return Net(lambda m, x: m.b(m.slope(m.a(x))), a=conv(3, 8), slope=nn.PReLU(8), b=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def prelu_with_one_slope() -> nn.Module:
    """One slope for all channels: it stays."""
    return Net(lambda m, x: m.b(m.slope(m.a(x))), a=conv(3, 8), slope=nn.PReLU(), b=conv(8, 5))


@table(IMAGE, shrinks="stem a1 a2", keeps={"head": IS_OUTPUT})
def layer_scale() -> nn.Module:
    """A learned factor for each channel of a branch, written γ[:, None, None]."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        return m.head(x + m.gamma[:, None, None] * m.a2(F.gelu(m.a1(x))))
    return Net(forward, stem=conv(3, 8), gamma=weights(8), a1=conv(8, 12), a2=conv(12, 8),
               head=conv(8, 5))


@table(IMAGE, shrinks="pw1", keeps={"head": IS_OUTPUT})
def convnext_block() -> nn.Module:
    """Depthwise, permute, norm, two linear layers, layer scale, permute, add."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        y = m.n(m.d(x).permute(0, 2, 3, 1))
        y = m.gamma * m.pw2(F.gelu(m.pw1(y)))
        return m.head(x + y.permute(0, 3, 1, 2))
    return Net(forward, stem=conv(3, 8), d=conv(8, 8, 7, groups=8), n=nn.LayerNorm(8),
               pw1=nn.Linear(8, 16), pw2=nn.Linear(16, 8), gamma=weights(8), head=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"pw1": MIXES, "head": IS_OUTPUT})
def global_response_norm() -> nn.Module:
    """ConvNeXt V2's GRN divides each channel by the mean over all of them."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = F.gelu(m.pw1(m.a(x).permute(0, 2, 3, 1)))
        g = y.norm(p=2, dim=(1, 2), keepdim=True)
        y = m.gamma * (y * (g / (g.mean(-1, keepdim=True) + 1e-6))) + m.beta + y
        return m.head(y).permute(0, 3, 1, 2)
    return Net(forward, a=conv(3, 8), pw1=nn.Linear(8, 16), gamma=weights(16), beta=weights(16),
               head=nn.Linear(16, 5))


@table(IMAGE, shrinks="a shared", keeps={"b": IS_OUTPUT})
def shared_conv() -> nn.Module:
    """One convolution called twice: its rows are its own columns."""
    return Net(lambda m, x: m.b(F.relu(m.shared(F.relu(m.shared(F.relu(m.a(x))))))),
               a=conv(3, 8), shared=conv(8, 8), b=conv(8, 5))


@table(IMAGE, shrinks="a b shared", keeps={"c": IS_OUTPUT, "d": IS_OUTPUT})
def shared_conv_ties_two_widths() -> nn.Module:
    """One convolution reads two layers: both must lose the same channels."""
    return Net(lambda m, x: (m.c(m.shared(F.relu(m.a(x)))), m.d(m.shared(torch.tanh(m.b(x))))),
               a=conv(3, 8), b=conv(3, 8), shared=conv(8, 6), c=conv(6, 5), d=conv(6, 4))


@table(IMAGE, shrinks="a b", keeps={"c": IS_OUTPUT})
def shared_norm() -> nn.Module:
    """One batch norm behind two convolutions."""
    return Net(lambda m, x: m.c(F.relu(m.n(m.a(x))) * torch.sigmoid(m.n(m.b(x)))),
               a=conv(3, 8), b=conv(3, 8), n=nn.BatchNorm2d(8), c=conv(8, 5))


@table(IMAGE, keeps={"c": IS_OUTPUT})
def weight_norm() -> nn.Module:
    """The weight is computed in the graph from two constants."""
    return Net(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=conv(3, 8),
               b=parametrizations.weight_norm(conv(8, 8)), c=conv(8, 5))


@table(IMAGE, keeps={"c": IS_OUTPUT})
def weight_standardisation() -> nn.Module:
    """Mean and variance of each row of a weight are taken in the graph: its columns are mixed."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        mean = m.w.mean((1, 2, 3), keepdim=True)
        std = m.w.var((1, 2, 3), keepdim=True, unbiased=False).add(1e-5).sqrt()
        return m.c(F.relu(F.conv2d(F.relu(m.a(x)), (m.w - mean) / std, m.b, padding=1)))
    return Net(forward, a=conv(3, 8), w=weights(8, 8, 3, 3), b=weights(8), c=conv(8, 5))


@table((2, 4, 6), shrinks="a w@1", keeps={"b": IS_OUTPUT})
def einsum_contraction() -> nn.Module:
    """A linear layer written as an einsum, its weight [inputs, outputs]."""
    return Net(lambda m, x: m.b(F.relu(torch.einsum("btc,cd->btd", F.relu(m.a(x)), m.w))),
               a=nn.Linear(6, 8), w=weights(8, 12), b=nn.Linear(12, 5))


@table((2, 6), shrinks="a w@1", keeps={"b": IS_OUTPUT})
def matmul_with_a_weight() -> nn.Module:
    """x @ w + bias: the weight is [inputs, outputs]."""
    return Net(lambda m, x: m.b(F.relu(F.relu(m.a(x)) @ m.w + m.bias)),
               a=nn.Linear(6, 8), w=weights(8, 12), bias=weights(12), b=nn.Linear(12, 5))


@table((2, 6), shrinks="a w@0", keeps={"b": IS_OUTPUT})
def transposed_weight() -> nn.Module:
    """x @ w.t(): the weight is moved in the graph before it is read."""
    return Net(lambda m, x: m.b(F.relu(F.relu(m.a(x)) @ m.w.t())),
               a=nn.Linear(6, 8), w=weights(12, 8), b=nn.Linear(12, 5))


@table((2, 6), shrinks="a", keeps={"c": IS_OUTPUT})
def outer_product() -> nn.Module:
    """All products of two vectors, flattened: reader column 6i + j belongs to a's i and b's j."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        return m.c((m.a(x).unsqueeze(2) * m.b(x).unsqueeze(1)).flatten(1))
    return Net(forward, a=nn.Linear(6, 8), b=nn.Linear(6, 6), c=nn.Linear(48, 5))


@table(IMAGE, shrinks="a", keeps={"c": IS_OUTPUT})
def gram_matrix() -> nn.Module:
    """Bilinear pooling: f · gᵀ over space, flattened; columns belong to pairs."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        f, g = m.a(x).flatten(2), m.b(x).flatten(2)
        return m.c(torch.bmm(f, g.transpose(1, 2)).flatten(1))
    return Net(forward, a=conv(3, 8), b=conv(3, 4), c=nn.Linear(32, 5))


@table(IMAGE, shrinks="a b", keeps={"c": IS_OUTPUT})
def selective_kernels() -> nn.Module:
    """Two branches stacked, weighed by a softmax over the branches, and summed."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = torch.stack([F.relu(m.a(x)), F.relu(m.b(x))], 1)
        s = y.sum(1).mean((2, 3))
        w = m.up(F.relu(m.down(s))).view(-1, 2, 8).softmax(1)
        return m.c((y * w[:, :, :, None, None]).sum(1))
    return Net(forward, a=conv(3, 8), b=conv(3, 8, 5), down=nn.Linear(8, 4), up=nn.Linear(4, 16),
               c=conv(8, 5))


@table(IMAGE, shrinks="stem", keeps={"c": IS_OUTPUT})
def split_attention() -> nn.Module:
    """ResNeSt: radix 2, cardinality 2; a grouped layer, views, a softmax over the radix."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        batch = x.shape[0]
        y = F.relu(m.a(F.relu(m.stem(x))))
        parts = y.reshape(batch, 2, 8, 8, 8)
        gap = parts.sum(1).mean((2, 3), keepdim=True)
        w = m.up(F.relu(m.down(gap)))
        w = w.view(batch, 2, 2, -1).transpose(1, 2).softmax(1).reshape(batch, 2, 8, 1, 1)
        return m.c((parts * w).sum(1))
    return Net(forward, stem=conv(3, 8), a=conv(8, 16, groups=4), down=conv(8, 4, 1, groups=2),
               up=conv(4, 16, 1, groups=2), c=conv(8, 5))


@table(IMAGE, shrinks="a b up c", keeps={"head": IS_OUTPUT})
def unet() -> nn.Module:
    """Down, up by a transposed convolution, and the skip concatenated."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        a = F.relu(m.a(x))
        b = F.relu(m.b(F.max_pool2d(a, 2)))
        return m.head(F.relu(m.c(torch.cat([a, m.up(b)], 1))))
    return Net(forward, a=conv(3, 6), b=conv(6, 12), up=nn.ConvTranspose2d(12, 6, 2, stride=2),
               c=conv(12, 8), head=conv(8, 5, 1))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def bilinear_resize() -> nn.Module:
    """Interpolation works on each channel alone."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = F.interpolate(m.a(x), scale_factor=2, mode="bilinear", align_corners=False)
        return m.b(F.interpolate(y, size=(6, 6), mode="nearest"))
    return Net(forward, a=conv(3, 8), b=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"grid": "its two channels are coordinates", "b": IS_OUTPUT})
def grid_sample() -> nn.Module:
    """Sampling at computed places: the image's channels are free, the grid's two are not."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        grid = torch.tanh(m.grid(x)).permute(0, 2, 3, 1)
        return m.b(F.grid_sample(m.a(x), grid, align_corners=False))
    return Net(forward, a=conv(3, 8), grid=conv(3, 2), b=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def pools_and_pads() -> nn.Module:
    """Pools of every kind, and constant, reflected and replicated pads."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = F.pad(m.a(x), (1, 1, 0, 1), value=0.5)
        y = F.pad(y, (1, 1, 1, 1), mode="reflect") + F.pad(y, (1, 1, 1, 1), mode="replicate")
        return m.b(F.adaptive_max_pool2d(F.max_pool2d(F.avg_pool2d(y, 2), 2), (2, 1)))
    return Net(forward, a=conv(3, 8), b=conv(8, 5, 1))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT, "one": "it is the only channel"})
def one_channel_broadcast() -> nn.Module:
    """A layer with one output, broadcast over all channels."""
    return Net(lambda m, x: m.b(m.a(x) * torch.sigmoid(m.one(x))),
               a=conv(3, 8), one=conv(3, 1), b=conv(8, 5))


@table(IMAGE, shrinks="a b", keeps={"c": IS_OUTPUT})
def odd_widths() -> nn.Module:
    """Seven channels, then twelve."""
    return Net(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))),
               a=conv(3, 7), b=conv(7, 12), c=conv(12, 5))


@table((2, 3, 8, 8), shrinks="a", keeps={"b": "the model's input is added to it", "c": IS_OUTPUT})
def model_input_added() -> nn.Module:
    """A sum with the model's own input, whose channels cannot go."""
    return Net(lambda m, x: m.c(x + m.b(F.relu(m.a(x)))), a=conv(3, 8), b=conv(8, 3), c=conv(3, 5))


@table((2, 1, 8, 8), shrinks="a", keeps={"b": IS_OUTPUT})
def model_input_broadcast() -> nn.Module:
    """The model's input has one channel, which is added to all of a layer's: any may go."""
    return Net(lambda m, x: m.b(F.relu(m.a(x) + x)), a=conv(1, 8), b=conv(8, 5))


@table(IMAGE, (2, 8), shrinks="", keeps={"a": "an input of the model scales it", "b": IS_OUTPUT})
def second_input_scales() -> nn.Module:
    """A second input of the model holds a factor for each channel: its width is the caller's."""
    return Net(lambda m, x, y: m.b(m.a(x) * y[:, :, None, None]), a=conv(3, 8), b=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def buffer_multiplied() -> nn.Module:
    """A buffer with a factor for each channel."""
    return Net(lambda m, x: m.b(m.a(x) * m.mask + m.shift),
               a=conv(3, 8), mask=torch.zeros(1, 8, 1, 1), shift=torch.zeros(8, 1, 1), b=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def broadcast_per_place() -> nn.Module:
    """A position table without a channel dimension, and scalars: nothing of them goes."""
    return Net(lambda m, x: m.b((m.a(x) + m.table) * 0.5 + m.one),
               a=conv(3, 8), table=weights(8, 8), one=weights(1), b=conv(8, 5))


@table(IMAGE, keeps={"b": IS_OUTPUT})
def mask_from_factories() -> nn.Module:
    """A mask over channels made by arange and zeros, whose sizes are baked into the graph."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        ramp = torch.arange(y.shape[1], dtype=y.dtype) / y.shape[1]
        zeros = torch.zeros(1, y.shape[1], 1, 1)
        return m.b(torch.where((ramp > 0.4)[:, None, None], y, zeros))
    return Net(forward, a=conv(3, 8), b=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def width_in_arithmetic() -> nn.Module:
    """A division by the number of channels: a number that pruning must leave as it is."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        return m.b(F.relu(y) / y.shape[1] ** 0.5)
    return Net(forward, a=conv(3, 8), b=conv(8, 5))


@table(IMAGE, shrinks="a", keeps={"b": IS_OUTPUT})
def sum_over_channels() -> nn.Module:
    """A sum over all channels beside another reader: those that go must count as zero, or stay."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(m.b0(F.relu(m.a(x))))
        return m.b(y) * y.sum(1, keepdim=True)
    return Net(forward, a=conv(3, 8), b0=conv(8, 8), b=conv(8, 5))


@table(IMAGE, shrinks="a b", keeps={"c": IS_OUTPUT})
def dropouts() -> nn.Module:
    """Dropout, of elements and of channels, does nothing in evaluation."""
    return Net(lambda m, x: m.c(m.d2(F.relu(m.b(m.d1(F.relu(m.a(x))))))),
               a=conv(3, 8), d1=nn.Dropout(0.3), b=conv(8, 8), d2=nn.Dropout2d(0.3), c=conv(8, 5))


@table((2, 3, 8, 8), shrinks="a b", keeps={"c": IS_OUTPUT}, dynamic_shapes={0: "batch"})
def dynamic_batch() -> nn.Module:
    """A symbolic batch, and a view that computes with it."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(m.b(F.relu(m.a(x)))), 4)
        return m.c(x.view(x.shape[0], -1))
    return Net(forward, a=conv(3, 8), b=conv(8, 6), c=nn.Linear(24, 5))


@table((2, 3, 16), shrinks="a b", keeps={"c": IS_OUTPUT},
       dynamic_shapes={0: "batch", 2: "length"})
def dynamic_length() -> nn.Module:
    """Symbolic batch and length: the flatten merges both, and channels stand last."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(m.a(x)).transpose(1, 2)
        y = m.b(x.reshape(-1, 8)).view(x.shape[0], x.shape[1], 12)
        return m.c(F.relu(y))
    return Net(forward, a=nn.Conv1d(3, 8, 3, padding=1), b=nn.Linear(8, 12), c=nn.Linear(12, 5))


@table(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)).bfloat16(),
       shrinks="a b", keeps={"c": IS_OUTPUT})
def brain_float() -> nn.Module:
    """Weights and activations in bfloat16."""
    return Net(lambda m, x: m.c(F.relu(m.n(m.b(F.relu(m.a(x)))))),
               a=conv(3, 8), b=conv(8, 8), n=nn.BatchNorm2d(8), c=conv(8, 5)).bfloat16()


@table(torch.randn(2, 6, generator=torch.Generator().manual_seed(3)).half(),
       shrinks="a b", keeps={"c": IS_OUTPUT})
def half_precision() -> nn.Module:
    """Linear layers in float16, with an island in float32."""
    return Net(lambda m, x: m.c(torch.softmax(m.b(F.relu(m.a(x))).float(), 0).half()),
               a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 5)).half()


@table(IMAGE, shrinks="a b", keeps={"c": IS_OUTPUT, "d": IS_OUTPUT})
def two_outputs() -> nn.Module:
    """Two heads over one trunk, as a dict with a list in it."""
    def forward(m: Net, x: torch.Tensor) -> dict[str, object]:
        x = F.relu(m.b(F.relu(m.a(x))))
        return {"maps": [m.c(x), m.d(F.max_pool2d(x, 2))], "name": "two"}
    return Net(forward, a=conv(3, 8), b=conv(8, 8), c=conv(8, 5), d=conv(8, 4))


@table(IMAGE, shrinks="a", keeps={"b": "its activation is an output, too", "c": IS_OUTPUT})
def inner_activation_is_output() -> nn.Module:
    """A list of outputs, one of them an inner activation."""
    def forward(m: Net, x: torch.Tensor) -> list[torch.Tensor]:
        y = F.relu(m.b(F.relu(m.a(x))))
        return [y, m.c(y)]
    return Net(forward, a=conv(3, 8), b=conv(8, 8), c=conv(8, 5))


@table(IMAGE, shrinks="a b", keeps={"c": IS_OUTPUT})
def pooled_channels_are_read_twice() -> nn.Module:
    """One value feeds a convolution, and, pooled and flattened, a linear layer."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(m.a(x))
        gate = m.b2(F.relu(m.b(F.adaptive_avg_pool2d(y, (2, 2)).flatten(1))))
        return m.c(y) * gate[:, :, None, None]
    return Net(forward, a=conv(3, 8), b=nn.Linear(32, 6), b2=nn.Linear(6, 5), c=conv(8, 5))


@table(IMAGE, keeps={"a": BAKED, "b": IS_OUTPUT})
def spatial_view_of_channels() -> nn.Module:
    """A view that turns channels into places: a convolution then slides over them."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        return m.b(m.a(x).reshape(x.shape[0], 2, 16, 16))
    return Net(forward, a=conv(3, 8), b=conv(2, 5))
