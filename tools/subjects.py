"""The networks that the tools measure, by name: torchvision's, timm's, and BERT."""

from __future__ import annotations

import torch

from fxopt.vision import import_torchvision

# those of which the sizes of peers' graphs are known
NAMES = (
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "densenet121",
    "convnext_tiny", "swin_t", "vit_b_16", "maxvit_t", "shufflenet_v2_x1_0", "inception_v3",
    "levit_128s", "repvgg_a0", "bert",
)  # fmt: skip


def subject(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return a network with random weights in evaluation mode, and one input for it."""
    vision = import_torchvision().models
    torch.manual_seed(0)
    if name in ("bert", "bert12"):
        import transformers

        config = transformers.BertConfig(num_hidden_layers=2 if name == "bert" else 12)
        return transformers.BertModel(config).eval(), torch.randint(0, 1000, (1, 128))
    if name in vision.list_models():
        model = vision.get_model(name, weights=None).eval()
        side = 299 if name == "inception_v3" else 224
        return model, torch.randn(1, 3, side, side)
    import timm

    model = timm.create_model(name).eval()
    return model, torch.randn(1, *model.default_cfg["input_size"])
