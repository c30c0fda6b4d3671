"""Images of every kind reach the model as its own processor would deliver them, in training too."""

import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from transformers import (
    BitImageProcessor,
    DeiTImageProcessor,
    EfficientNetImageProcessor,
    MobileViTImageProcessor,
    Siglip2ImageProcessor,
    SiglipImageProcessor,
    ViTImageProcessor,
)

from hf_prune.data.decode import to_rgb
from hf_prune.data.examples import own_randomness
from hf_prune.data.transforms import Augmentation, Preprocessing, eval_transform, train_transform
from hf_prune.errors import DataError

CROPPING = Augmentation.gentle()
SMALL = {"height": 16, "width": 16}
DINOV2 = {
    "size": {"shortest_edge": 36},
    "crop_size": {"height": 28, "width": 28},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
PROCESSORS = {
    "vit": (ViTImageProcessor(), (224, 224), "bilinear"),
    "vit_wide": (ViTImageProcessor(size={"height": 16, "width": 32}, resample=0), (16, 32), "nearest"),
    "deit": (DeiTImageProcessor(), (224, 224), "bicubic"),
    "dinov2": (BitImageProcessor(**DINOV2), (28, 28), "bicubic"),
    "siglip": (SiglipImageProcessor(size=SMALL, resample=1), (16, 16), "lanczos"),
}


@pytest.fixture(autouse=True)
def _same_draws_every_time():
    with own_randomness(0):
        yield


@pytest.mark.parametrize("name", PROCESSORS)
def test_processor_is_described(name):
    processor, size_px, interpolation = PROCESSORS[name]
    preprocessing = Preprocessing.from_processor(processor)
    assert preprocessing.size_px == size_px
    assert preprocessing.mean == pytest.approx(processor.image_mean, abs=1e-5)
    assert preprocessing.std == pytest.approx(processor.image_std, abs=1e-5)
    assert preprocessing.interpolation == interpolation


@pytest.mark.parametrize("name", PROCESSORS)
def test_both_transforms_give_the_size_of_the_model(name, make_picture):
    processor, size_px, _ = PROCESSORS[name]
    preprocessing = Preprocessing.from_processor(processor)
    for transform in (eval_transform(preprocessing), train_transform(preprocessing)):
        for image_size_px in ((60, 45), (8, 8), (20, 90)):
            for _ in range(5):
                pixels = transform(make_picture(0, image_size_px))
                assert pixels.shape == (3, *size_px)
                assert pixels.dtype == torch.float32


def test_evaluation_is_the_processor_itself(make_picture):
    processor = PROCESSORS["dinov2"][0]
    picture = make_picture(0, (60, 45))
    expected = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(eval_transform(Preprocessing.from_processor(processor))(picture), expected)


def test_evaluation_is_timms_own(make_picture):
    model = timm.create_model("test_vit")
    picture = make_picture(0, (300, 200))
    expected = create_transform(**resolve_model_data_config(model), is_training=False)(picture)
    actual = eval_transform(Preprocessing.from_timm(model))(picture)
    assert actual.shape == (3, 160, 160)
    assert torch.equal(actual, expected)


def test_timm_model_built_for_another_size_gets_that_size(make_picture):
    model = timm.create_model("test_vit", img_size=96)
    preprocessing = Preprocessing.from_timm(model)
    assert preprocessing.size_px == (96, 96)
    for transform in (eval_transform(preprocessing), train_transform(preprocessing)):
        assert model(transform(make_picture(0))[None]).shape == (1, 1000)


@pytest.mark.parametrize("do_rescale", [True, False])
@pytest.mark.parametrize("do_normalize", [True, False])
def test_training_scales_pixels_as_evaluation_does(do_rescale, do_normalize):
    processor = ViTImageProcessor(
        size=SMALL, do_rescale=do_rescale, do_normalize=do_normalize, image_mean=[0.2, 0.4, 0.6]
    )
    preprocessing = Preprocessing.from_processor(processor)
    one_colour = Image.new("RGB", (30, 30), (10, 100, 200))
    expected = eval_transform(preprocessing)(one_colour)
    actual = train_transform(preprocessing, CROPPING)(one_colour)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert expected.dtype == torch.float32
    if not do_rescale and not do_normalize:
        assert expected[:, 0, 0].tolist() == [10, 100, 200]


def test_processors_with_an_order_of_their_own_are_followed():
    processor = EfficientNetImageProcessor(size=SMALL, rescale_offset=True, rescale_factor=1 / 127.5)
    preprocessing = Preprocessing.from_processor(processor)
    one_colour = Image.new("RGB", (30, 30), (10, 100, 200))
    expected = eval_transform(preprocessing)(one_colour)
    actual = train_transform(preprocessing, CROPPING)(one_colour)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("processor", "reason"),
    [
        (BitImageProcessor(do_center_crop=False), "3 x height x width of one size"),
        (Siglip2ImageProcessor(), "3 x height x width of one size"),
        (MobileViTImageProcessor(), "channel by itself"),
    ],
)
def test_processors_that_training_cannot_follow_are_refused(processor, reason):
    with pytest.raises(DataError, match=f"{reason}.*from {type(processor).__name__}"):
        Preprocessing.from_processor(processor)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_images_of_every_mode_are_seen_in_colour(mode, make_picture):
    if mode == "I;16":
        image = Image.fromarray(np.asarray(make_picture(0).convert("L")).astype(np.uint16) * 257)
    else:
        image = make_picture(0).convert(mode)
    assert image.mode == mode
    for preprocessing in (
        Preprocessing.from_processor(ViTImageProcessor(size=SMALL)),
        Preprocessing.from_timm(timm.create_model("test_vit")),
    ):
        for transform in (eval_transform(preprocessing), train_transform(preprocessing)):
            assert transform(image).shape[0] == 3
        seen, in_rgb = eval_transform(preprocessing)(image), eval_transform(preprocessing)(to_rgb(image))
        assert torch.equal(seen, in_rgb)
        assert seen.std() > 0.05


