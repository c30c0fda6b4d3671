"""What is left of a branch that was cut to nothing: a constant, or a constant on top of what comes in."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Constant(nn.Module):
    """Takes the place of a module whose output no longer depends on its input.

    Attributes:
        bias: What is given, of as many dimensions as the module's output; of size 1 along images and positions. A
            parameter, for it can be trained as any bias.
        adds: Whether the first input is added: what is left of a whole residual block.
        like: Dimensions along which the output is as long as the first input. Along others it is broadcast by whoever
            reads it.
        num_returned: Length of the tuple that the module returned, None but for the first; 0 for a tensor.
    """

    def __init__(self, shape: Sequence[int], *, adds: bool, like: Sequence[int], num_returned: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(tuple(shape)))
        self.adds, self.like, self.num_returned = adds, tuple(like), num_returned

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the constant for inputs as the module took them."""
        x = first_tensor(args, kwargs)
        if x is None:
            raise TypeError("a module that became a constant must be given the tensor that it was given before")
        if self.adds:
            out = x + self.bias
        else:
            shape = [x.shape[d] if d in self.like else n for d, n in enumerate(self.bias.shape)]
            out = self.bias.expand(shape).clone()  # whoever gets it may write into it
        return (out, *[None] * (self.num_returned - 1)) if self.num_returned else out

    def extra_repr(self) -> str:
        """Describe the module in a printed model."""
        return f"{tuple(self.bias.shape)}, adds={self.adds}"

    def to_json(self) -> dict[str, Any]:
        """Return what builds the module again, without its numbers."""
        return {"shape": list(self.bias.shape), "adds": self.adds, "like": list(self.like),
                "num_returned": self.num_returned}  # fmt: skip


def first_tensor(args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """Return the tensor that a module works on, its first floating-point argument, if there is one."""
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point()]
    return given[0] if given else None
