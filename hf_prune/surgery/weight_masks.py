"""Masks on single weights: chosen by a saliency for the whole network together, and kept while it trains.

Such a network is not smaller or faster. It is what the methods that prune at initialisation were made and judged by.
"""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_prune.errors import CriterionError, PlanError
from hf_prune.score.parts import Weights, prunable_weights
from hf_prune.score.registry import criterion
from hf_prune.score.saliency import Saliency
from hf_prune.surgery.gates import remove_parametrizations

WeightMasks = dict[str, Tensor]


class MaskOnWeight(nn.Module):
    """A weight as the model sees it: zero where it is masked, so that no gradient reaches what is.

    Attributes:
        kept: Truth values of the weight's shape, saved with the model.
    """

    kept: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the masked weight."""
        return weight * self.kept


def weight_masks(
    model: nn.Module,
    saliency: str | Saliency,
    keep_ratio: float,
    data: Iterable[Any] | None = None,
    *,
    example_inputs: Any = None,
    protect: Iterable[str] = (),
    invert: bool = False,
    allow_empty: bool = False,
) -> WeightMasks:
    """Choose the most salient weights of all linear layers and convolutions together; the model is left as it is.

    Args:
        model: Any module.
        saliency: Name or instance of a criterion that rates weights: snip, grasp, synflow, force. Those that go by
            steps end at `keep_ratio`, whatever their own.
        keep_ratio: Share of these weights to keep, exact to one weight; equal saliencies go by position.
        data: Batches, for saliencies that look at data.
        example_inputs: See `hf_prune.analyze`; for synflow.
        protect: Patterns of parameter names to leave dense, which do not count (`*` stands for anything).
        invert: Keep the least salient weights instead: a control that must do worse if saliencies mean anything.
        allow_empty: Let layers lose all of their weights. Separate queries and keys of transformers are often of no
            influence before training; without them attention is an average, and the rest can learn.

    Returns:
        Parameter name -> truth values of its shape, on its device; true is kept.

    Raises:
        CriterionError: If the criterion cannot rate weights, or data are missing.
        PlanError: If there is nothing to mask, or a layer would lose all of its weights.
    """
    rule = criterion(saliency)
    if not isinstance(rule, Saliency):
        raise CriterionError(
            f"`saliency` must rate single weights, as snip, grasp, synflow, force do, got '{rule.name}'"
        )
    sizes = {name: weight.numel() for name, weight in maskable_weights(model, protect).items()}
    number = num_kept(sum(sizes.values()), keep_ratio)
    parts = Weights(sizes, example_inputs, keep_ratio)
    values = rule.rate(model, parts, data)
    if not all(tensor.isfinite().all() for tensor in values.values()):
        raise CriterionError(f"saliencies must be finite, but '{rule.name}' gave others; score the model in float32")
    masks = parts.best({name: -v if invert else v for name, v in values.items()}, number)
    if not allow_empty:
        require_no_empty_layer(masks)
    return masks


def maskable_weights(model: nn.Module, protect: Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """Return the weights of linear layers and convolutions that match none of some patterns.

    Raises:
        PlanError: If there is none.
    """
    patterns = list(protect)
    found = {
        name: weight
        for name, weight in prunable_weights(model).items()
        if not any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    if not found:
        raise PlanError(
            f"{type(model).__name__} has no weight to mask: no plain linear layer or convolution, or none outside "
            f"`protect`; fold masks and gates that it has"
        )
    return found


def num_kept(num_weights: int, keep_ratio: float) -> int:
    """Return the number of weights to keep.

    Raises:
        PlanError: If it is none, or more than there are.
    """
    number = round(num_weights * keep_ratio)
    if not 0 < number <= num_weights:
        raise PlanError(
            f"`keep_ratio` must keep at least one of {num_weights:,} weights and at most all, got {keep_ratio}"
        )
    return number


def require_no_empty_layer(masks: Mapping[str, Tensor]) -> None:
    """Check that no layer has collapsed: a network without paths cannot learn.

    Raises:
        PlanError: If one keeps none of its weights, with all such layers.
    """
    empty = [name for name, kept in masks.items() if not kept.any()]
    if empty:
        share = sum(int(kept.sum()) for kept in masks.values()) / sum(kept.numel() for kept in masks.values())
        sizes = ", ".join(f"'{name}' (of {masks[name].numel():,})" for name in empty)
        raise PlanError(
            f"every layer must keep a weight, but at a `keep_ratio` of {share:.3g} nothing is left of {sizes}; raise "
            f"it, protect such layers, take a saliency that goes by steps (synflow, force), or pass `allow_empty` if "
            f"the network can do without such layers"
        )


@torch.no_grad()
def add_weight_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Mask weights, now and while the model trains, with any optimizer: masked weights are zero and stay so.

    Args:
        model: Changed in place. The masks become buffers of it; `fold_weight_masks` before it is analysed or published.
        masks: Parameter name -> truth values of its shape, for this model or another of the same shapes.

    Raises:
        PlanError: If they are of another model, or it has masks or gates on these weights already.
    """
    weights = prunable_weights(model)
    for name, kept in masks.items():
        if name not in weights or weights[name].shape != kept.shape:
            found = tuple(weights[name].shape) if name in weights else "no plain weight of that name"
            raise PlanError(f"masks must fit the model, but '{name}' is masked as {tuple(kept.shape)} and has {found}")
    for name, kept in masks.items():
        weights[name].mul_(kept.to(weights[name].device))
        path, _, parameter = name.rpartition(".")
        mask = MaskOnWeight(kept.to(weights[name].device).clone())
        parametrize.register_parametrization(model.get_submodule(path), parameter, mask, unsafe=True)


def fold_weight_masks(model: nn.Module) -> None:
    """Take the masks off; the model stays what it was with them, of plain weights with zeros among them.

    Raises:
        PlanError: If there are none.
    """
    with torch.no_grad():
        number = remove_parametrizations(model, MaskOnWeight, leave_parametrized=True)
    if not number:
        raise PlanError("the model has no masks on weights to fold")


def layer_keep_ratios(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the share of its weights that each layer keeps."""
    return {name: float(kept.double().mean()) for name, kept in masks.items()}


def overlap(masks: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """Return the Jaccard index of two choices of weights: kept by both, over kept by either.

    To be read beside that of two choices from different images of the same kind, which is less than one.

    Raises:
        PlanError: If they are of different models.
    """
    if {name: kept.shape for name, kept in masks.items()} != {name: kept.shape for name, kept in others.items()}:
        raise PlanError("masks to compare must be of the same weights")
    both = sum(int((kept & others[name]).sum()) for name, kept in masks.items())
    either = sum(int((kept | others[name]).sum()) for name, kept in masks.items())
    return both / max(either, 1)