def test_sixteen_bit_grey_keeps_its_shades(make_picture):
    grey = make_picture(0).convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(to_rgb(deep)), np.asarray(grey.convert("RGB")))


def half_black(size_px=40):
    pixels = np.zeros((size_px, size_px, 3), dtype=np.uint8)
    pixels[:, size_px // 2 :] = 255
    return Image.fromarray(pixels)


def share_flipped(transform, num_draws=60):
    flips = [bool(pixels[:, :, 0].mean() > pixels[:, :, -1].mean()) for pixels in draws(transform, num_draws)]
    return sum(flips) / num_draws


def draws(transform, num_draws):
    return [transform(half_black()) for _ in range(num_draws)]


def test_gentle_augmentation_varies_but_never_flips(plain):
    assert (Augmentation.gentle().hflip_prob, Augmentation.gentle().auto_augment) == (0.0, None)
    transform = train_transform(plain, CROPPING)
    assert share_flipped(transform) == 0
    first, *others = draws(transform, 5)
    assert any(not torch.equal(first, other) for other in others)


def test_flips_and_erasing_are_switched_by_their_settings(plain):
    flipping = Augmentation(auto_augment=None, random_erasing_prob=0, hflip_prob=0.5, crop_scale_min=0.9)
    assert 0.2 < share_flipped(train_transform(plain, flipping)) < 0.8
    erasing = Augmentation(auto_augment=None, random_erasing_prob=1, hflip_prob=0, crop_scale_min=0.9)
    # Erased rectangles hold noise beyond the range of real pixels.
    assert all(pixels.min() < 0 for pixels in draws(train_transform(plain, erasing), 10))
    unerased = Augmentation(auto_augment=None, random_erasing_prob=0, crop_scale_min=0.9)
    assert all(pixels.min() >= 0 for pixels in draws(train_transform(plain, unerased), 10))


def test_default_augmentation_is_strong(plain):
    tensors = draws(train_transform(plain), 20)
    assert len({tensor.numpy().tobytes() for tensor in tensors}) == 20
    assert share_flipped(train_transform(plain)) > 0


@pytest.mark.parametrize("policy", ["rand-m10-p1-inc1", "rand-m0-p1", "v0", "originalr", "augmix-m10"])
def test_policies_run_at_their_extremes(plain, policy):
    transform = train_transform(plain, Augmentation(auto_augment=policy))
    assert all(pixels.shape == (3, 16, 16) for pixels in draws(transform, 150))


def test_no_augmentation_is_the_evaluation_transform(plain, make_picture):
    picture = make_picture(0)
    for preprocessing in (plain, Preprocessing.from_processor(ViTImageProcessor(size=SMALL))):
        actual = train_transform(preprocessing, Augmentation.none())(picture)
        assert torch.equal(actual, eval_transform(preprocessing)(picture))


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_transforms_can_be_sent_to_workers(name, make_picture):
    preprocessing = Preprocessing.from_processor(PROCESSORS[name][0])
    transform = eval_transform(preprocessing)
    restored = pickle.loads(pickle.dumps(transform))
    assert torch.equal(restored(make_picture(0)), transform(make_picture(0)))
    pickle.loads(pickle.dumps(train_transform(preprocessing)))(make_picture(0))
