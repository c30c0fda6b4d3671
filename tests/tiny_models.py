"""Small models of every supported kind, with weights that make their outputs depend on every part."""

import timm
import torch
import transformers
from torch import nn

from hf_prune.measure.token_cost import TokenCost
from hf_prune.tokens.attach import TokenPruning, add_token_pruning
from hf_prune.tokens.calibrate import split_point
from hf_prune.tokens.config import TokenPruningConfig

IMAGE_SIZE, NUM_CLASSES, DEPTH, NUM_PATCHES = 32, 7, 6, 64
_VISION = {
    "hidden_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": IMAGE_SIZE,
    "patch_size": 4,
}
_TIMM = {
    "img_size": IMAGE_SIZE,
    "patch_size": 4,
    "embed_dim": 48,
    "depth": DEPTH,
    "num_heads": 4,
    "num_classes": NUM_CLASSES,
}
_T = transformers
_TRANSFORMERS = {
    "vit": lambda: _T.ViTForImageClassification(_T.ViTConfig(**_VISION, num_labels=NUM_CLASSES)),
    "deit": lambda: _T.DeiTForImageClassification(_T.DeiTConfig(**_VISION, num_labels=NUM_CLASSES)),
    "deit-distilled": lambda: _T.DeiTForImageClassificationWithTeacher(
        _T.DeiTConfig(**_VISION, num_labels=NUM_CLASSES)
    ),
    "dinov2": lambda: _T.Dinov2ForImageClassification(_T.Dinov2Config(**_VISION, mlp_ratio=2, num_labels=NUM_CLASSES)),
    "dinov2-registers": lambda: _T.Dinov2WithRegistersForImageClassification(
        _T.Dinov2WithRegistersConfig(**_VISION, mlp_ratio=2, num_labels=NUM_CLASSES)
    ),
    "siglip": lambda: _T.SiglipForImageClassification(
        _T.SiglipConfig(
            vision_config=_VISION,
            text_config={"bos_token_id": 0, "eos_token_id": 1, "num_hidden_layers": 1},
            num_labels=NUM_CLASSES,
        )
    ),
}
_TIMM_NAMES = {
    "timm-vit": "vit_tiny_patch16_224",
    "timm-deit-distilled": "deit_tiny_distilled_patch16_224",
    "timm-deit3": "deit3_small_patch16_224",
    "timm-dinov2-reg4": "vit_small_patch14_reg4_dinov2",
    "timm-siglip-map": "vit_base_patch16_siglip_224",
    "timm-siglip-gap": "vit_base_patch16_siglip_gap_224",
    "timm-eva02": "eva02_tiny_patch14_224",
    "timm-rope-mixed": "vit_small_patch16_rope_mixed_224",
}
PREFIX_TOKENS = {
    "vit": 1,
    "deit": 2,
    "deit-distilled": 2,
    "dinov2": 1,
    "dinov2-registers": 5,
    "siglip": 0,
    "timm-vit": 1,
    "timm-deit-distilled": 2,
    "timm-deit3": 1,
    "timm-dinov2-reg4": 5,
    "timm-siglip-map": 0,
    "timm-siglip-gap": 0,
    "timm-eva02": 1,
    "timm-rope-mixed": 1,
}
KINDS = list(PREFIX_TOKENS)
# A model whose blocks cost one unit a token and whose selectors cost a tenth of that.
COST = TokenCost(torch.arange(70.0), 0.1 * torch.arange(70.0), rest=5.0, depth=12, num_prefix_tokens=1, num_patches=64)


def build_dense(kind: str) -> nn.Module:
    """Build a dense model whose norms, scales, tokens and heads are far from their trivial start."""
    torch.manual_seed(0)
    if kind in _TRANSFORMERS:
        model: nn.Module = _TRANSFORMERS[kind]()
    else:
        model = timm.create_model(_TIMM_NAMES[kind], **_TIMM)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, 0.15)
    return model.eval()


def build_pruned(model: nn.Module, settings: TokenPruningConfig | None = None) -> TokenPruning:
    """Put selectors into a model that decide by the image and drop a good part of it."""
    settings = settings or TokenPruningConfig(before_blocks=(2, 4), keep_ratios=(0.65, 0.3), num_heads=4)
    torch.manual_seed(1)
    pruning = add_token_pruning(model, settings)
    with torch.no_grad():
        for parameter in pruning.parameters():
            parameter.normal_(0, 0.5)
    set_thresholds(model, pruning)
    return pruning


@torch.no_grad()
def set_thresholds(model: nn.Module, pruning: TokenPruning) -> None:
    """Let every selector keep its share of random images."""
    pixels, keep = pixel_batch(16, seed=9), 1.0
    for stage, ratio in enumerate(pruning.settings.keep_ratios):
        model(pixels)
        record = pruning.take_records()[stage]
        margins = record.margin[record.candidates > 0]
        selector = pruning.selectors[str(record.before_block)]
        selector.keep_threshold.fill_(split_point(margins, round(len(margins) * ratio / keep)))
        keep = ratio


def pixel_batch(num_images: int, seed: int = 0) -> torch.Tensor:
    """Images with large structure, so that patches differ from each other and images too."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(num_images, 3, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    return smooth + 0.3 * torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
