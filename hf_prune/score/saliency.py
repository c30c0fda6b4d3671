"""Saliencies: weight times gradient, of single weights and summed up over units, for models of any age."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import tee
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from hf_prune.analyse.running import named_tensors, quiet_run
from hf_prune.errors import CriterionError, HfPruneWarning
from hf_prune.score.base import Criterion
from hf_prune.score.batches import labelled_batches
from hf_prune.score.parts import Parts, Values
from hf_prune.tokens.site import logits_of


class Saliency(Criterion):
    """A criterion that can rate single weights as well as units; see `hf_prune.surgery.weight_masks`."""

    @abstractmethod
    def rate(self, model: nn.Module, parts: Parts, data: Iterable[Any] | None) -> Values:
        """Return what every part is worth, for each name a tensor as `parts.sums` gives; larger is more worth keeping.

        Raises:
            CriterionError: If data are missing or something is not finite.
        """


class Probe:
    """A model to differentiate at weights made for the purpose; its own are never touched.

    Half precision becomes single, for products of small numbers are summed up.

    Attributes:
        weights: Parameters and floating-point buffers by name, sharing memory with those of the model.
    """

    def __init__(self, model: nn.Module, convert: Callable[[Tensor], Tensor] | None = None) -> None:
        self.model = model
        tensors = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
        self.weights = {name: (convert or _precise)(t) for name, t in tensors.items() if t.is_floating_point()}

    def leaves(self, names: Collection[str], masks: Mapping[str, Tensor] | None = None) -> Values:
        """Return tensors to differentiate: the weights, times masks. What is no parameter is left out."""
        masks, parameters = masks or {}, dict(self.model.named_parameters())
        found = {name: self.weights[name] for name in names if name in parameters}
        found = {name: w * masks[name].to(w) if name in masks else w.detach() for name, w in found.items()}
        return {name: weight.requires_grad_() for name, weight in found.items()}

    def run(self, leaves: Mapping[str, Tensor], inputs: Any) -> Any:
        """Return what the model makes of a tensor, a tuple or keyword arguments, with other weights in place."""
        args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs, {})
        args = tuple(args) if isinstance(args, list | tuple) else (args,)
        return functional_call(self.model, {**self.weights, **leaves}, args, kwargs)

    def loss(self, leaves: Mapping[str, Tensor], images: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        """Return the summed cross-entropy of a batch.

        Raises:
            CriterionError: If it is not finite.
        """
        logits = logits_of(self.run(leaves, _precise(images))) / temperature
        loss = F.cross_entropy(logits, labels, reduction="sum")
        if not loss.isfinite():
            raise CriterionError(f"the loss must be finite, got {loss.item()}; check images, labels and weights")
        return loss


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[Probe]:
    """Give a probe of a model in evaluation, with gradients, and with attention that can be differentiated twice.

    Batch norms whose statistics are still those they were built with have seen no data, and would leave everything as
    large as it comes: they normalise by the batch instead, and their statistics stay as they are.
    """
    fresh = [module for module in model.modules() if isinstance(module, _BatchNorm) and _is_fresh(module)]
    kept = [(module, module.running_mean, module.running_var) for module in fresh]
    try:
        for module in fresh:
            module.running_mean = module.running_var = None
        with quiet_run(model), torch.enable_grad():
            yield Probe(model)
    finally:
        for module, mean, variance in kept:
            module.running_mean, module.running_var = mean, variance


def gradients_at(scalar: Tensor, leaves: Mapping[str, Tensor], *, again: bool = False) -> Values:
    """Return the gradients of leaves by name, zero where the scalar does not depend on one.

    Args:
        scalar: What to differentiate.
        leaves: With respect to what.
        again: Whether gradients are to be differentiated themselves.
    """
    if not scalar.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(
        scalar, list(leaves.values()), create_graph=again, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


def mean_gradients(
    probe: Probe,
    names: Collection[str],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    temperature: float = 1.0,
    masks: Mapping[str, Tensor] | None = None,
) -> Values:
    """Return the gradient of the mean cross-entropy of all images, by parameter name.

    One more copy of the parameters is in memory, and the activations of one batch.

    Raises:
        CriterionError: If there is no image with a label.
    """
    leaves, num_images = probe.leaves(names, masks), 0
    totals = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for images, labels in batches:
        for name, gradient in gradients_at(probe.loss(leaves, images, labels, temperature), leaves).items():
            totals[name] += gradient
        num_images += len(images)
    if not num_images:
        raise CriterionError("saliencies must see an image with a label, but `data` gave none")
    return {name: total / num_images for name, total in totals.items()}


def rounds(data: Iterable[Any] | None) -> Iterator[Iterable[Any] | None]:
    """Yield the data again and again; what came out of an iterator, which gives it once, is kept in memory."""
    while True:
        if data is not None and iter(data) is data:
            data, now = tee(data)
            yield now
        else:
            yield data


def endless(criterion: Criterion, model: nn.Module, data: Iterable[Any] | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches, from the first again when they run out; see `labelled_batches`.

    Raises:
        CriterionError: If there are none, or none whose images could be read.
    """
    for these in rounds(data):
        empty = True
        for batch in labelled_batches(criterion, model, these):
            empty = False
            yield batch
        if empty:
            raise CriterionError("saliencies must see an image with a label, but `data` gave none")


def warn_of_silence(criterion: Criterion, sums: Mapping[str, Tensor]) -> None:
    """Warn of names of which nothing has any effect: such axes would go first, and whole."""
    silent = [name for name, values in sums.items() if not values.any()]
    if silent:
        warnings.warn(
            f"nothing in {len(silent)} of {len(sums)} ('{silent[0]}' is the first) makes any difference to "
            f"'{criterion.name}', as behind a scale that starts at zero; start from others (timm: "
            f"`zero_init_last=False`), or protect them",
            HfPruneWarning,
            stacklevel=2,
        )


def _is_fresh(norm: _BatchNorm) -> bool:
    mean, variance = norm.running_mean, norm.running_var
    return mean is not None and variance is not None and not mean.any() and bool((variance == 1).all())


def _precise(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
