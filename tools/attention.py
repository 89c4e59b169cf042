"""Find the attention in real networks, written by hand and as one call.

    python tools/attention.py [NAME …] [--out docs/attention.md] [--state attention.json] [--again]
    python tools/attention.py --time [--rounds 20]

Each network is captured as its authors write it, and with attention written by hand: timm's with
`set_fused_attn(False)`, Hugging Face's with `attn_implementation="eager"`. A row tells how many
scaled dot-product attentions the graph has before and after `FuseAttention`, how many softmaxes
between two products are left, and the reasons. With `--time`, one attention of each kind is timed
in PyTorch: by hand, as one call, and as `ExpandAttention(keep_fast=True)` leaves it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from zoo_models import Subject, randomize, subjects

import fxopt
from fxopt.inputs import as_inputs
from fxopt.passes import ExpandAttention, FuseAttention, MergeDuplicates
from fxopt.testing import op_counts, relative_error
from fxopt.vision import import_torchvision

TORCHVISION = ("vit_b_16", "swin_t", "swin_v2_t", "maxvit_t")
# One model of each timm family that has a softmax between two products, or nearly one.
TIMM = (
    "beit_base_patch16_224", "botnet26t_256", "cait_xxs24_224", "coat_tiny", "convit_tiny",
    "cpubone_nano", "crossvit_tiny_240", "davit_tiny", "deit_tiny_patch16_224",
    "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0", "efficientvim_m1",
    "efficientvit_b0", "efficientvit_m0", "eva02_tiny_patch14_224", "focalnet_tiny_srf",
    "gcvit_xxtiny", "halonet_h1", "hiera_tiny_224", "hieradet_small", "iformer_t",
    "lambda_resnet26t", "levit_128s", "lowformer_b0", "maxvit_rmlp_pico_rw_256",
    "mobilenetv4_hybrid_medium", "mobilevit_xxs", "mobilevitv2_050", "mvitv2_tiny", "nest_tiny",
    "nextvit_small", "pit_ti_224", "pvt_v2_b0", "samvit_base_patch16_224", "sequencer2d_s",
    "shvit_s1", "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224", "swinv2_tiny_window8_256",
    "test_coatnet", "test_vit", "test_vit_relpos", "tiny_vit_5m_224", "tnt_s_legacy_patch16_224",
    "twins_svt_small", "visformer_tiny", "vit_tiny_patch16_dinov3_qkvb", "vitamin_small_224",
    "volo_d1_224", "xcit_nano_12_p8_224",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="networks, or parts of their names")
    parser.add_argument("--out", type=Path, help="write all finished rows as Markdown")
    parser.add_argument("--state", type=Path, default=Path("attention.json"), help="finished rows")
    parser.add_argument("--again", action="store_true", help="measure the named networks again")
    parser.add_argument("--time", action="store_true", help="time single attentions instead")
    parser.add_argument("--rounds", type=int, default=20, help="how often each is timed")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import_torchvision()  # timm and transformers import it, too
    rows: dict[str, Any] = {}
    if options.state.exists():
        rows = json.loads(options.state.read_text())
    if options.time:
        rows["times"] = times(options.rounds)
        options.state.write_text(json.dumps(rows, indent=1))
    else:
        for subject in chosen(options.names):
            if options.again or subject.name not in rows:
                rows[subject.name] = measure(subject)
                options.state.write_text(json.dumps(rows, indent=1))
            print(line(subject.name, rows[subject.name]), flush=True)
            gc.collect()
    if options.out:
        options.out.write_text(markdown(rows))


# -- networks --------------------------------------------------------------------------------------


def chosen(names: list[str]) -> Iterator[Subject]:
    """Yield the networks whose names contain one of `names`, in each way of writing attention."""
    for subject in (*_torchvision(), *_hugging_face(), *_timm()):
        if not names or any(name in subject.name for name in names):
            yield subject


def _torchvision() -> Iterator[Subject]:
    for name in TORCHVISION:

        def make(name: str = name) -> tuple[nn.Module, Any]:
            torch.manual_seed(0)
            models = import_torchvision().models
            return models.get_model(name, weights=None), torch.randn(1, 3, 224, 224)

        yield Subject(f"torchvision/{name}", make)


def _timm() -> Iterator[Subject]:
    for name in TIMM:
        for fused in (True, False):

            def make(name: str = name, fused: bool = fused) -> tuple[nn.Module, Any]:
                import timm
                import timm.layers

                timm.layers.set_fused_attn(fused)
                torch.manual_seed(0)
                model: Any = timm.create_model(name)
                return model, torch.randn(1, *model.default_cfg["input_size"])

            yield Subject(f"timm/{name}" + ("" if fused else ", by hand"), make)


def _hugging_face() -> Iterator[Subject]:
    known = {one.name: one.make for one in subjects("hf/")} | {
        f"hf/{name}": make for name, make in _MORE.items()
    }
    for name, make in known.items():
        for eager in (True,) if name in _ONLY_EAGER else (False, True):

            def written(make: Any = make, eager: bool = eager) -> tuple[nn.Module, Any]:
                model, inputs = make()
                model.set_attn_implementation("eager" if eager else "sdpa")
                return model, inputs

            yield Subject(name + (", by hand" if eager else ""), written)


def _text_model(name: str, **options: Any) -> Callable[[], tuple[nn.Module, Any]]:
    def make() -> tuple[nn.Module, Any]:
        import transformers as hf

        torch.manual_seed(0)
        config = getattr(hf, f"{name}Config")(vocab_size=100, **options)
        ids = torch.randint(3, 99, (2, 16))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids[:, :9]
        return getattr(hf, f"{name}Model")(config), inputs

    return make


_PAIR = {
    "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
    "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
}  # fmt: skip
_MORE: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "bart": _text_model("Bart", **_PAIR),
    "marian": _text_model("Marian", **_PAIR),
    "bloom": _text_model("Bloom", hidden_size=64, n_layer=2, n_head=4),
    "opt": _text_model(
        "OPT", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128,
        word_embed_proj_dim=64,
    ),
    "gpt_neox": _text_model(
        "GPTNeoX", hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128,
    ),
    "gemma2": _text_model(
        "Gemma2", hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=128,
    ),
}  # fmt: skip

_ONLY_EAGER = ("hf/gemma2",)  # its scores pass through tanh, which the one call cannot do


# -- what is found ---------------------------------------------------------------------------------


def measure(subject: Subject) -> dict[str, Any]:
    """Return the row of one network; what fails is in its 'error'."""
    try:
        model, inputs = subject.make()
        randomize(model)
        return _found(model, inputs)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def _found(model: nn.Module, inputs: Any) -> dict[str, Any]:
    call = as_inputs(inputs)
    with torch.no_grad():
        expected = model(*call.args, **call.kwargs)
    before = fxopt.optimize(model, inputs, passes=_passes(fuse=False), verify="off")
    after = fxopt.optimize(model, inputs, passes=_passes(fuse=True), verify="off")
    story = after.info.story
    assert story is not None
    (step,) = (step for step in story.steps if step.name == FuseAttention.name)
    with torch.no_grad():
        error = relative_error(after(*call.args, **call.kwargs), expected)
    return {
        "before": op_counts(before).get("scaled_dot_product_attention", 0),
        "after": op_counts(after).get("scaled_dot_product_attention", 0),
        "reasons": dict(Counter(miss.reason for miss in step.misses)),
        "relative_error": error,
        "milliseconds": step.seconds * 1e3,
    }


def _passes(fuse: bool) -> list[Any]:
    """Return the default pipeline, with the fusion in front of the merge of duplicates, or not."""
    passes = [one for one in fxopt.default_passes() if not isinstance(one, FuseAttention)]
    if fuse:
        place = [isinstance(one, MergeDuplicates) for one in passes].index(True)
        passes.insert(place, FuseAttention())
    return passes


def line(name: str, row: dict[str, Any]) -> str:
    """Return a row as text."""
    if "error" in row:
        return f"{name:45} {row['error']}"
    left = sum(row["reasons"].values())
    text = f"{name:45} {row['before']:3} → {row['after']:3} attentions, {left} left, "
    text += f"error {row['relative_error']:.0e}, {row['milliseconds']:.0f} ms"
    return text + "".join(f"\n    {n} × {reason}" for reason, n in row["reasons"].items())


# -- what it costs ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """One attention as it stands in a network: sizes, layout of the heads, and bias."""

    network: str
    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    values: int
    bias: tuple[int, ...] | None = None
    channels_first: bool = False
    windows: int = 0  # of a fifth axis in front

    def inputs(self) -> list[torch.Tensor]:
        """Return q, k, v (and the bias), laid out as projections leave them."""
        found = []
        for length, width in (
            (self.queries, self.width), (self.keys, self.width), (self.keys, self.values)
        ):  # fmt: skip
            if self.channels_first:
                x = torch.randn(self.batch, self.heads, width, length).mT
            else:
                x = torch.randn(self.batch, length, self.heads, width).transpose(1, 2)
            found.append(x[None] if self.windows else x)
        return found if self.bias is None else [*found, torch.randn(self.bias)]


SHAPES = (
    Shape("vit_b_16", 1, 12, 197, 197, 64, 64),
    Shape("deit_tiny", 1, 3, 197, 197, 64, 64),
    Shape("bert", 1, 12, 128, 128, 64, 64, (1, 1, 1, 128)),
    Shape("gpt2, 1024 tokens", 1, 12, 1024, 1024, 64, 64, (1024, 1024)),
    Shape("swin_t, first windows", 64, 3, 49, 49, 32, 32, (1, 3, 49, 49)),
    Shape("swin_t, shifted windows", 64, 3, 49, 49, 32, 32, (64, 3, 49, 49)),
    Shape("swin_t, last windows", 1, 24, 49, 49, 32, 32, (1, 24, 49, 49)),
    Shape("maxvit_t, five axes", 64, 2, 49, 49, 32, 32, (1, 2, 49, 49), windows=1),
    Shape("levit_128s, wider values", 1, 4, 196, 196, 16, 32, (1, 4, 196, 196)),
    Shape("coatnet, channels first", 1, 2, 100, 100, 32, 32, (1, 2, 100, 100), True),
    Shape("xcit_nano, between channels", 1, 4, 32, 32, 784, 784),
    Shape("pvt_v2_b0", 1, 1, 3136, 49, 32, 32),
    Shape("cait, one query", 1, 4, 1, 197, 48, 48),
    Shape("mobilevit_xxs", 4, 4, 256, 256, 16, 16),
)


class ByHand(nn.Module):
    """softmax(q·kᵀ·scale + bias)·v"""

    def forward(self, q: Any, k: Any, v: Any, bias: Any = None) -> Any:
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        return (scores if bias is None else scores + bias).softmax(-1) @ v


class OneCall(nn.Module):
    """The same, as one call."""

    def forward(self, q: Any, k: Any, v: Any, bias: Any = None) -> Any:
        return F.scaled_dot_product_attention(q, k, v, bias)


def times(rounds: int) -> dict[str, list[float]]:
    """Return the median milliseconds of each shape: by hand, as one call, and with keep_fast."""
    found = {}
    for shape in SHAPES:
        torch.manual_seed(0)
        inputs = shape.inputs()
        kept = fxopt.optimize(
            OneCall(), tuple(inputs), passes=[ExpandAttention(keep_fast=True)], verify="off"
        )
        ways: list[Callable[..., Any]] = [ByHand(), OneCall(), kept.run]
        spent: list[list[float]] = [[] for _ in ways]
        with torch.no_grad():
            for _ in range(rounds + 3):
                for way, seconds in zip(ways, spent, strict=True):
                    started = time.perf_counter()
                    way(*inputs)
                    seconds.append(time.perf_counter() - started)
        found[shape.network] = [statistics.median(seconds[3:]) * 1e3 for seconds in spent]
        print(f"{shape.network:30}", *(f"{ms:9.3f} ms" for ms in found[shape.network]), flush=True)
    return found


# -- the document ----------------------------------------------------------------------------------

HEAD = """# Attention

