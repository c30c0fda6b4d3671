"""The layer of a classifier in which concepts are looked for: found without knowing the architecture."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.errors import UnsupportedModelError
from hf_prune.tokens.site import logits_of

HINT = "pass `layer`, the name of a module (`model.named_modules()`) that returns (B, C, H, W), (B, N, C) or (B, C)"


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """A layer, and how its output becomes one feature vector an image.

    A feature vector is the mean over positions. Of a sequence only those tokens count that the classifier reads: the
    patches where it averages them, the class token alone behind the last block where it takes that one.

    Attributes:
        layer: Name of the module.
        channels_last: Whether a four-dimensional output is (B, H, W, C).
        read: For sequences, `(N,)`, True for tokens on which the logits depend.
    """

    layer: str
    channels_last: bool
    read: Tensor | None

    def mean(self, output: Tensor) -> Tensor:
        """(B, ...) -> (B, C), the feature vectors."""
        return self._positions(output).mean(1)

    def sum(self, gradient: Tensor) -> Tensor:
        """(B, ...) -> (B, C), the derivatives for a step that all positions take together, as their mean does."""
        return self._positions(gradient).sum(1)

    def _positions(self, tensor: Tensor) -> Tensor:
        if tensor.ndim == 2:
            return tensor[:, None].float()
        if tensor.ndim == 4:
            return (tensor if self.channels_last else tensor.movedim(1, -1)).flatten(1, 2).float()
        return (tensor if self.read is None else tensor[:, self.read]).float()


def find_bottleneck(model: nn.Module, images: Tensor, layer: str | None) -> Bottleneck:
    """Describe a layer, by default the last one that still knows places and that nothing goes past.

    That is, of all modules that return a map `(B, C, H, W)`, `(B, H, W, C)` or a sequence `(B, N, C)` with more than
    one position, the last to finish such that the logits no longer depend on the image if its output is held fixed.
    In most networks that is the end of the last block, or the norm behind it.

    Args:
        model: In evaluation mode.
        images: `(B, 3, H, W)` with B > 1, any that the model takes.
        layer: Name of another module.

    Raises:
        UnsupportedModelError: If there is no such layer, or the named one cannot serve.
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        layer = layer if layer is not None else _last_cut(model, images)
        held: list[Tensor] = []

        def hold(output: Tensor) -> Tensor:
            held.append(output.detach().requires_grad_())
            return held[0].clone()

        with replaced_output(model, layer, hold):
            logits = logits_of(model(images))
        output = held[0]
        if output.ndim not in (2, 3, 4) or len(output) != len(images):
            raise UnsupportedModelError(
                f"layer '{layer}' must give features for each of {len(images)} images, got the shape "
                f"{tuple(output.shape)}; {HINT}"
            )
        # Random weights: the sum of all logits may well not depend on anything.
        weights = torch.randn(logits.shape[1], generator=torch.Generator().manual_seed(0)).to(logits)
        (gradient,) = torch.autograd.grad((logits * weights).sum(), output, allow_unused=True)
    if gradient is None or not gradient.any():
        raise UnsupportedModelError(
            f"the logits must depend on layer '{layer}', but do not; is the model trained? Or {HINT}"
        )
    read = gradient.flatten(2).any(2).any(0) if output.ndim == 3 else None
    return Bottleneck(layer, output.ndim == 4 and _channels_last(output, images), read)


@contextmanager
def replaced_output(model: nn.Module, layer: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let the first output of a layer be something else meanwhile.

    Raises:
        UnsupportedModelError: If there is no such layer, it does not run or not once, or it returns no tensor.
    """
    modules = dict(model.named_modules())
    if layer not in modules or not layer:
        near = [name for name in modules if name.endswith(layer)][:3] if layer else []
        raise UnsupportedModelError(f"the model has no layer '{layer}'{f' (there are {near})' if near else ''}; {HINT}")
    calls = 0

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if not isinstance(output, Tensor):
            raise UnsupportedModelError(f"layer '{layer}' must return a tensor, got {type(output).__name__}; {HINT}")
        return change(output)

    handle = modules[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if calls != 1:
        raise UnsupportedModelError(f"layer '{layer}' must run once for each batch, but ran {calls} times; {HINT}")


def _last_cut(model: nn.Module, images: Tensor) -> str:
    for layer in reversed(_layers_with_places(model, images)):
        with replaced_output(model, layer, Tensor.detach):
            logits = logits_of(model(images))
        if not logits.requires_grad:
            return layer
        (gradient,) = torch.autograd.grad(logits.sum(), images, allow_unused=True)
        if gradient is None:
            return layer
    raise UnsupportedModelError(f"no layer of {type(model).__name__} holds all that its logits depend on; {HINT}")


def _layers_with_places(model: nn.Module, images: Tensor) -> list[str]:
    """Return the modules that run once and return a map or a sequence, in the order in which they finish."""
    finished: list[str] = []
    spatial: set[str] = set()

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            finished.append(name)
            if isinstance(output, Tensor) and len(output) == len(images) and _num_positions(output) > 1:
                spatial.add(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in finished if name in spatial and finished.count(name) == 1]


def _num_positions(output: Tensor) -> int:
    if output.ndim == 4:
        # Of two sides and a width the smallest two; a map of one position has two sides of one.
        return sorted(output.shape[1:])[0] * sorted(output.shape[1:])[1]
    # A sequence of features of one number is rather what is left of a sequence: (B, C, 1).
    return output.shape[1] if output.ndim == 3 and output.shape[2] > 1 else 0


def _channels_last(output: Tensor, images: Tensor) -> bool:
    """Return whether the first two sizes, and not the last two, are in the proportion of the image's sides."""
    height, width = images.shape[2:]

    def fits(rows: int, columns: int) -> bool:
        # A size may have been rounded up or down on the way.
        return abs(rows * width - columns * height) < max(height, width)

    first, second, third = output.shape[1:]
    return fits(first, second) and not fits(second, third)
