"""Subjects: attention in every spelling, embeddings, and what stands around them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.pruning.subject import IS_OUTPUT, MIXES, Net, Table, conv, weights

table = Table()
TOKENS = (2, 4, 6)  # batch, length, features of the input
WORDS = torch.tensor([[1, 5, 2, 0], [3, 3, 4, 6]])


@table(TOKENS, shrinks="attention.in_proj_weight@0", keeps={"head": IS_OUTPUT})
def multihead_attention() -> nn.Module:
    """PyTorch's own module: q, k and v are three blocks of one weight."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = m.embed(x)
        return m.head(x + m.attention(x, x, x, need_weights=False)[0])
    return Net(forward, embed=nn.Linear(6, 8), head=nn.Linear(8, 5),
               attention=nn.MultiheadAttention(8, 4, batch_first=True))


@table(TOKENS, shrinks="qkv", keeps={"head": IS_OUTPUT})
def qkv_as_three_heads_dims() -> nn.Module:
    """timm: one linear layer, reshape (B, T, 3, H, D), permute, unbind."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = m.embed(x)
        q, k, v = m.qkv(x).reshape(2, 4, 3, 4, 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return m.head(m.out(y.transpose(1, 2).reshape(2, 4, 8)))
    return Net(forward, embed=nn.Linear(6, 8), qkv=nn.Linear(8, 24), out=nn.Linear(8, 6),
               head=nn.Linear(6, 5))


@table(TOKENS, shrinks="qkv", keeps={"head": IS_OUTPUT})
def qkv_as_heads_three_dims() -> nn.Module:
    """The other order: reshape (B, T, H, 3, D)."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = m.embed(x)
        q, k, v = m.qkv(x).reshape(2, 4, 4, 3, 2).permute(3, 0, 2, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return m.head(m.out(y.transpose(1, 2).reshape(2, 4, 8)))
    return Net(forward, embed=nn.Linear(6, 8), qkv=nn.Linear(8, 24), out=nn.Linear(8, 6),
               head=nn.Linear(6, 5))


@table(TOKENS, shrinks="qkv", keeps={"head": IS_OUTPUT})
def qkv_heads_by_chunk() -> nn.Module:
    """One layer, heads first (B, T, H, 3D), then a chunk in each head."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = m.embed(x)
        q, k, v = m.qkv(x).reshape(2, 4, 4, 6).transpose(1, 2).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v)
        return m.head(m.out(y.transpose(1, 2).flatten(2)))
    return Net(forward, embed=nn.Linear(6, 8), qkv=nn.Linear(8, 24), out=nn.Linear(8, 6),
               head=nn.Linear(6, 5))


@table(TOKENS, shrinks="qkv", keeps={"head": IS_OUTPUT})
def qkv_by_chunk() -> nn.Module:
    """GPT-2: a chunk of the last dimension, then a view for each."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (p.view(2, 4, 4, 2).transpose(1, 2) for p in m.qkv(m.embed(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return m.head(m.out(y.transpose(1, 2).reshape(2, 4, 8)))
    return Net(forward, embed=nn.Linear(6, 8), qkv=nn.Linear(8, 24), out=nn.Linear(8, 6),
               head=nn.Linear(6, 5))


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def _merge(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


def _projections(width: int = 8) -> dict[str, nn.Module]:
    return {name: nn.Linear(6, width, bias=name != "k") for name in "qkv"}


@table(TOKENS, shrinks="v", keeps={"out": IS_OUTPUT})
def separate_projections() -> nn.Module:
    """Three layers, PyTorch's attention."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (_heads(layer(x), 4) for layer in (m.q, m.k, m.v))
        return m.out(_merge(F.scaled_dot_product_attention(q, k, v)))
    return Net(forward, **_projections(), out=nn.Linear(8, 5))


@table(TOKENS, shrinks="v", keeps={"out": IS_OUTPUT})
def attention_by_hand() -> nn.Module:
    """softmax(q kᵀ / √d) v: the number √d must stay when dimensions of a head go."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (_heads(layer(x), 4) for layer in (m.q, m.k, m.v))
        scores = (q @ k.transpose(-2, -1)) / q.shape[-1] ** 0.5
        return m.out(_merge(scores.softmax(-1) @ v))
    return Net(forward, **_projections(), out=nn.Linear(8, 5))


@table(TOKENS, shrinks="v", keeps={"out": IS_OUTPUT})
def attention_with_mask() -> nn.Module:
    """A causal mask from a buffer: its dimensions are tokens."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (_heads(layer(x), 2) for layer in (m.q, m.k, m.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=m.mask)
        return m.out(_merge(y))
    return Net(forward, **_projections(), mask=torch.ones(4, 4).tril().bool(), out=nn.Linear(8, 5))


@table(TOKENS, shrinks="v", keeps={"out": IS_OUTPUT})
def attention_over_merged_heads() -> nn.Module:
    """bmm over batch · heads in one dimension."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (_heads(layer(x), 4).reshape(8, 4, 2) for layer in (m.q, m.k, m.v))
        y = torch.bmm(torch.bmm(q * 0.7, k.transpose(1, 2)).softmax(-1), v)
        return m.out(y.view(2, 4, 4, 2).transpose(1, 2).reshape(2, 4, 8))
    return Net(forward, **_projections(), out=nn.Linear(8, 5))


@table(TOKENS, shrinks="v", keeps={"out": IS_OUTPUT})
def attention_by_einsum() -> nn.Module:
    """The products written as einsums over (batch, token, head, dimension)."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).view(2, 4, 4, 2) for layer in (m.q, m.k, m.v))
        a = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(0.7).softmax(-1)
        return m.out(torch.einsum("bhqk,bkhd->bqhd", a, v).reshape(2, 4, 8))
    return Net(forward, **_projections(), out=nn.Linear(8, 5))


@table(TOKENS, shrinks="v", keeps={"out": IS_OUTPUT})
def one_head() -> nn.Module:
    """No heads at all: values lose single channels."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        q, k, v = m.q(x), m.k(x), m.v(x)
        return m.out((q @ k.mT * 0.35).softmax(-1) @ v)
    return Net(forward, **_projections(), out=nn.Linear(8, 5))


@table(TOKENS, shrinks="q v", keeps={"out": IS_OUTPUT}, groups={"v": 2})
def grouped_query() -> nn.Module:
    """Eight query heads share four heads of keys and values, by repeat_interleave."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        q, k, v = _heads(m.q(x), 8), _heads(m.k(x), 4), _heads(m.v(x), 4)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return m.out(_merge(F.scaled_dot_product_attention(q, k, v)))
    return Net(forward, q=nn.Linear(6, 16), k=nn.Linear(6, 8), v=nn.Linear(6, 8),
               out=nn.Linear(16, 5))


@table(TOKENS, shrinks="", keeps={"out": IS_OUTPUT})
def grouped_query_by_expand() -> nn.Module:
    """The same as Llama writes it: unsqueeze, expand, reshape."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        q, k, v = _heads(m.q(x), 8), _heads(m.k(x), 4), _heads(m.v(x), 4)
        k, v = (t[:, :, None].expand(2, 4, 2, 4, 2).reshape(2, 8, 4, 2) for t in (k, v))
        return m.out(_merge(F.scaled_dot_product_attention(q, k, v)))
    return Net(forward, q=nn.Linear(6, 16), k=nn.Linear(6, 8), v=nn.Linear(6, 8),
               out=nn.Linear(16, 5))


@table(TOKENS, keeps={"out": IS_OUTPUT})
def multi_query() -> nn.Module:
    """One head of keys and values for all queries, broadcast."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        q, k, v = _heads(m.q(x), 4), m.k(x).unsqueeze(1), m.v(x).unsqueeze(1)
        return m.out(_merge((q @ k.mT * 0.7).softmax(-1) @ v))
    return Net(forward, q=nn.Linear(6, 8), k=nn.Linear(6, 2), v=nn.Linear(6, 2),
               out=nn.Linear(8, 5))


@table(TOKENS, shrinks="v", keeps={"out": IS_OUTPUT})
def relative_position_bias() -> nn.Module:
    """Swin: a table [positions, heads], indexed by a buffer: its columns are heads."""
    index = (torch.arange(4)[:, None] - torch.arange(4)[None, :] + 3).flatten()
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (_heads(layer(x), 4) for layer in (m.q, m.k, m.v))
        bias = m.table[m.index].view(4, 4, 4).permute(2, 0, 1).unsqueeze(0)
        return m.out(_merge((q @ k.mT * 0.7 + bias).softmax(-1) @ v))
    return Net(forward, **_projections(), table=weights(7, 4), index=index, out=nn.Linear(8, 5))


@table(TOKENS, shrinks="v", keeps={"out": IS_OUTPUT})
def temperature_for_each_head() -> nn.Module:
    """Swin V2: a learned factor for each head, and normalised queries and keys."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (_heads(layer(x), 4) for layer in (m.q, m.k, m.v))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        return m.out(_merge((scores * m.scale.exp()).softmax(-1) @ v))
    return Net(forward, **_projections(), scale=weights(4, 1, 1), out=nn.Linear(8, 5))


@table(TOKENS, shrinks="v", keeps={"out": IS_OUTPUT})
def norm_in_each_head() -> nn.Module:
    """A layer norm over the dimensions of each head of q and k: heads go, dimensions do not."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (_heads(layer(x), 2) for layer in (m.q, m.k, m.v))
        return m.out(_merge(F.scaled_dot_product_attention(m.qn(q), m.kn(k), v)))
    return Net(forward, **_projections(), qn=nn.LayerNorm(4), kn=nn.LayerNorm(4),
               out=nn.Linear(8, 5))


@table(TOKENS, shrinks="v", keeps={"out": IS_OUTPUT})
def rotary_embedding() -> nn.Module:
    """Queries and keys are turned in planes (i, i + d/2) of each head."""
    def rotate(m: Net, x: torch.Tensor) -> torch.Tensor:
        p, q = x.chunk(2, -1)
        return x * m.cos + torch.cat([-q, p], -1) * m.sin
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (_heads(layer(x), 2) for layer in (m.q, m.k, m.v))
        y = F.scaled_dot_product_attention(rotate(m, q), rotate(m, k), v)
        return m.out(_merge(y))
    return Net(forward, **_projections(), cos=torch.zeros(4, 4), sin=torch.zeros(4, 4),
               out=nn.Linear(8, 5))


@table((2, 8, 8, 6), shrinks="qkv", keeps={"out": IS_OUTPUT})
def windowed_attention() -> nn.Module:
    """Swin: roll, windows of 4 × 4, attention inside, and back."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.qkv(x.roll((-2, -2), (1, 2)))
        y = y.view(2, 2, 4, 2, 4, 24).permute(0, 1, 3, 2, 4, 5).reshape(8, 16, 24)
        q, k, v = y.reshape(8, 16, 3, 4, 2).permute(2, 0, 3, 1, 4)
        y = _merge((q @ k.mT * 0.7).softmax(-1) @ v)
        y = y.view(2, 2, 2, 4, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(2, 8, 8, 8)
        return m.out(y.roll((2, 2), (1, 2)))
    return Net(forward, qkv=nn.Linear(6, 24), out=nn.Linear(8, 5))


@table(TOKENS, keeps={"out": IS_OUTPUT})
def talking_heads() -> nn.Module:
    """A linear layer over the heads of the scores: heads are its channels."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (_heads(layer(x), 4) for layer in (m.q, m.k, m.v))
        scores = m.talk((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return m.out(_merge(scores.softmax(-1) @ v))
    return Net(forward, **_projections(), talk=nn.Linear(4, 4), out=nn.Linear(8, 5))


@table(TOKENS, (2, 3, 5), shrinks="v", keeps={"out": IS_OUTPUT})
def cross_attention() -> nn.Module:
    """Queries from one input, keys and values from another of another length and width."""
    def forward(m: Net, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q, k, v = _heads(m.q(x), 4), _heads(m.k(y), 4), _heads(m.v(y), 4)
        return m.out(_merge(F.scaled_dot_product_attention(q, k, v)))
    return Net(forward, q=nn.Linear(6, 8), k=nn.Linear(5, 8), v=nn.Linear(5, 8),
               out=nn.Linear(8, 5))


@table((2, 3, 4, 4), shrinks="q k", keeps={"b": IS_OUTPUT})
def nonlocal_block() -> nn.Module:
    """Attention over the places of an image, by convolutions and views."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        q, k, v = m.q(x).flatten(2), m.k(x).flatten(2), m.v(x).flatten(2)
        y = v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)
        return m.b(x + m.scale * y.view(-1, 8, 4, 4))
    return Net(forward, a=conv(3, 8), q=conv(8, 4, 1), k=conv(8, 4, 1), v=conv(8, 8, 1),
               scale=weights(1), b=conv(8, 5))


@table((2, 3, 4, 4), shrinks="k", keeps={"q": MIXES, "v": MIXES, "b": IS_OUTPUT})
def attention_over_channels() -> nn.Module:
    """DANet: a softmax over the channels of q and v; those of k are free."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(x)
        q, k, v = m.q(x).flatten(2), m.k(x).flatten(2), m.v(x).flatten(2)
        return m.b(((k @ q.transpose(1, 2)).softmax(-1) @ v).view(-1, 8, 4, 4) + m.k(x))
    return Net(forward, q=conv(3, 8, 1), k=conv(3, 8, 1), v=conv(3, 8, 1), b=conv(8, 5))


@table(TOKENS, shrinks="v", keeps={"out": IS_OUTPUT})
def linear_attention() -> nn.Module:
    """φ(q) (φ(k)ᵀ v), divided by a sum over the dimensions of each head."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (_heads(layer(x), 2) for layer in (m.q, m.k, m.v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        z = 1 / (q @ k.sum(2).unsqueeze(-1))
        return m.out(_merge((q @ (k.mT @ v)) * z))
    return Net(forward, **_projections(), out=nn.Linear(8, 5))


@table((2, 3, 8, 8), shrinks="patch", keeps={"head": IS_OUTPUT})
def position_embedding_and_class_token() -> nn.Module:
    """Patches, a class token in front, a position table, tokens read apart at the end."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = m.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.table
        x = x + m.down(F.gelu(m.up(x)))
        return m.head(x[:, 0]) + m.head(x[:, 1:]).amax(1)
    return Net(forward, patch=nn.Conv2d(3, 8, 4, stride=4), token=weights(1, 1, 8),
               table=weights(1, 5, 8), up=nn.Linear(8, 12), down=nn.Linear(12, 8),
               head=nn.Linear(8, 5))


@table((2, 3, 8, 8), shrinks="up qkv", keeps={"head": IS_OUTPUT})
def vit_block() -> nn.Module:
    """Norm, attention, add; norm, MLP, add."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = m.patch(x).flatten(2).transpose(1, 2)
        q, k, v = m.qkv(m.n1(x)).reshape(2, 4, 3, 4, 2).permute(2, 0, 3, 1, 4)
        x = x + m.proj(_merge(F.scaled_dot_product_attention(q, k, v)))
        x = x + m.down(F.gelu(m.up(m.n2(x))))
        return m.head(m.n3(x).mean(1))
    return Net(forward, patch=nn.Conv2d(3, 8, 4, stride=4), n1=nn.LayerNorm(8), n2=nn.LayerNorm(8),
               n3=nn.LayerNorm(8), qkv=nn.Linear(8, 24), proj=nn.Linear(8, 8),
               up=nn.Linear(8, 16), down=nn.Linear(16, 8), head=nn.Linear(8, 5))


@table(WORDS, shrinks="words@1 up", keeps={"head": IS_OUTPUT, "words@0": "they are words"})
def embedding() -> nn.Module:
    """Token and position embeddings, added; its columns are channels, its rows are words."""
    def forward(m: Net, ids: torch.Tensor) -> torch.Tensor:
        x = F.embedding(ids, m.words) + m.places(torch.arange(4))
        return m.head(x + m.down(F.relu(m.up(x))))
    return Net(forward, words=weights(7, 8), places=nn.Embedding(4, 8), up=nn.Linear(8, 12),
               down=nn.Linear(12, 8), head=nn.Linear(8, 5))


@table(WORDS, shrinks="up", keeps={"words@0": "its rows are words and the model's output"})
def tied_output() -> nn.Module:
    """The output projection is the embedding's own weight."""
    def forward(m: Net, ids: torch.Tensor) -> torch.Tensor:
        x = F.embedding(ids, m.words)
        return F.linear(m.down(F.relu(m.up(x))), m.words)
    return Net(forward, words=weights(7, 8), up=nn.Linear(8, 12), down=nn.Linear(12, 8))


class _Tied(nn.Module):
    """An encoder and a decoder whose weights are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)
        self.c.weight = self.b.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))))


@table(TOKENS, shrinks="a b", keeps={"head": IS_OUTPUT})
def tied_layers() -> nn.Module:
    """Two layers with one weight and two biases: three widths become one."""
    return _Tied()


@table((2, 6), shrinks="encoder@0", keeps={"encoder@1": "the other side is the input's width"})
def tied_autoencoder() -> nn.Module:
    """The decoder is the encoder's weight, transposed: rows are removed once, for both."""
    return Net(lambda m, x: F.linear(F.relu(F.linear(x, m.encoder)), m.encoder.t()),
               encoder=weights(8, 6))


@table((2, 6), shrinks="a", keeps={"gate": "its outputs are experts, chosen by topk",
                                    "b": IS_OUTPUT})
def mixture_of_experts() -> nn.Module:
    """A dense mixture: weights of experts stand in one three-dimensional constant."""
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        score = m.gate(x).softmax(-1)
        best, index = score.topk(2, -1)
        dense = torch.zeros_like(score).scatter(1, index, best)
        y = torch.einsum("bc,ecd->bed", x, m.w)
        return m.b(F.relu((y * dense.unsqueeze(-1)).sum(1)))
    return Net(forward, a=nn.Linear(6, 8), gate=nn.Linear(8, 4), w=weights(4, 8, 6),
               b=nn.Linear(6, 5))
