"""Fit cheap FFNs to the whole ones, from images without labels and without training."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.analyse.running import quiet_run
from hf_prune.errors import DataError
from hf_prune.tokens.two_speed import ForwardState, two_speed_of
from hf_prune.tokens.two_speed_site import find_window_site

# Of the mean square of the inputs; enough to invert where channels say the same.
RIDGE = 1e-4


class Moments:
    """Sums over rows of what an FFN reads and says, in float64 on the CPU, for not every device knows float64."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.sums: list[Any] = [0.0] * 5
        self.x = torch.zeros(0)

    def read(self, _module: nn.Module, args: tuple) -> None:
        """Forward pre-hook where the FFN begins."""
        self.x = args[0].flatten(0, -2).cpu().double()

    def say(self, _module: nn.Module, _args: tuple, output: Tensor) -> None:
        """Forward hook where it ends."""
        x, y = self.x, output.flatten(0, -2).cpu().double()
        self.num_rows += len(x)
        new = x.sum(0), y.sum(0), x.T @ x, x.T @ y, y.square().sum()
        self.sums = [old + more for old, more in zip(self.sums, new, strict=True)]

    def solve(self) -> tuple[Tensor, Tensor, float]:
        """Return weight `(out, in)`, bias `(out,)`, and the share of the output's variance that they explain."""
        sum_x, sum_y, xx, xy, yy = self.sums
        mean_x, mean_y = sum_x / self.num_rows, sum_y / self.num_rows
        xx, xy = xx - torch.outer(sum_x, mean_x), xy - torch.outer(sum_x, mean_y)
        yy = yy - sum_y @ mean_y
        ridge = RIDGE * xx.diagonal().mean().clamp_min(torch.finfo(xx.dtype).tiny)
        weight = torch.linalg.solve(xx + ridge * torch.eye(len(xx), dtype=xx.dtype), xy)
        error = yy - 2 * (weight * xy).sum() + (weight * (xx @ weight)).sum()
        return weight.T, mean_y - mean_x @ weight, float(1 - error / yy)


@torch.no_grad()
def fit_two_speed(model: nn.Module, batches: Iterable[Tensor]) -> dict[int, float]:
    """Make every cheap FFN the linear layer nearest to the whole one, by least squares on the tokens of some images.

    All tokens take the whole FFNs meanwhile. Selectors stay as they are.

    Args:
        model: With two speeds; its mode is left as it was.
        batches: Pixels `(B, 3, H, W)` on the model's device; enough for a few tokens to each channel.

    Returns:
        Block -> share of the variance of its FFN's output that its cheap FFN explains, at most 1.

    Raises:
        UnsupportedModelError: If the model has no two speeds.
        DataError: If there are no images.

    Cost: one forward pass over the batches, and for every token the squared width in multiply-accumulates; memory of
    the squared width, 16 bytes each, for every two-speed block.
    """
    two_speed, blocks = two_speed_of(model), find_window_site(model).blocks
    moments, handles, settings = {int(number): Moments() for number in two_speed.cheap}, [], two_speed.settings
    try:
        two_speed.settings = replace(settings, keep_ratios=(1.0,) * len(settings.keep_ratios))
        for number, sums in moments.items():
            handles.append(blocks[number].entry.register_forward_pre_hook(sums.read))
            handles.append(blocks[number].exit.register_forward_hook(sums.say))
        with quiet_run(model):
            for pixels in batches:
                model(pixels)
    finally:
        two_speed.settings, two_speed.state = settings, ForwardState()
        for handle in handles:
            handle.remove()
    if not all(sums.num_rows for sums in moments.values()):
        raise DataError("cheap FFNs are fitted to images, but `batches` held none; give a few dozen at least")
    explained = {}
    for number, sums in moments.items():
        weight, bias, explained[number] = sums.solve()
        cheap: Any = two_speed.cheap[str(number)]
        cheap.weight.copy_(weight)
        cheap.bias.copy_(bias)
    return explained
