"""Models of torchvision, and models as a user writes them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

# name -> (keyword arguments, side of the image)
TORCHVISION: dict[str, tuple[dict[str, Any], int]] = {
    "resnet18": ({}, 128),
    "resnext50_32x4d": ({}, 128),
    "vgg11_bn": ({}, 64),
    "mobilenet_v2": ({}, 128),
    "mobilenet_v3_small": ({}, 128),
    "densenet121": ({}, 128),
    "efficientnet_b0": ({}, 128),
    "vit_b_16": ({"image_size": 64}, 64),
    "swin_t": ({}, 128),
    "swin_v2_t": ({}, 128),
    "maxvit_t": ({}, 224),
    "convnext_tiny": ({}, 128),
    "shufflenet_v2_x0_5": ({}, 128),
    "squeezenet1_1": ({}, 128),
    "googlenet": ({"aux_logits": False, "init_weights": False}, 128),
    "inception_v3": ({"aux_logits": False, "init_weights": False}, 160),
    "mnasnet0_5": ({}, 128),
    "regnet_y_400mf": ({}, 128),
    "alexnet": ({}, 128),
}
SEGMENTATION: dict[str, tuple[dict[str, Any], int]] = {
    "deeplabv3_mobilenet_v3_large": ({"weights_backbone": None, "num_classes": 10}, 128),
    "lraspp_mobilenet_v3_large": ({"weights_backbone": None, "num_classes": 10}, 128),
    "fcn_resnet50": ({"weights_backbone": None, "num_classes": 10}, 64),
}

Builder = Callable[[], tuple[nn.Module, Any]]


class PlainCNN(nn.Module):
    """Convolutions, a flattened map and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.conv2, self.norm2 = nn.Conv2d(24, 40, 3, padding=1), nn.GroupNorm(4, 40)
        self.fc1, self.fc2 = nn.Linear(40 * 8 * 8, 72), nn.Linear(72, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.silu(self.norm2(self.conv2(x))), 2)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


class UNet(nn.Module):
    """Down, up, and a concatenation across."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(32, 48, 3, stride=2, padding=1)
        self.up2, self.join2 = nn.ConvTranspose2d(48, 32, 2, stride=2), nn.Conv2d(64, 32, 3, padding=1)
        self.up1, self.join1 = nn.ConvTranspose2d(32, 16, 2, stride=2), nn.Conv2d(32, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of logits."""
        first = F.relu(self.down1(x))
        second = F.relu(self.down2(first))
        x = F.relu(self.middle(second))
        x = F.relu(self.join2(torch.cat([self.up2(x), second], 1)))
        return self.head(F.relu(self.join1(torch.cat([self.up1(x), first], 1))))


class TorchTransformer(nn.Module):
    """Patches through the encoder of torch itself."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(48, 4, dim_feedforward=80, batch_first=True, norm_first=True)
        self.patches = nn.Conv2d(3, 48, 8, stride=8)
        self.encoder = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(48), enable_nested_tensor=False)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class AttentionPool(nn.Module):
    """A convolutional stem and one `nn.MultiheadAttention` with a learned query."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 4, stride=4), nn.BatchNorm2d(32), nn.GELU(), nn.Conv2d(32, 48, 1))
        self.query = nn.Parameter(torch.zeros(1, 1, 48))
        self.attention = nn.MultiheadAttention(48, 4, batch_first=True)
        self.head = nn.Sequential(nn.Linear(48, 72), nn.GELU(), nn.Linear(72, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        pooled, _ = self.attention(self.query.expand(len(x), -1, -1), tokens, tokens, need_weights=False)
        return self.head(pooled.squeeze(1))


OWN: dict[str, tuple[type[nn.Module], int]] = {
    "cnn": (PlainCNN, 32),
    "unet": (UNet, 32),
    "torch_transformer": (TorchTransformer, 48),
    "attention_pool": (AttentionPool, 32),
}


def torchvision_zoo() -> dict[str, Builder]:
    """Return the builders by name: `tv/resnet18`."""
    plain = {f"tv/{name}": _builder(name, *entry) for name, entry in TORCHVISION.items()}
    return plain | {f"tv/{name}": _builder(name, *entry) for name, entry in SEGMENTATION.items()}


def own_zoo() -> dict[str, Builder]:
    """Return the builders by name: `own/cnn`."""
    return {
        f"own/{name}": lambda build=build, side=side: (build(), torch.randn(1, 3, side, side))
        for name, (build, side) in OWN.items()
    }


def _builder(name: str, settings: dict[str, Any], side: int) -> Builder:
    def build() -> tuple[nn.Module, Tensor]:
        model = torchvision.models.get_model(name, weights=None, **settings)
        return model, torch.randn(1, 3, side, side)

    return build
