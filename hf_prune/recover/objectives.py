"""What phases of training minimise."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from hf_prune.recover.distill import DistillWeights, distillation_loss, final_tokens, teach
from hf_prune.tokens.attach import token_pruning_of
from hf_prune.tokens.constraint import Constraint, global_mean
from hf_prune.tokens.reducers.decide import GumbelNoise
from hf_prune.tokens.site import logits_of


@dataclass
class Classify:
    """Plain supervised training, for the dense model of the embedded default or a new head."""

    label_smoothing: float = 0.0

    def loss(self, model: nn.Module, batch: dict[str, Tensor], *, batch_number: int) -> Tensor:
        """Return the cross-entropy."""
        logits = logits_of(model(batch["pixel_values"])).float()
        return F.cross_entropy(logits, batch["labels"], label_smoothing=self.label_smoothing)

    def before_step(self, progress: float) -> None:
        """Gradients stay as they are."""

    def after_step(self) -> dict[str, float]:
        """Nothing to adapt."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """No state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """No state."""


@dataclass
class Recover(Classify):
    """Labels and the dense teacher's logits, for a model that was cut, or is being masked.

    Attributes:
        teacher: The dense model, in evaluation mode and without gradients.
        weight: Of the divergence KL(teacher || student) at temperature 1, beside the cross-entropy; 0 does not teach.
    """

    teacher: nn.Module | None = None
    weight: float = 1.0

    def loss(self, model: nn.Module, batch: dict[str, Tensor], *, batch_number: int) -> Tensor:
        """Return cross-entropy plus weighted divergence."""
        logits = logits_of(model(batch["pixel_values"])).float()
        loss = F.cross_entropy(logits, batch["labels"], label_smoothing=self.label_smoothing)
        if self.teacher is None or not self.weight:
            return loss
        with torch.no_grad():
            taught = logits_of(self.teacher(batch["pixel_values"])).float().log_softmax(-1)
        divergence = F.kl_div(logits.log_softmax(-1), taught, log_target=True, reduction="batchmean")
        return loss + self.weight * divergence


@dataclass
class PruneTokens:
    """SPViT's training loss: labels, the dense teacher, and a constraint on the global batch mean of what is kept.

    Attributes:
        teacher: The dense model, in evaluation mode and without gradients.
        constraint: Pulls the keep ratios to their targets.
        accelerator: Whose processes share a batch.
        seed: Of the Gumbel noise.
        weights: Of the distillation terms.
        label_smoothing: Of the cross-entropy.
        removal_start: Share of the training from which on dropped tokens leave the sequence instead of being masked,
            which saves time and memory. Until then a decision to drop feels what reading the token would be worth.
    """

    teacher: nn.Module
    constraint: Constraint
    accelerator: Accelerator
    seed: int
    weights: DistillWeights = field(default_factory=DistillWeights)
    label_smoothing: float = 0.0
    removal_start: float = 0.5
    progress: float = 0.0
    mean_keep: Tensor = field(default_factory=lambda: torch.zeros(0))

    def loss(self, model: nn.Module, batch: dict[str, Tensor], *, batch_number: int) -> Tensor:
        """Return the loss of one training step."""
        student = self.accelerator.unwrap_model(model)
        pruning = token_pruning_of(student)
        pruning.noise = GumbelNoise(
            self.seed, self.accelerator.process_index, self.accelerator.num_processes, batch_number
        )
        pruning.removes_in_training = self.progress >= self.removal_start
        teacher_logits, teacher_tokens = teach(self.teacher, batch["pixel_values"])
        with final_tokens(student) as tokens:
            logits = logits_of(model(batch["pixel_values"]))
        patches = pruning.patches_on_grid(tokens[0])
        first, num_patches = pruning.num_prefix_tokens, patches.shape[1]
        records = pruning.take_records()
        self.mean_keep = global_mean(torch.stack([record.keep.mean() for record in records]), self.accelerator)
        loss = distillation_loss(
            logits,
            patches,
            teacher_logits,
            teacher_tokens[:, first : first + num_patches],
            batch["labels"],
            records[-1].keep.detach()[:, :num_patches],
            weights=self.weights,
            label_smoothing=self.label_smoothing,
        )
        return loss + self.constraint.loss(self.mean_keep)

    def before_step(self, progress: float) -> None:
        """Gradients stay as they are; note how far training is."""
        self.progress = progress

    def after_step(self) -> dict[str, float]:
        """Move the multipliers; report the mean keep ratios."""
        self.constraint.update(self.mean_keep)
        return {f"keep_{stage}": value for stage, value in enumerate(self.mean_keep.tolist(), start=1)}

    def state_dict(self) -> dict[str, Any]:
        """The multipliers, and how far training is."""
        return {**self.constraint.state_dict(), "progress": self.progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was."""
        self.constraint.load_state_dict(state)
        self.progress = float(state.get("progress", 0.0))
