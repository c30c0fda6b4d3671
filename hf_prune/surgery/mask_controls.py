"""Controls for masks on weights: what is left of a result when the choice, or the weights, are drawn anew.

If a network trains as well under one of these as under the mask itself, the shares of its layers were what counted,
not which weights were chosen. The inverted choice is an argument of `weight_masks`.

Source: Su et al., Sanity-Checking Pruning Methods: Random Tickets can Win the Jackpot, NeurIPS 2020; Frankle et al.,
Pruning Neural Networks at Initialization: Why are We Missing the Mark?, ICLR 2021.
"""

from collections.abc import Iterable, Mapping
from math import floor
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from hf_prune.errors import PlanError
from hf_prune.surgery.weight_masks import WeightMasks, maskable_weights, num_kept, require_no_empty_layer

Shape = Literal["resnet", "vgg"]


def shuffled(masks: Mapping[str, Tensor], seed: int = 0) -> WeightMasks:
    """Return masks that keep as many weights of every layer as others do, but any."""
    return _drawn({name: (kept, int(kept.sum())) for name, kept in masks.items()}, seed)


@torch.no_grad()
def redraw_weights(model: nn.Module, names: Iterable[str], seed: int = 0) -> None:
    """Give a new model other initial weights of the same distribution, by shuffling each weight among its places.

    What an initialiser draws independently is as likely in any order, whichever library drew it and how. To be called
    before masks are added. For other initialisers, build the model again with another seed; masks go by name.

    Args:
        model: Changed in place; biases and norms are not.
        names: Of parameters, such as the keys of masks.
        seed: Of the order.
    """
    generator, parameters = torch.Generator().manual_seed(seed), dict(model.named_parameters())
    for name in names:
        weight = parameters[name]
        order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
        weight.copy_(weight.flatten()[order].view_as(weight))


def smart_ratio_masks(
    model: nn.Module,
    keep_ratio: float,
    *,
    shape: Shape = "resnet",
    linear_keep_ratio: float = 0.3,
    protect: Iterable[str] = (),
    seed: int = 0,
) -> WeightMasks:
    """Return random masks that keep less of each convolution the further back it is, by a rule without any scores.

    Of convolution l of L the share that is kept goes with (L - l + 1)^2 + (L - l + 1), for VGG divided by l^2; linear
    layers keep a fixed share. What a layer has no room for is kept in the next ones. In all, exactly `keep_ratio` is.

    Args:
        model: Left as it is; convolutions count in the order of its modules.
        keep_ratio: Share of the weights of all linear layers and convolutions.
        shape: Which rule.
        linear_keep_ratio: Share of linear layers.
        protect: See `weight_masks`.
        seed: Of the draw.

    Raises:
        PlanError: If there are no convolutions, the shares do not fit, or a layer would be empty.
    """
    if shape not in get_args(Shape):
        raise PlanError(f"`shape` must be one of {', '.join(get_args(Shape))}, got {shape!r}")
    weights = maskable_weights(model, protect)
    convs = {name: weight.numel() for name, weight in weights.items() if weight.ndim > 2}
    counts = {name: round(linear_keep_ratio * w.numel()) for name, w in weights.items() if name not in convs}
    rest = num_kept(sum(weight.numel() for weight in weights.values()), keep_ratio) - sum(counts.values())
    if not 0 < rest <= sum(convs.values()):
        raise PlanError(
            f"smart ratios must leave some and at most all of {sum(convs.values()):,} weights of convolutions, but "
            f"`keep_ratio` {keep_ratio} and `linear_keep_ratio` {linear_keep_ratio} leave {rest:,}; change one of them"
        )
    counts |= dict(zip(convs, _smart_counts(list(convs.values()), rest, shape), strict=True))
    masks = _drawn({name: (weight, counts[name]) for name, weight in weights.items()}, seed)
    require_no_empty_layer(masks)
    return masks


def _smart_counts(sizes: list[int], number: int, shape: Shape) -> list[int]:
    """Return how many weights each convolution keeps, in all exactly as many as asked for."""
    depth = len(sizes)
    shares = [(left**2 + left) / ((depth - left + 1) ** 2 if shape == "vgg" else 1) for left in range(depth, 0, -1)]
    scale = number / sum(share * size for share, size in zip(shares, sizes, strict=True))
    counts, given, spare = [], 0.0, 0.0
    for share, size in zip(shares, sizes, strict=True):
        wanted = scale * share * size + spare
        spare = max(wanted - size, 0.0)
        # Rounding the running sum keeps the total.
        counts.append(floor(given + wanted - spare + 0.5) - floor(given + 0.5))
        given += wanted - spare
    return counts


def _drawn(layers: Mapping[str, tuple[Tensor, int]], seed: int) -> WeightMasks:
    """Return masks of the shapes of tensors, each with a number of random places."""
    generator, masks = torch.Generator().manual_seed(seed), {}
    for name, (like, number) in layers.items():
        kept = torch.zeros(like.numel(), dtype=torch.bool)
        kept[torch.randperm(like.numel(), generator=generator)[:number]] = True
        masks[name] = kept.view(like.shape).to(like.device)
    return masks