Written by `python tools/attention.py --out docs/attention.md`. *before* and *after*: scaled
dot-product attentions in the graph before and after `FuseAttention`, where the default pipeline has
it; *left*: softmaxes between two products that are none, with what the pass says about them.
*by hand*: timm's with `set_fused_attn(False)`, Hugging Face's with `attn_implementation="eager"`.
Softmaxes that feed no product (of selective kernels, of outputs) do not count.
"""
TIMES = """
## One call, or several

Median milliseconds of one attention in PyTorch on the CPU, one thread, rounds interleaved, by
`python tools/attention.py --time`. *kept*: as `ExpandAttention(keep_fast=True)` leaves the call.
PyTorch has a fused kernel for four axes, values as wide as keys, and features that lie side by
side; all else it computes in plain products, with more steps than by hand.

| attention | by hand | one call | kept |
|---|---|---|---|
"""


def markdown(rows: dict[str, Any]) -> str:
    """Return all rows as a Markdown page."""
    table = "| network | before | after | left |\n|---|---|---|---|\n"
    found = {name: rows[name] for name in sorted(rows) if name != "times"}
    for name, row in found.items():
        if "error" in row:
            table += f"| {name} | | | {row['error']} |\n"
            continue
        left = "; ".join(f"{n} × {reason}" for reason, n in row["reasons"].items())
        table += f"| {name} | {row['before']} | {row['after']} | {left} |\n"
    version = torch.__version__.split("+")[0]
    counts = [row for row in found.values() if "error" not in row]
    total = (
        f"With torch {version}: {len(found)} graphs; attentions "
        f"{sum(row['before'] for row in counts)} before, {sum(row['after'] for row in counts)} "
        f"after; left {sum(sum(row['reasons'].values()) for row in counts)}.\n"
    )
    text = f"{HEAD}\n{total}\n{table}"
    if "times" in rows:
        text += TIMES
        for name, (hand, call, kept) in rows["times"].items():
            text += f"| {name} | {hand:.3f} | {call:.3f} | {kept:.3f} |\n"
    return text


if __name__ == "__main__":
    main()
