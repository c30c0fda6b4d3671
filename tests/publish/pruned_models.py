"""Small pruned models of every library, cut differently in every layer."""

from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn

import hf_prune
from hf_prune.analyse.graph import KINDS

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
VIT = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40, "image_size": 32,
       "patch_size": 8, "num_labels": 5}  # fmt: skip
TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 3},
    "beit_base_patch16_224": {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3},
    "resnet18": {},
    "convnext_atto": {},
    "mobilenetv3_small_050": {},
}


def matter(model: nn.Module) -> nn.Module:
    """Give weights values in which every unit counts."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise + (1.0 if name.endswith("weight") else 0.0))
    return model.eval()


def hf_vit() -> Any:
    return matter(transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)))


def timm_model(name: str) -> Any:
    return matter(timm.create_model(name, num_classes=5, **TIMM[name]))


def cut(model: nn.Module, *, removing: tuple[str, ...] = ()) -> Any:
    """Take a different share of every axis of every kind, and whole modules."""
    graph = hf_prune.analyze(model, IMAGES[:1])
    kept: dict[str, Any] = {}
    for number, (name, axis) in enumerate(graph.axes.items()):
        if axis.kind in KINDS and axis.size > 1:
            kept[name] = range(number % 2, axis.size, 2) if number % 3 else range(axis.size // 2, axis.size)
    plan = hf_prune.Plan.of(graph, kept)
    if removing:
        whole = hf_prune.Plan.removing(graph, *removing)
        rest = {name: units for name, units in plan.kept.items() if name not in whole.kept}
        plan = hf_prune.Plan({**rest, **whole.kept}, {**plan.sizes, **whole.sizes})
    hf_prune.apply_plan(model, plan, graph)
    return model


@torch.no_grad()
def answer(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    """Return what a model answers, whatever it wraps it in, with its weights in memory of their own.

    Loaded weights lie where their file has them, and on some processors a convolution rounds by that address.
    """
    weights = {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    out = torch.func.functional_call(model.eval(), weights, (images,))
    return out if isinstance(out, Tensor) else out[0]
