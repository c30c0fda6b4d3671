"""The zoo of benchmarks/coverage.py: every model by name, with weights in which every unit matters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from zoo.hf_models import hf_zoo
from zoo.other_models import own_zoo, torchvision_zoo
from zoo.timm_models import timm_zoo
from zoo.weights import randomise, settle

Builder = Callable[[], tuple[nn.Module, Any]]


def zoo() -> dict[str, Builder]:
    """Return what builds each model and its example inputs, by name: `timm/vit_tiny_patch16_224`, `hf/swin`, ..."""
    return timm_zoo() | hf_zoo() | torchvision_zoo() | own_zoo()


def build(name: str) -> tuple[nn.Module, Any]:
    """Return the model, in evaluation mode and with weights of seed 0, and its example inputs.

    Raises:
        KeyError: If there is no such model.
    """
    torch.manual_seed(0)
    model, inputs = zoo()[name]()
    return settle(randomise(model).eval(), inputs), inputs
