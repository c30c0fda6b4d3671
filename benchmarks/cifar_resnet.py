"""The residual network of He et al. for CIFAR-10, whose shortcuts have no parameters: a hard case for an analysis.

Where the width doubles, the shortcut takes every second pixel and puts zeros before and behind the channels, so the
channels of one stage are a shifted part of the next one's, with no layer in between.

Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2, shortcuts of type A.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.stride, self.pad = (1, 0) if width == width_in else (2, (width - width_in) // 2)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, H / stride, W / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x if self.stride == 1 else F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + shortcut)


class CifarResNet(nn.Module):
    """Depth 6 n + 2: three stages of n blocks."""

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        num_blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = [16] * (num_blocks + 1) + [32] * num_blocks + [64] * num_blocks
        blocks = [Block(before, after) for before, after in pairwise(widths)]
        self.layer1 = nn.Sequential(*blocks[:num_blocks])
        self.layer2 = nn.Sequential(*blocks[num_blocks : 2 * num_blocks])
        self.layer3 = nn.Sequential(*blocks[2 * num_blocks :])
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 32, 32) -> (B, num_classes)."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))
