"""Run blocks on exactly the tokens that are left: all images of a batch in one sequence, without padding.

Norms and linear layers work token by token and do not care whose token it is. Only attention does, so it alone is given
the padded batch, by stepping in where the block calls torch's fused attention.

Letters: B images, T tokens of the longest image, L tokens of all images together, H heads, D channels of one head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hf_prune.errors import UnsupportedModelError
from hf_prune.tokens.tokenset import hide_keys

# Packing costs some dozens of small operations a block, one after the other; below this many multiply-accumulates of
# linear layers saved a block (about a millisecond of a CPU core; threads share them out) padding is cheaper.
PACK_FROM_MACS = 5e7


@dataclass(frozen=True)
class Bucket:
    """Images of a packed sequence whose attention is computed together, padded to the longest of them.

    Attributes:
        tokens: Their tokens in the packed sequence.
        num_images: b.
        source: `(b * t)`, for each padded position the token that stands there, counted from the bucket's first; None
            where all are equally long, so that nothing must be copied.
        place: `(l,)`, padded position of each token, or None likewise.
        bias: `(b, 1, 1, t)`, hides the padding; None where there is none. While training `(b, 1, t, t)`, which carries
            the gradient of the decisions as well.
    """

    tokens: slice
    num_images: int
    source: Tensor | None
    place: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, lengths: Tensor, start: int, policy: Tensor, *, training: bool) -> "Bucket":
        """Return the bucket of images of these lengths whose tokens begin at `start` of `policy` `(L,)`."""
        stop = start + int(lengths.sum())
        if bool((lengths == lengths[0]).all()):
            keys = policy[start:stop].unflatten(0, (len(lengths), -1))
            bias = hide_keys(keys, training=True, see_self=True) if training else None
            return cls(slice(start, stop), len(lengths), None, None, bias)
        column = torch.arange(int(lengths.max()), device=lengths.device)
        real = column < lengths[:, None]
        first = (lengths.cumsum(0) - lengths)[:, None]
        source = first + torch.minimum(column, lengths[:, None] - 1)
        bias = hide_keys(policy[start:stop][source] * real, training=training, see_self=training)
        return cls(slice(start, stop), len(lengths), source.flatten(), real.flatten().nonzero().squeeze(1), bias)

    def pad(self, part: Tensor) -> Tensor:
        """Turn the bucket's share of `(1, H, L, D)` into `(b, H, t, D)`."""
        rows = part[0].transpose(0, 1)[self.tokens]
        rows = rows if self.source is None else rows.index_select(0, self.source)
        return rows.unflatten(0, (self.num_images, -1)).transpose(1, 2)

    def unpad(self, output: Tensor) -> Tensor:
        """Turn `(b, H, t, D)` into the bucket's tokens `(l, H, D)`."""
        rows = output.transpose(1, 2).flatten(0, 1)
        return rows if self.place is None else rows.index_select(0, self.place)


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a packed sequence belong.

    Attributes:
        num_images: B.
        length: T.
        place: `(L,)`, position of each token in the flattened padded batch `(B * T)`; shorter images come first.
        source: `(B * T)`, the token that stands at each position; any token where there is padding.
        buckets: How attention is computed.
    """

    num_images: int
    length: int
    place: Tensor
    source: Tensor
    buckets: list[Bucket]

    @classmethod
    def of(cls, policy: Tensor, *, training: bool = False) -> "Packing | None":
        """Return the packing of a batch, or None where there is no padding to save.

        Args:
            policy: `(B, T)`, 1 for every token in play.
            training: Whether gradients shall reach the policy.
        """
        num_images, length = policy.shape
        if num_images == 1 or bool(policy.all()):
            return None
        lengths, order = policy.detach().sum(1).long().sort()
        image, position = policy[order].nonzero(as_tuple=True)
        place = order[image] * length + position
        source = place.new_zeros(num_images * length)
        source[place] = torch.arange(len(place), device=place.device)
        kept = policy.flatten()[place]
        buckets, start = [], 0
        # On a CPU attention is as fast on one image as on many, so only images of one length are put together.
        # Elsewhere one padded call costs less than many calls.
        groups = lengths.unique_consecutive(return_counts=True)[1].tolist()
        for part in lengths.split(groups if policy.device.type == "cpu" else [num_images]):
            buckets.append(Bucket.of(part, start, kept, training=training))
            start = buckets[-1].tokens.stop
        return cls(num_images, length, place, source, buckets)

    @staticmethod
    def is_worth_it(policy: Tensor, dim: int) -> bool:
        """Return whether the padding of a batch `(B, T)` costs a block of width `dim` more than packing does."""
        padding = policy.numel() - int(policy.sum())
        threads = torch.get_num_threads() if policy.device.type == "cpu" else 1
        return padding * 12 * dim**2 >= PACK_FROM_MACS * threads

    def pack(self, x: Tensor) -> Tensor:
        """Turn a padded batch `(B, T, ...)` into one sequence `(1, L, ...)`."""
        return x.flatten(0, 1).index_select(0, self.place).unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """Turn one sequence `(1, L, ...)` into a padded batch `(B, T, ...)`, anything in the padding."""
        return x[0].index_select(0, self.source).unflatten(0, (self.num_images, self.length))


class AttendPerImage(TorchFunctionMode):
    """While active, fused attention on a packed sequence attends within each image."""

    def __init__(self, packing: Packing) -> None:
        super().__init__()
        self.packing, self.num_calls = packing, 0

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Pass everything through but attention."""
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.num_calls += 1
        outputs = []
        for bucket in self.packing.buckets:
            query, key, value = (bucket.pad(part) for part in args[:3])
            kwargs["attn_mask"] = None if bucket.bias is None else bucket.bias.to(query.dtype)
            outputs.append(bucket.unpad(func(query, key, value, *args[4:], **kwargs)))
        return torch.cat(outputs).transpose(0, 1).unsqueeze(0)


def run_packed(block: Callable[..., Tensor], x: Tensor, packing: Packing, **kwargs: Any) -> Tensor:
    """Run a block on a packed sequence `(1, L, C)`.

    Raises:
        UnsupportedModelError: If the block does not use torch's fused attention, so that its images would mix.
    """
    with AttendPerImage(packing) as attention:
        output = block(x, **kwargs)
    if attention.num_calls == 0:
        raise UnsupportedModelError(
            f"a packed batch needs blocks that call torch's scaled_dot_product_attention, but "
            f"{type(block).__name__} does not; run the model with `runtime='gathered'`"
        )
    return output
