"""What a block's attention was like: its keys, and how much the class token read of every token.

Letters: B images, H heads, T tokens of the sequence, D channels of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hf_prune.errors import UnsupportedModelError

PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
SOFTMAXES = (torch.softmax, Tensor.softmax, F.softmax)


@dataclass(frozen=True)
class Attention:
    """The attention of one block.

    Attributes:
        key: `(B, H, T, D)`.
        received: `(B, T)`, the attention that each token gets, mean over heads: from the class token where there
            is one, else from all tokens.
    """

    key: Tensor
    received: Tensor

    def key_metric(self) -> Tensor:
        """Return `(B, T, D)`: the mean of the heads' keys, what ToMe compares tokens by."""
        return self.key.mean(1)


class WatchAttention(TorchFunctionMode):
    """While active, notes what the first attention inside works with, fused or written out.

    Args:
        has_class_token: Whether the first token of a sequence is one.

    Attributes:
        look_again: Does once more what watching adds to the attention itself, for who measures it.
    """

    def __init__(self, *, has_class_token: bool) -> None:
        super().__init__()
        self.has_class_token = has_class_token
        self.key: Tensor | None = None
        self.weights: Tensor | None = None
        self.look_again: Callable[[], Any] = lambda: None

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Pass everything through, and look at attention."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention and self.weights is None:
            query, key = args[:2]
            self.key = key
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            self.look_again = partial(self._weights, query, key, mask, kwargs.get("scale"))
            self.weights = self.look_again()
        elif func in PRODUCTS and self.key is None and args[0].ndim == 4:
            self.key = args[1].transpose(-2, -1)
        elif func in SOFTMAXES and self.weights is None and args[0].ndim == 4:
            self.weights = output
        return output

    def _weights(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """Return the attention of those rows that count, `(B, H, rows, T)`."""
        rows = slice(0, 1) if self.has_class_token else slice(None)
        scores = query[:, :, rows] @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if mask is not None:
            scores = scores + (mask if mask.shape[2] == 1 else mask[:, :, rows])
        return scores.softmax(-1)

    def seen(self, block: object, policy: Tensor | None = None) -> Attention:
        """Return what was noted.

        Args:
            block: What ran.
            policy: `(B, T)`, 1 for every token in play; what is not in play does not count as a reader.

        Raises:
            UnsupportedModelError: If nothing was.
        """
        if self.key is None or self.weights is None:
            raise UnsupportedModelError(
                f"reducing tokens by attention needs blocks whose attention is torch's scaled_dot_product_attention "
                f"or a product and a softmax, but {type(block).__name__} runs neither; choose a method that reads "
                f"tokens alone (spvit, dynamicvit, random)"
            )
        if self.has_class_token:
            return Attention(self.key, self.weights[:, :, 0].mean(1))
        weights = self.weights.mean(1)
        if policy is None:
            return Attention(self.key, weights.mean(1))
        readers = policy.detach().to(weights.dtype)
        return Attention(self.key, (readers.unsqueeze(1) @ weights).squeeze(1) / readers.sum(1, keepdim=True))
