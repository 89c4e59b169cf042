"""The networks of tools/zoo.py: torchvision up to 60 M, one per timm family, Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

# The smallest model of each timm 1.0.31 family whose default input is at most 300 pixels wide.
TIMM = (
    "beit_base_patch16_224", "halonet_h1", "test_byobnet", "cait_xxs24_224", "coat_tiny",
    "convit_tiny", "convmixer_768_32", "test_convnext", "cpubone_nano", "crossvit_tiny_240",
    "cs3darknet_focus_s", "cspnext_tiny", "davit_tiny", "deit_tiny_patch16_224", "densenet121",
    "dla46x_c", "dpn48b", "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0",
    "test_efficientnet", "efficientvim_m1", "efficientvit_b0", "efficientvit_m0",
    "vit_tiny_patch16_dinov3_qkvb", "fasternet_t0", "fastvit_t8", "focalnet_tiny_srf",
    "gcvit_xxtiny", "ghostnet_050", "hardcorenas_b", "hgnetv2_b0", "hiera_tiny_224",
    "hieradet_small", "hrnet_w18_small", "iformer_t", "inception_next_atto",
    "inception_resnet_v2", "inception_v3", "inception_v4", "lcnetv2_small", "levit_128s",
    "lowformer_b0", "test_mambaout", "test_coatnet", "poolformerv2_s12", "gmlp_ti16_224",
    "mobilenetv3_small_050", "mobilenetv5_base", "mobilevit_xxs", "mvitv2_tiny", "nest_tiny",
    "nextvit_small", "test_nfnet", "pit_ti_224", "pvt_v2_b0", "rdnet_tiny", "regnetx_002",
    "repghostnet_050", "repvit_m1", "res2next50", "resnest14d", "test_resnet", "resnetv2_18",
    "rexnet_100", "selecsls42", "legacy_seresnet18", "sequencer2d_s", "shvit_s1", "skresnet18",
    "starnet_s050", "swiftformer_xs", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_224", "tiny_vit_5m_224", "tnt_s_legacy_patch16_224", "tresnet_m",
    "twins_svt_small", "vgg11", "visformer_tiny", "test_vit", "vit_tiny_r_s16_p8_224",
    "test_vit_relpos", "samvit_base_patch16_224", "vitamin_small_224", "volo_d1_224",
    "ese_vovnet19b_slim_dw", "legacy_xception", "xception41p", "xcit_nano_12_p8_224",
)  # fmt: skip

# torchvision's classification models with at most 60 million parameters.
TORCHVISION = (
    "convnext_small", "convnext_tiny", "densenet121", "densenet161", "densenet169",
    "densenet201", "efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3",
    "efficientnet_b4", "efficientnet_b5", "efficientnet_b6", "efficientnet_v2_m",
    "efficientnet_v2_s", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5", "mnasnet0_75",
    "mnasnet1_0", "mnasnet1_3", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small",
    "regnet_x_16gf", "regnet_x_1_6gf", "regnet_x_3_2gf", "regnet_x_400mf", "regnet_x_800mf",
    "regnet_x_8gf", "regnet_y_1_6gf", "regnet_y_3_2gf", "regnet_y_400mf",
    "regnet_y_800mf", "regnet_y_8gf", "resnet101", "resnet18", "resnet34",
    "resnet50", "resnext50_32x4d", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5", "shufflenet_v2_x2_0", "squeezenet1_0", "squeezenet1_1", "swin_s",
    "swin_t", "swin_v2_s", "swin_v2_t",
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A network of the zoo: its name, and how to make it with inputs."""

    name: str
    make: Callable[[], tuple[torch.nn.Module, Any]]


