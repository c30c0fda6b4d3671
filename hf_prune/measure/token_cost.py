"""The cost of a plain vision transformer as a function of how many tokens each block sees.

`whole = rest + sum of block(tokens at that block) + sum of selector(tokens it scores)`. With MACs the two functions
are polynomials (linear layers: degree one, attention: degree two), known exactly from three counts of the real
modules; with milliseconds they are a measured table. Either way the cost of an image, a batch or a
dataset follows from its token counts alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hf_prune.tokens.attention import WatchAttention
from hf_prune.tokens.config import Packages, TokenPruningConfig
from hf_prune.tokens.pruning import ForwardRun, TokenPruning
from hf_prune.tokens.reducers.base import Merger
from hf_prune.tokens.reducers.registry import reducer_class
from hf_prune.tokens.rope import rope_of_kept
from hf_prune.tokens.site import TokenSite, find_site
from hf_prune.tokens.tokenset import TokenSet


@dataclass(frozen=True)
class TokenCost:
    """What blocks and selectors cost at every sequence length.

    Attributes:
        block: `(T + 1,)`, cost of one block at a sequence length of 0 to T.
        selector: `(T + 1,)`, cost of scoring, packaging and removing at that length.
        reader: `(T + 1,)`, cost of what reads all tokens behind the last block, by how many the block had; None where
            nothing does.
        rest: Cost of everything else (patch embedding, head).
        depth: Number of blocks.
        num_prefix_tokens: Tokens in front of the patches.
        num_patches: Patches of the image grid.
        packages: What becomes of dropped tokens, as in the settings: how many package tokens there are.
    """

    block: Tensor
    selector: Tensor
    rest: float
    depth: int
    num_prefix_tokens: int
    num_patches: int
    reader: Tensor | None = None
    packages: Packages = "single"

    @property
    def dense(self) -> float:
        """Cost without any selector."""
        length = self.num_prefix_tokens + self.num_patches
        reader = 0.0 if self.reader is None else float(self.reader[length])
        return self.rest + self.depth * float(self.block[length]) + reader

    def of_kept(self, kept: Tensor, before_blocks: Sequence[int]) -> Tensor:
        """Return the cost `(...)` of images that keep `kept` `(..., stages)` patches after each selector.

        Differentiable; fractional counts are interpolated.
        """
        total = torch.full(kept.shape[:-1], self.rest, dtype=torch.float64, device=kept.device)
        length = torch.full_like(total, self.num_prefix_tokens + self.num_patches)
        edges = [0, *before_blocks, self.depth]
        for stage in range(len(edges) - 1):
            if stage > 0:
                total = total + _lookup(self.selector, length)
                num_packages = {"single": 1, "per_stage": stage, "none": 0}[self.packages]
                length = self.num_prefix_tokens + num_packages + kept[..., stage - 1].double()
            total = total + (edges[stage + 1] - edges[stage]) * _lookup(self.block, length)
        return total if self.reader is None else total + _lookup(self.reader, length)


def _lookup(values: Tensor, length: Tensor) -> Tensor:
    """Interpolate `values` (one per integer) linearly at `length`."""
    values = values.to(length.device)
    low = length.detach().floor().clamp(0, len(values) - 2).long()
    share = length - low
    return values[low] * (1 - share) + values[low + 1] * share


class BlockProbe:
    """Runs one block, or one selector, of a dense model on any number of tokens, as the model would run it.

    Args:
        model: A dense model of a supported kind.
        pixel_values: An example batch `(B, 3, H, W)`; its batch size is the probe's.
        settings: What the selectors will be like; only their making is used, not where they sit.
    """

    def __init__(self, model: nn.Module, pixel_values: Tensor, settings: TokenPruningConfig) -> None:
        self.site: TokenSite = find_site(model)
        self.run_model: Callable[[], Any] = lambda: model(pixel_values)
        inputs: dict[str, Any] = {}

        def remember(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs.update(x=args[0], rope=kwargs.get("rope"))

        handle = self.site.blocks[0].register_forward_pre_hook(remember, with_kwargs=True)
        with torch.no_grad():
            self.run_model()
        handle.remove()
        self.x: Tensor = inputs["x"]
        self.rope: Tensor | None = inputs["rope"]
        self.num_patches = self.x.shape[1] - self.site.num_prefix_tokens
        self.pruning = TokenPruning(settings, self.site).to(self.x.device).eval()

    def _sequence(self, length: int) -> Tensor:
        """Return `(B, length, C)` of tokens like the model's own, one longer than the dense sequence at most."""
        return torch.cat([self.x, self.x[:, -1:]], dim=1)[:, :length].contiguous()

    def block(self, length: int) -> Callable[[], Any]:
        """Return a call that runs one block at a sequence length."""
        x = self._sequence(length)
        kwargs: dict[str, Tensor | None] = {self.site.mask_argument: None}
        if self.rope is not None:
            num_rows = length - self.site.num_prefix_tokens
            index = torch.arange(num_rows, device=x.device).clamp_max(self.num_patches - 1).expand(len(x), -1)
            tokens = TokenSet(self.num_patches, index.float(), index.new_zeros(len(x), 0), index)
            kwargs["rope"] = rope_of_kept(self.rope, tokens)
        block = self.site.blocks[self.site.depth // 2]
        return lambda: block(x, **kwargs)

    def reader(self, length: int) -> Callable[[], Any]:
        """Return a call that runs what reads all tokens behind the norm, if there is such a module."""
        x, module = self._sequence(length), self.site.token_reader
        return (lambda: None) if module is None else (lambda: module(x))

    def selector(self, length: int) -> Callable[[], Any]:
        """Return a call that scores a sequence, packages what is dropped and removes it."""
        x, first = self._sequence(length), self.pruning.settings.before_blocks[0]
        tokens = TokenSet.all_patches(len(x), length - self.site.num_prefix_tokens, x.device)
        run = ForwardRun()
        if not self.pruning.watches(first - 1):
            return lambda: self.pruning.reduce(first, x, tokens, run)
        with WatchAttention(has_class_token=self.site.num_prefix_tokens > 0) as watch:
            self.block(length)()
        run.attention[first] = watch.seen(self.site.blocks[0])
        return lambda: (watch.look_again(), self.pruning.reduce(first, x, tokens, run))


@torch.enable_grad()  # the counter's module tracker fails on views of parameters made without gradients
def count_macs(run: Callable[[], object]) -> int:
    """Return the multiply-accumulates of one call: matrix products, convolutions and attention.

    Element-wise work (norms, activations, softmax) is not counted, as is usual. Fused attention is
    switched off while counting, because torch counts only some of its kernels.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def count_params(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs_cost(model: nn.Module, pixel_values: Tensor, settings: TokenPruningConfig) -> TokenCost:
    """Return the MACs of a dense model's parts for one image, at every sequence length.

    Args:
        model: A dense model of a supported kind, in evaluation mode.
        pixel_values: One image `(1, 3, H, W)`.
        settings: What the selectors are like. What PiToMe and DiffRate compute goes with how many tokens a reduction
            takes away too: for them a selector's cost is that of the first keep ratio, up to rounding.

    Cost: one forward pass and three runs each of a single block, selector and reader.
    """
    probe = BlockProbe(model, pixel_values[:1], settings)
    longest = probe.x.shape[1]
    # An even number apart: ToMe's two halves of the tokens are equally long at every second length only. And far apart,
    # so that rounded counts of what is merged are not blown up at short lengths.
    apart = max(probe.num_patches // 5 * 2, 2)
    points = [longest, longest - apart, longest - 2 * apart]
    lengths = np.arange(longest + len(settings.before_blocks) + 1)
    curves = []
    for part in (probe.block, probe.selector, probe.reader):
        counts = [count_macs(part(length)) for length in points]
        polynomial = np.polynomial.Polynomial.fit(points, counts, 2, domain=[0, 1], window=[0, 1])
        curves.append(torch.tensor(np.rint(polynomial(lengths))))
    block, selector, reader = curves
    rest = count_macs(probe.run_model) - probe.site.depth * float(block[longest]) - float(reader[longest])
    if issubclass(reducer_class(settings.method), Merger):
        reader = torch.full_like(reader, float(reader[longest]))  # merged tokens are repeated before they are read
    return TokenCost(
        block,
        selector,
        rest,
        probe.site.depth,
        probe.site.num_prefix_tokens,
        probe.num_patches,
        reader,
        cast(Packages, settings.packages),
    )
