"""The data a criterion looks at: batches of images, streamed."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hf_prune.errors import CriterionError
from hf_prune.score.base import Criterion
from hf_prune.tokens.site import logits_of

SHAPE = "batches must be dicts with `pixel_values` (B, C, H, W) and `labels` (B,), or pairs (images, labels)"


def labelled_batches(criterion: Criterion, model: nn.Module, data: Iterable[Any] | None) -> Iterator[tuple]:
    """Yield images `(B, C, H, W)` and labels `(B,)` on the model's device, without images whose label is negative.

    Raises:
        CriterionError: If there are no data, no labels, or batches of another form.
    """
    for images, labels in _batches(criterion, model, data):
        if labels is None:
            raise CriterionError(f"criterion '{criterion.name}' needs labels for its loss: {SHAPE}")
        if not labels.is_floating_point():
            # Loaders of this library mark images that could not be read with a negative label.
            images, labels = images[labels >= 0], labels[labels >= 0]
        if len(images):
            yield images, labels


def image_batches(criterion: Criterion, model: nn.Module, data: Iterable[Any] | None) -> Iterator[Tensor]:
    """Yield images `(B, C, H, W)` on the model's device; labels may be missing.

    Raises:
        CriterionError: If there are no data, or batches of another form.
    """
    for images, labels in _batches(criterion, model, data):
        if labels is not None and not labels.is_floating_point():
            images = images[labels >= 0]
        if len(images):
            yield images


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of a batch, computed in float32."""
    return F.cross_entropy(logits_of(model(images)).float(), labels)


def _batches(criterion: Criterion, model: nn.Module, data: Iterable[Any] | None) -> Iterator[tuple]:
    if data is None:
        raise CriterionError(
            f"criterion '{criterion.name}' must look at data, got none; pass `data`, for example a DataLoader of "
            f"training images ({SHAPE}), or take a criterion that needs none: 'magnitude'"
        )
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    empty = True
    for batch in data:
        images, labels = _parts(batch)
        empty = empty and not len(images)
        yield images.to(weight.device, weight.dtype), None if labels is None else labels.to(weight.device)
    if empty:
        raise CriterionError(f"criterion '{criterion.name}' must see at least one image, but `data` gave none")


def _parts(batch: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(batch, Mapping):
        images, labels = batch.get("pixel_values"), batch.get("labels")
    elif isinstance(batch, list | tuple) and len(batch) == 2:
        images, labels = batch
    else:
        images, labels = None, None
    if not isinstance(images, Tensor) or not (labels is None or isinstance(labels, Tensor)):
        found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise CriterionError(f"{SHAPE}, got {found}")
    if labels is not None and len(labels) != len(images):
        raise CriterionError(f"a batch must have one label an image, got {len(images)} images and {len(labels)} labels")
    return images, labels
