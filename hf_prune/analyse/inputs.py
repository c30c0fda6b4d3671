"""Example inputs from a model's own configuration."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hf_prune.errors import TraceError


def batch_of(inputs: Any, batch_size: int) -> Any:
    """Return a batch that repeats the first of some example inputs, in the memory layout it has."""
    return tree_map_only(Tensor, lambda t: torch.cat([t[:1]] * batch_size), inputs)


def inputs_for(model: nn.Module) -> Any:
    """Return one blank image of the size the model was made for.

    Raises:
        TraceError: If the model does not say.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    config = getattr(model, "config", None)
    if config is not None and hasattr(model, "main_input_name"):
        vision = getattr(config, "vision_config", None) or getattr(config, "backbone_config", None) or config
        size = getattr(vision, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(vision, "num_channels", 3)
        return {"pixel_values": torch.zeros(1, channels, height, width, dtype=dtype)}
    timm_config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(timm_config, dict) and "input_size" in timm_config:
        channels, *size = timm_config["input_size"]
        size = getattr(getattr(model, "patch_embed", None), "img_size", None) or size
        return torch.zeros(1, channels, *size, dtype=dtype)
    raise TraceError(
        f"`example_inputs` must be given for {type(model).__name__}, which does not say how large its images are; "
        f"for example torch.zeros(1, 3, 224, 224)"
    )


def require_plain_tensors(model: nn.Module) -> None:
    """Check that there are weights that can be sliced.

    Raises:
        TraceError: If a parameter has no data, is not there yet, or is quantised.
    """
    if not any(True for _ in model.parameters()):
        raise TraceError(f"{type(model).__name__} has no parameters: there is nothing to prune")
    for name, parameter in model.named_parameters():
        problem = _problem(parameter)
        if problem:
            raise TraceError(f"parameters must be plain tensors with data, but '{name}' {problem}")


def _problem(parameter: Tensor) -> str | None:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return "has no shape yet; run the model once first"
    if parameter.is_meta:
        return "is on the meta device; load the weights first"
    if parameter.is_quantized or type(parameter) not in (nn.Parameter, Tensor) or not parameter.is_floating_point():
        return f"is of type {type(parameter).__name__}, {parameter.dtype}; prune first and quantise afterwards"
    return None