def subjects(pattern: str = "") -> Iterator[Subject]:
    """Yield every network whose name contains `pattern`."""
    for one in (*_hugging_face(), *_torchvision(), *_timm()):
        if pattern in one.name:
            yield one


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give batch norms real statistics, and constant parameters (zeros, layer scales) noise.

    Fresh networks hide bugs: their batch norms are almost the identity, and a branch that ends in a
    zero does not count.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * noise(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(0.75 + 0.5 * noise(buffer).abs())
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel():
                if bool((parameter == parameter.flatten()[0]).all()):
                    value = parameter.flatten()[0].item()
                    scale = 0.1 if abs(value) > 0.1 else 0.02
                    parameter.copy_(value + scale * noise(parameter))
    return model.eval()


def _timm() -> Iterator[Subject]:
    for name in TIMM:

        def make(name: str = name) -> tuple[torch.nn.Module, Any]:
            import timm

            torch.manual_seed(0)
            model = timm.create_model(name)
            return model, torch.randn(1, *model.default_cfg["input_size"])

        yield Subject(f"timm/{name}", make)


def _torchvision() -> Iterator[Subject]:
    for name in TORCHVISION:

        def make(name: str = name) -> tuple[torch.nn.Module, Any]:
            from fxopt.vision import import_torchvision

            torch.manual_seed(0)
            model = import_torchvision().models.get_model(name, weights=None)
            side = 299 if name == "inception_v3" else 224
            return model, torch.randn(1, 3, side, side)

        yield Subject(f"torchvision/{name}", make)


def _hugging_face() -> Iterator[Subject]:
    for name in (
        "bert", "distilbert", "gpt2", "llama", "t5_encoder", "vit", "clip_vision",
        "whisper_encoder", "segformer", "yolos", "wav2vec2", "qwen2",
    ):  # fmt: skip
        yield Subject(f"hf/{name}", lambda name=name: _make_hugging_face(name))  # type: ignore[misc]


def _make_hugging_face(name: str) -> tuple[torch.nn.Module, Any]:
    import transformers as hf
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    torch.manual_seed(0)
    common: dict[str, Any] = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 128,
    }  # fmt: skip
    ids = torch.randint(0, 99, (1, 16))
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    decoder = {"input_ids": ids, "use_cache": False}
    image = {"pixel_values": torch.randn(1, 3, 64, 64)}
    grouped = {**common, "num_key_value_heads": 2}
    patches = {**common, "image_size": 64, "patch_size": 16}
    makers: dict[str, Callable[[], tuple[torch.nn.Module, Any]]] = {
        "bert": lambda: (hf.BertModel(hf.BertConfig(vocab_size=100, **common)), text),
        "distilbert": lambda: (
            hf.DistilBertModel(
                hf.DistilBertConfig(vocab_size=100, dim=64, n_layers=2, n_heads=4, hidden_dim=128)
            ),
            text,
        ),
        "gpt2": lambda: (
            hf.GPT2Model(hf.GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4)), decoder
        ),
        "llama": lambda: (hf.LlamaModel(hf.LlamaConfig(vocab_size=100, **grouped)), decoder),
        "t5_encoder": lambda: (
            hf.T5EncoderModel(
                hf.T5Config(
                    vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4
                )
            ),
            {"input_ids": ids},
        ),
        "vit": lambda: (hf.ViTModel(hf.ViTConfig(**patches)), image),
        "clip_vision": lambda: (hf.CLIPVisionModel(hf.CLIPVisionConfig(**patches)), image),
        "whisper_encoder": lambda: (
            WhisperEncoder(
                hf.WhisperConfig(
                    d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128,
                    max_source_positions=50, num_mel_bins=20,
                )
            ),
            {"input_features": torch.randn(1, 20, 100)},
        ),
        "segformer": lambda: (
            hf.SegformerModel(
                hf.SegformerConfig(
                    hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1],
                    num_attention_heads=[1, 2, 4, 4],
                )
            ),
            image,
        ),
        "yolos": lambda: (
            hf.YolosModel(
                hf.YolosConfig(
                    image_size=[64, 64], patch_size=16, num_detection_tokens=10, **common
                )
            ),
            image,
        ),
        "wav2vec2": lambda: (
            hf.Wav2Vec2Model(
                hf.Wav2Vec2Config(
                    vocab_size=32, conv_dim=(32, 32), conv_stride=(5, 2), conv_kernel=(10, 3),
                    num_feat_extract_layers=2, num_conv_pos_embeddings=16,
                    num_conv_pos_embedding_groups=4, **common,
                )
            ),
            {"input_values": torch.randn(1, 800)},
        ),
        "qwen2": lambda: (hf.Qwen2Model(hf.Qwen2Config(vocab_size=100, **grouped)), decoder),
    }  # fmt: skip
    return makers[name]()
