"""Small networks that use every operation the core knows, alone and in random combinations."""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def of_order_one(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms, scales and biases values that make every unit count."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if "running_var" in name:
            tensor.data.copy_(noise.abs() + 0.5)
        elif tensor.ndim == 1:
            tensor.data.copy_(0.3 * noise + (1.0 if name.endswith("weight") else 0.0))
    return model.eval()


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Concat(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, channels // 2, 1), nn.Conv2d(channels // 2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class Gated(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.both, self.back = nn.Conv2d(channels, 4 * channels, 1), nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.both(x).chunk(2, dim=1)
        return self.back(value * torch.tanh(gate))


class HalfIdentity(nn.Module):
    """Half of the channels pass, the other half is convolved (as in ShuffleNet)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels // 2, channels // 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        return torch.cat([kept, F.relu(self.conv(changed))], dim=1)


class PaddedShortcut(nn.Module):
    """Doubles the channels; the shortcut is filled up with zeros (as in the small ResNets)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, 2 * channels, 1)
        self.pad = channels // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, self.pad, self.pad)) + self.second(F.relu(self.first(x)))


class HardCodedAttention(nn.Module):
    """Computes its sizes from the width of its input, as many published models do."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class OnTokens(nn.Module):
    """Runs a module on `(B, H * W, C)`."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return (tokens + self.body(tokens)).transpose(1, 2).reshape(x.shape)


def conv(channels: int, out: int | None = None, **settings: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, out or channels, 3, padding=1, bias=False, **settings),
                         nn.BatchNorm2d(out or channels), nn.ReLU())  # fmt: skip


def mlp(channels: int) -> nn.Module:
    return nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))


BLOCKS = {
    "conv": lambda c: (conv(c, c + 4), c + 4),
    "wide conv": lambda c: (conv(c, 2 * c), 2 * c),
    "depthwise": lambda c: (conv(c, groups=c), c),
    "grouped": lambda c: (conv(c, groups=4), c),
    "multiplied": lambda c: (conv(c, 2 * c, groups=c), 2 * c),
    "residual": lambda c: (Residual(nn.Sequential(conv(c, 2 * c), nn.Conv2d(2 * c, c, 1))), c),
    "dense": lambda c: (Concat(nn.Identity(), conv(c, 8)), c + 8),
    "branches": lambda c: (Concat(conv(c, 8), conv(c, 4)), 12),
    "squeeze": lambda c: (SqueezeExcite(c), c),
    "shuffle": lambda c: (Shuffle(2), c),
    "gated": lambda c: (Residual(Gated(c)), c),
    "half": lambda c: (HalfIdentity(c), c),
    "padded": lambda c: (PaddedShortcut(c), 2 * c),
    "transposed": lambda c: (nn.ConvTranspose2d(c, c, 2, stride=2), c),
    "pool": lambda c: (nn.MaxPool2d(2, ceil_mode=True), c),
    "group norm": lambda c: (nn.GroupNorm(4, c), c),
    "attention": lambda c: (OnTokens(HardCodedAttention(c, 4)), c),
    "mlp": lambda c: (OnTokens(mlp(c)), c),
    "layer norm": lambda c: (OnTokens(nn.Sequential(nn.LayerNorm(c), mlp(c))), c),
}
# Channels stay multiples of 4, so that groups, heads and halves always fit.


def network(names: list[str], *, num_classes: int = 5, flatten: bool = False) -> nn.Module:
    """Return a classifier of 3 x 8 x 8 images made of the named blocks."""
    torch.manual_seed(0)
    layers, channels = [conv(3, 8)], 8
    for name in names:
        block, channels = BLOCKS[name](channels)
        layers.append(block)
    layers.append(nn.AdaptiveAvgPool2d(2 if flatten else 1))
    head = nn.Linear(channels * (4 if flatten else 1), num_classes)
    return of_order_one(nn.Sequential(*layers, nn.Flatten(), head))


def random_network(random_: random.Random, num_blocks: int) -> tuple[list[str], nn.Module]:
    """Return a network of random blocks and their names."""
    names = [random_.choice([*BLOCKS]) for _ in range(num_blocks)]
    return names, network(names, flatten=random_.random() < 0.5)
