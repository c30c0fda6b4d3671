"""SPViT's multi-head token selector: how much is each patch token worth keeping?

Letters: B images, N candidate tokens, H heads, D channels of one head.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_prune.errors import UnsupportedModelError
from hf_prune.tokens.config import Packages, TokenPruningConfig
from hf_prune.tokens.reducers.base import Selector, TokenScores, View


class HeadLinear(nn.Module):
    """A linear layer on each head's channels: one weight for all heads, or one each."""

    def __init__(self, in_features: int, out_features: int, num_weights: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_weights, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(num_weights, out_features))
        # Heads are narrow: at the usual 0.02 four layers of them say nothing, and learn for long to say anything.
        nn.init.trunc_normal_(self.weight, std=in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(H, R, in_features)` to `(H, R, out_features)`, R rows of tokens."""
        weight, bias = self.weight.transpose(1, 2), self.bias.unsqueeze(1)
        return torch.baddbmm(bias, x, weight.expand(x.shape[0], -1, -1))


class SoftTokenSelector(Selector):
    """Scores tokens per head slice and averages the heads by learned, token-dependent weights.

    Always computes in float32: half precision made the published training diverge.

    Source: Kong et al., SPViT, ECCV 2022, arXiv 2112.13890. As in the released code, the decision's logits are
    the head-weighted mean of log-probabilities and the package weight that of probabilities. Differs from it
    by one MLP per head and the paper's first MLP (both switchable), by denominators that cannot be zero, and by weights
    that start at 1 / sqrt(inputs) instead of 0.02, which makes short training find a good order of the tokens.

    Args:
        dim: Token width; a multiple of `num_heads`, at least 4 per head.
        num_heads: Number of contiguous channel slices scored separately.
        share_head_mlp: See `TokenPruningConfig`.
        paper_mlp1: See `TokenPruningConfig`.

    Raises:
        UnsupportedModelError: If `dim` cannot be split that way.
    """

    learned: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True
    packages: ClassVar[Packages] = "single"

    def __init__(self, dim: int, num_heads: int, *, share_head_mlp: bool = False, paper_mlp1: bool = True) -> None:
        super().__init__()
        if dim % num_heads or dim // num_heads < 4:
            raise UnsupportedModelError(
                f"a selector needs a width that splits into heads of 4 channels or more, got width {dim} and "
                f"{num_heads} heads; choose a number of heads that divides the width"
            )
        head_dim, num_weights = dim // num_heads, 1 if share_head_mlp else num_heads
        self.num_heads, self.paper_mlp1 = num_heads, paper_mlp1
        feature_dim = head_dim // 2 * (1 if paper_mlp1 else 2)
        hidden_dims = (head_dim // 2, head_dim // 4)
        # Without scale and shift: the linear layer behind it has both already.
        self.norm = nn.LayerNorm(head_dim, elementwise_affine=False)
        self.feature = HeadLinear(head_dim, feature_dim, num_weights)
        self.score = nn.Sequential(
            HeadLinear(head_dim // 2 * 2, hidden_dims[0], num_weights),
            nn.GELU(),
            HeadLinear(hidden_dims[0], hidden_dims[1], num_weights),
            nn.GELU(),
            HeadLinear(hidden_dims[1], 2, num_weights),
        )
        squeezed = max(num_heads // 2, 1)
        self.head_importance = nn.Sequential(
            nn.Linear(num_heads, squeezed), nn.GELU(), nn.Linear(squeezed, num_heads), nn.Sigmoid()
        )
        for layer in (self.head_importance[0], self.head_importance[2]):
            nn.init.trunc_normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        # A token is kept where logit(keep) - logit(drop) reaches this; calibration moves it off zero.
        self.register_buffer("keep_threshold", torch.zeros(()))

    @classmethod
    def build(
        cls, dim: int, settings: TokenPruningConfig, stage: int, *, start_keep_ratio: float
    ) -> "SoftTokenSelector":
        """See `Reducer.build`; it starts by keeping about its share of the tokens that it sees."""
        selector = cls(dim, settings.num_heads, share_head_mlp=settings.share_head_mlp, paper_mlp1=settings.paper_mlp1)
        selector.start_at_keep_probability(start_keep_ratio)
        return selector

    def judge(self, view: View) -> TokenScores:
        """See `Selector.judge`."""
        return self(view.candidates, view.tokens.candidates_alive)

    @torch.no_grad()
    def start_at_keep_probability(self, keep_probability: float) -> None:
        """Bias the last layer so that an untrained selector keeps about this fraction of its candidates."""
        odds = torch.logit(torch.tensor(keep_probability), eps=0.01)
        self.score[-1].bias.copy_(torch.stack([odds / 2, -odds / 2]))  # type: ignore[union-attr]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SoftTokenSelector":
        """Move like any module, but stay in float32 where the model around is cast to half precision."""
        return super()._apply(lambda tensor: fn(tensor).float(), recurse)

    def forward(self, tokens: Tensor, alive: Tensor) -> TokenScores:
        """Score every token, looking at the mean of those alive.

        Args:
            tokens: `(B, N, dim)`.
            alive: `(B, N)`, 1 where the token is still in the image, 0 where it was dropped before.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            heads = tokens.float().unflatten(-1, (self.num_heads, -1))
            keep, drop = self._score_heads(self.norm(heads).permute(2, 0, 1, 3), alive.float())
            importance = self.head_importance(heads.mean(dim=-1))
            importance = importance / importance.sum(-1, keepdim=True).clamp_min(1e-6)
            logits = torch.stack([(importance * keep).sum(-1), (importance * drop).sum(-1)], dim=-1)
            return TokenScores(logits, (importance * keep.exp()).sum(-1))

    def _score_heads(self, heads: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities `(B, N, H)` of keep and of drop that each head's slice gives.

        The mean over tokens is the same for all tokens of an image, so its part of the first scoring layer is
        computed once an image instead of once a token.
        """
        num_heads, num_images, num_tokens, _ = heads.shape
        features = nn.functional.gelu(self.feature(heads.reshape(num_heads, num_images * num_tokens, -1)))
        local, shared = (features, features) if self.paper_mlp1 else features.chunk(2, dim=-1)
        weight = alive / alive.sum(1, keepdim=True).clamp_min(1e-6)
        shared = shared.unflatten(1, (num_images, num_tokens))
        context = torch.matmul(weight[:, None, :], shared).squeeze(2)
        first: HeadLinear = self.score[0]  # type: ignore[assignment]
        of_local, of_context = first.weight.chunk(2, dim=2)
        image_part = first.bias.unsqueeze(1) + context @ of_context.transpose(1, 2)
        token_part = (local @ of_local.transpose(1, 2)).unflatten(1, (num_images, num_tokens))
        scores = self.score[1:]((token_part + image_part.unsqueeze(2)).flatten(1, 2))
        margin = (scores[..., 0] - scores[..., 1]).unflatten(1, (num_images, num_tokens)).permute(1, 2, 0)
        return nn.functional.logsigmoid(margin), nn.functional.logsigmoid(-margin)

    def load_released_state(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """Take the weights of one selector from a checkpoint of the released SPViT code.

        That code lists its MLPs once per head even where the heads share one, so a selector with shared
        weights reads the first entry and insists that the others equal it.

        Args:
            state: The checkpoint's tensors.
            prefix: Where the selector lies in it, for example `"score_predictor.0."`.

        Raises:
            UnsupportedModelError: If heads that should share weights differ.
            KeyError: If a tensor is missing.
        """
        own: dict[str, Tensor] = {"keep_threshold": self.keep_threshold}
        for index in (0, 2):
            for kind in ("weight", "bias"):
                own[f"head_importance.{index}.{kind}"] = state[f"{prefix}senet.{index}.{kind}"]
        heads = range(self.num_heads)
        layers = {"feature": "in_conv.{}.1", "score.0": "out_conv.{}.0", "score.2": "out_conv.{}.2"}
        for ours, theirs in {**layers, "score.4": "out_conv.{}.4"}.items():
            for kind in ("weight", "bias"):
                own[f"{ours}.{kind}"] = torch.stack([state[f"{prefix}{theirs.format(head)}.{kind}"] for head in heads])
        # Their norm has a scale and a shift; ours leaves both to the linear layer behind it.
        scale, shift = (
            torch.stack([state[f"{prefix}in_conv.{head}.0.{kind}"] for head in heads]) for kind in ("weight", "bias")
        )
        own["feature.bias"] = own["feature.bias"] + torch.einsum("hoi,hi->ho", own["feature.weight"], shift)
        own["feature.weight"] = own["feature.weight"] * scale.unsqueeze(1)
        if len(self.feature.weight) == 1:
            for name in [name for name in own if name.startswith(("feature", "score"))]:
                if not (own[name] == own[name][:1]).all():
                    raise UnsupportedModelError(
                        f"heads must share '{name}' in a selector built with shared weights, but they differ in the "
                        f"checkpoint; build it with `share_head_mlp=False`"
                    )
                own[name] = own[name][:1]
        self.load_state_dict(own)
