"""Optimiser groups and learning rates: a full rate for new selectors, a small and late one for the backbone."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

# Left out of every parameter group by the published recipe: they stay as the dense model has them.
FROZEN_TOKENS = ("cls_token", "pos_embed", "position_embeddings", "position_embedding.weight")
Shape = Callable[[float], float]


@dataclass(frozen=True, kw_only=True)
class TwoRates:
    """SPViT's two learning rates as shapes over the progress of training, from 0 to 1.

    Selectors: cosine from the learning rate to `min_share` of it. Backbone: nothing for the first `freeze_share`
    of training, then the cosine, capped at `backbone_share` of the learning rate.

    Source: SPViT's released code: 5e-4 to 1e-5, 5 frozen epochs of 30, cap 0.01.
    """

    backbone_share: float = 0.01
    freeze_share: float = 1 / 6
    min_share: float = 0.02

    def selector(self, progress: float) -> float:
        """Share of the learning rate for the selectors."""
        return self.min_share + (1 - self.min_share) * (1 + math.cos(math.pi * progress)) / 2

    def backbone(self, progress: float) -> float:
        """Share of the learning rate for everything else."""
        return 0.0 if progress < self.freeze_share else min(self.backbone_share, self.selector(progress))


def warmup_cosine(warmup_share: float = 0.1) -> Shape:
    """Return a linear warm-up followed by a cosine to zero."""
    return lambda progress: (
        progress / warmup_share
        if progress < warmup_share
        else (1 + math.cos(math.pi * (progress - warmup_share) / (1 - warmup_share))) / 2
    )


def adamw(
    model: nn.Module, shapes: dict[str, Shape], *, learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """Return AdamW whose parameter groups carry the shape of their learning rate.

    Vectors (biases, norms, scales) are not decayed.

    Args:
        model: Its trainable parameters are sorted into groups.
        shapes: Substring of parameter names to shape; the first that matches wins, `""` matches all.
        learning_rate: What the shapes are multiplied with.
        weight_decay: Of matrices.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = next(part for part in shapes if part in name)
            groups.setdefault((key, parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": weight_decay * decays, "shape": key}
            for (key, decays), parameters in groups.items()
        ],
        lr=learning_rate,
        eps=1e-8,
    )


def freeze_positions(model: nn.Module) -> None:
    """Keep class token and position embeddings as they are."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in FROZEN_TOKENS):
            parameter.requires_grad_(False)


def set_learning_rates(
    optimizer: torch.optim.Optimizer, shapes: dict[str, Shape], *, learning_rate: float, progress: float
) -> None:
    """Set every group's rate for this point of training; a function of progress alone, so resuming is exact."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * shapes[group["shape"]](progress)
