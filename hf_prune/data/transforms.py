"""The way from an image to a model's input: exact for evaluation, augmented for training."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import posterize
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torchvision.transforms import Compose
from transformers import BaseImageProcessor

from hf_prune.data.decode import to_rgb
from hf_prune.errors import DataError

Transform = Callable[[Image.Image], torch.Tensor]

# Two shapes, so that an output size which follows the image is noticed.
PROBE_SIZES_PX = ((64, 64), (96, 48))
PROBE_COLOUR = (51, 102, 204)
MAX_PIXEL = 255

# Pillow rotates and shears with these only, Lanczos for one is for resizing.
AUGMENTING_FILTERS = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a model expects its input to look like.

    Attributes:
        size_px: Height and width.
        mean: Per RGB channel, subtracted from pixels in 0..1.
        std: Per RGB channel, divides after `mean` is subtracted.
        interpolation: Pillow's name of the filter, such as "bicubic".
        crop_pct: Share of the resized image that the evaluation crop keeps; unused with a processor.
        crop_mode: How timm crops for evaluation; unused with a processor.
        processor: The HuggingFace image processor that does the evaluation transform, if any.
    """

    size_px: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    processor: BaseImageProcessor | None = field(default=None, repr=False)

    @classmethod
    def from_processor(cls, processor: BaseImageProcessor) -> "Preprocessing":
        """Describe what an image processor does, by showing it plain images and looking at the result.

        Asking for its settings would not do: which ones exist, and in which order they apply, differs
        between processors, and a switched-off step must be off in training too.

        Raises:
            DataError: If the output is not 3 x height x width of one fixed size, or the channels are
                not each scaled and shifted by themselves (as when red and blue are swapped).
        """
        name = type(processor).__name__
        shapes = [tuple(_run_processor(processor, Image.new("RGB", size)).shape) for size in PROBE_SIZES_PX]
        if len(set(shapes)) != 1 or len(shapes[0]) != 3 or shapes[0][0] != 3:
            raise DataError(
                f"the image processor must give 3 x height x width of one size for every image, got "
                f"{shapes} from {name} for images of {PROBE_SIZES_PX}; set a fixed `size` or a centre crop"
            )
        black, white, coloured = (_centre(processor, c) for c in ((0,) * 3, (MAX_PIXEL,) * 3, PROBE_COLOUR))
        scale = white - black
        expected = black + scale * np.array(PROBE_COLOUR) / MAX_PIXEL
        if (scale <= 0).any() or not np.allclose(coloured, expected, atol=1e-3 * np.abs(scale).max()):
            raise DataError(
                f"the image processor must scale and shift each channel by itself, got {coloured.tolist()} "
                f"from {name} where {expected.tolist()} was expected; switch channel reordering off"
            )
        return cls(
            size_px=shapes[0][1:],
            mean=tuple((-black / scale).tolist()),
            std=tuple((1 / scale).tolist()),
            interpolation=_filter_name(getattr(processor, "resample", None)),
            processor=processor,
        )

    @classmethod
    def from_timm(cls, model: torch.nn.Module) -> "Preprocessing":
        """Read what a timm model expects from its data configuration and from the size it was built for."""
        config = resolve_model_data_config(model)
        # Models built with `img_size=` keep the pretrained size in their data configuration.
        built_px = getattr(getattr(model, "patch_embed", None), "img_size", None)
        return cls(
            size_px=tuple(built_px or config["input_size"][-2:]),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
        )


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training images are varied; the defaults follow DeiT.

    Attributes:
        auto_augment: Policy in timm's notation, or None.
        random_erasing_prob: Chance that a rectangle is replaced by noise.
        hflip_prob: Chance of a left-right flip.
        crop_scale_min: Smallest share of the image's area that a random crop may keep.
        color_jitter: Strength of brightness, contrast and saturation changes; timm leaves it out
            beside a policy.

    Source: Touvron et al., "Training data-efficient image transformers", arXiv:2012.12877, table 9.
    Mixup, CutMix and repeated augmentation work on whole batches and are not part of it.
    """

    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    random_erasing_prob: float = 0.25
    hflip_prob: float = 0.5
    crop_scale_min: float = 0.08
    color_jitter: float = 0.0

    @classmethod
    def none(cls) -> "Augmentation":
        """Leave images as evaluation sees them."""
        return cls(auto_augment=None, random_erasing_prob=0.0, hflip_prob=0.0, crop_scale_min=1.0)

    @classmethod
    def gentle(cls) -> "Augmentation":
        """Crop a little and nothing else: for small images, and for digits and signs, whose sides matter."""
        return cls(auto_augment=None, random_erasing_prob=0.0, hflip_prob=0.0, crop_scale_min=0.8)


# What a command line may name.
AUGMENTATIONS = {"deit": Augmentation(), "gentle": Augmentation.gentle(), "none": Augmentation.none()}


def eval_transform(preprocessing: Preprocessing) -> Transform:
    """Make the transform that a published model is evaluated with: PIL image of any mode -> (3, H, W)."""
    if preprocessing.processor is not None:
        return Compose([to_rgb, partial(_run_processor, preprocessing.processor)])
    prepare = create_transform(
        input_size=preprocessing.size_px,
        is_training=False,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
    )
    return Compose([to_rgb, prepare])


def train_transform(preprocessing: Preprocessing, augmentation: Augmentation | None = None) -> Transform:
    """Make the transform for training: random crop and augmentation, then the model's size and scaling.

    It draws from the global random streams of Python, NumPy and torch.

    Args:
        preprocessing: What the model expects.
        augmentation: DeiT's if None.
    """
    augmentation = augmentation or Augmentation()
    if augmentation == Augmentation.none():
        return eval_transform(preprocessing)
    interpolation = preprocessing.interpolation
    augment = create_transform(
        input_size=preprocessing.size_px,
        is_training=True,
        scale=(augmentation.crop_scale_min, 1.0),
        hflip=augmentation.hflip_prob,
        color_jitter=augmentation.color_jitter,
        auto_augment=augmentation.auto_augment,
        re_prob=augmentation.random_erasing_prob,
        re_mode="pixel",
        interpolation=interpolation if interpolation in AUGMENTING_FILTERS else "bicubic",
        mean=preprocessing.mean,
        std=preprocessing.std,
    )
    _keep_a_bit(augment)
    return Compose([to_rgb, augment])


def _keep_a_bit(augment: Any) -> None:
    # At full strength timm asks to keep 0 bits of each colour. That used to give a black image;
    # Pillow 13 refuses it, and training would stop at a random step.
    for step in augment.transforms:
        for operation in chain(getattr(step, "ops", ()), *getattr(step, "policy", ())):
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **settings: Any) -> Image.Image:
    return posterize(image, max(bits_to_keep, 1), **settings)


def _run_processor(processor: BaseImageProcessor, image: Image.Image) -> torch.Tensor:
    # Without rescaling and normalising the pixels come back as bytes.
    return processor(images=image, return_tensors="pt")["pixel_values"][0].float()


def _centre(processor: BaseImageProcessor, colour: tuple[int, ...]) -> np.ndarray:
    # The centre pixel: borders may be padding.
    pixels = _run_processor(processor, Image.new("RGB", PROBE_SIZES_PX[0], colour))
    return pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2].double().numpy()


def _filter_name(resample: Any) -> str:
    value = getattr(resample, "value", resample)
    if value is None:
        return "bilinear"
    return value if isinstance(value, str) else Image.Resampling(value).name.lower()
