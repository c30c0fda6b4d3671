"""Running statistics of batch norms, estimated again from a few images."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_prune.analyse.running import quiet_run
from hf_prune.errors import CompensationError


def recalibrate_norms(model: nn.Module, data: Iterable[Any] | None) -> None:
    """Estimate the running statistics of all batch norms again, as the plain mean over batches.

    Dropout and the like stay off meanwhile. Modes and momenta are left as they were; so are statistics if a run fails.

    Args:
        model: Changed in place; nothing happens if it has no batch norm with running statistics.
        data: Batches of images, each of a size fit for training; see `hf_prune.score.batches`. Labels may be missing.

    Raises:
        CompensationError: If data are missing or of another form.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    before, momenta = [buffer.clone() for buffer in buffers], [norm.momentum for norm in norms]
    try:
        with quiet_run(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
            for images in images_of(model, data):
                model(images)
    except BaseException:
        for buffer, old in zip(buffers, before, strict=True):
            buffer.copy_(old)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def settle_norms(model: nn.Module, data: Iterable[Any] | None) -> None:
    """Recalibrate a model after training if its batch norms remember little more than the last batch.

    So it is where a momentum of another library's meaning was taken over: transformers' MobileNets say 0.9997 and mean
    the share that stays, and torch takes it for the share that is new.
    """
    if any(isinstance(m, _BatchNorm) and (m.momentum or 0) > 0.5 for m in model.modules()):
        recalibrate_norms(model, data)


def images_of(model: nn.Module, data: Iterable[Any] | None) -> Iterator[Tensor]:
    """Yield images on the model's device, without those whose label is negative: they could not be read."""
    if data is None:
        raise CompensationError("compensation must look at images, got no data; pass `data`, for example a DataLoader")
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    empty = True
    for batch in data:
        pair = isinstance(batch, list | tuple) and len(batch) == 2
        parts = (
            batch
            if isinstance(batch, Mapping)
            else dict(zip(("pixel_values", "labels"), batch, strict=True) if pair else ())
        )
        images, labels = parts.get("pixel_values"), parts.get("labels")
        if not isinstance(images, Tensor):
            raise CompensationError(
                "batches must be dicts with `pixel_values` (B, C, H, W), or pairs (images, labels), got "
                f"{sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__}"
            )
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            images = images[labels >= 0]
        if len(images):
            empty = False
            yield images.to(weight.device, weight.dtype)
    if empty:
        raise CompensationError("compensation must see at least one image, but `data` gave none")
