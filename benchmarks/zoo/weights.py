"""Weights that let every unit of a model matter.

A freshly made model proves little: norms of one, layer scales of 1e-6, biases, heads and position tables of zero hide a
wrong cut. Every parameter gets values of a size that keeps activations of order one.
"""

from typing import Any

import torch
from torch import Tensor, nn

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Bilinear, nn.MultiheadAttention)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill all parameters and the statistics of norms, the same for the same seed, and return the model."""
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in done and parameter.is_floating_point():
                done.add(id(parameter))
                parameter.copy_(_values(module, name, parameter, generator))
        for name, buffer in module.named_buffers(recurse=False):
            if name == "running_var" or ("running_mean" in module._buffers and name == "weight"):
                buffer.uniform_(0.5, 1.5, generator=generator)
            elif name == "running_mean" or ("running_mean" in module._buffers and name == "bias"):
                buffer.normal_(0, 0.2, generator=generator)
    return model


def _values(module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    values = torch.empty(parameter.shape)
    is_vector = parameter.ndim == 0 or parameter.numel() == max(parameter.shape)
    if name.endswith("bias"):
        return values.normal_(0, 0.1, generator=generator)
    if isinstance(module, nn.Embedding):
        return values.normal_(0, 0.5, generator=generator)
    if parameter.ndim > 1 and (isinstance(module, LAYERS) or name == "weight"):
        return values.normal_(0, _spread(module, parameter), generator=generator)
    if is_vector:
        # Norms, layer scales, gates, single tokens.
        return values.uniform_(0.5, 1.5, generator=generator)
    # Tables of positions, queries, stacked projections.
    return values.normal_(0, 0.2, generator=generator)


def _spread(module: nn.Module, weight: Tensor) -> float:
    """Return the standard deviation that keeps the size of activations through the layer."""
    inputs = weight.numel() // weight.shape[0]
    if isinstance(module, nn.ConvTranspose2d):
        inputs = weight.shape[0]
    return max(inputs, 1) ** -0.5


@torch.no_grad()
def settle(model: nn.Module, inputs: Any, seed: int = 0) -> nn.Module:
    """Give every batch norm statistics near those of one run, so that deep models do not explode, and return the model.

    Near, not equal: an exact mean and variance would make batch norms look like norms without statistics.
    """
    generator = torch.Generator().manual_seed(seed)

    def watch(norm: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0].transpose(0, 1).flatten(1)
        mean, var = x.mean(1), x.var(1, unbiased=False) + 0.1 * x.square().mean() + 1e-3
        noise = torch.rand(2, len(x), generator=generator)
        norm.running_mean.copy_(mean + (noise[0] - 0.5) * var.sqrt())  # pyright: ignore[reportCallIssue]
        norm.running_var.copy_(var * (0.5 + noise[1]))  # pyright: ignore[reportCallIssue]

    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    handles = [norm.register_forward_pre_hook(watch) for norm in norms]
    model(**inputs) if isinstance(inputs, dict) else model(inputs)
    for handle in handles:
        handle.remove()
    return model
