"""What a token-pruned student learns from: labels, the dense teacher's logits and its surviving tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_prune.tokens.site import find_site, logits_of


@dataclass(frozen=True, kw_only=True)
class DistillWeights:
    """Weights of the three terms, the defaults of SPViT (and of DynamicViT)."""

    labels: float = 1.0
    logits: float = 0.5
    tokens: float = 0.5


@contextmanager
def final_tokens(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the output of the model's final norm, `(B, T, C)` a forward pass, while the context is open."""
    outputs: list[Tensor] = []

    def collect(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        outputs.append(output)

    handle = find_site(model).norm.register_forward_hook(cast(Any, collect))
    try:
        yield outputs
    finally:
        handle.remove()


@torch.no_grad()
def teach(teacher: nn.Module, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the teacher's logits `(B, classes)` and final tokens `(B, T, C)`."""
    with final_tokens(teacher) as tokens:
        logits = logits_of(teacher(pixel_values))
    return logits, tokens[0]


def distillation_loss(
    logits: Tensor,
    tokens: Tensor,
    teacher_logits: Tensor,
    teacher_tokens: Tensor,
    labels: Tensor,
    alive: Tensor,
    *,
    weights: DistillWeights,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the recovery loss of a training step, without the keep constraint.

    Cross-entropy + KL(teacher || student) at temperature 1 + mean squared difference of the patch tokens that are
    alive after the last selector; class and package tokens do not count in the last.

    Args:
        logits: `(B, classes)` of the student.
        tokens: `(B, N, C)` after the student's final norm, patch by patch of the grid.
        teacher_logits: `(B, classes)`.
        teacher_tokens: `(B, N, C)`.
        labels: `(B,)` class indices, or `(B, classes)` probabilities.
        alive: `(B, N)`, 1 where a patch survived the last selector.
        weights: Weights of the terms.
        label_smoothing: Of the cross-entropy.

    Source: SPViT, losses of the released code (its DeiT variant).
    """
    logits, teacher_logits = logits.float(), teacher_logits.float()
    loss = weights.labels * F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    loss = loss + weights.logits * F.kl_div(
        logits.log_softmax(-1), teacher_logits.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    difference = (tokens.float() - teacher_tokens.float()).square().mean(-1)
    return loss + weights.tokens * (difference * alive).sum() / alive.sum().clamp_min(1)
