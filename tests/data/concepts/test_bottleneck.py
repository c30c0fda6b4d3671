"""Concepts are looked for where the classifier reads: on networks of every kind, without knowing them."""

import numpy as np
import pytest
import timm
import torch
import transformers
from planted_concepts import PREPROCESSING, planted_rows, small_net
from tiny_models import KINDS, build_dense
from torch import nn

from hf_prune.data.concepts.pictures import as_input
from hf_prune.data.concepts.teacher import Teacher
from hf_prune.errors import UnsupportedModelError
from hf_prune.tokens.site import logits_of

PICTURES = planted_rows(2)[0]
# How many tokens the classifier reads of those that leave the last norm.
TOKENS_READ = {
    "vit": 1,
    "deit": 1,
    "deit-distilled": 2,
    "dinov2": 65,
    "dinov2-registers": 65,
    "siglip": 64,
    "timm-vit": 1,
    "timm-deit-distilled": 2,
    "timm-deit3": 1,
    "timm-dinov2-reg4": 1,
    "timm-siglip-map": 64,
    "timm-siglip-gap": 64,
    "timm-eva02": 64,
    "timm-rope-mixed": 1,
}


def cnn(kind):
    torch.manual_seed(0)
    size = {"num_labels": 5, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    swin = {"img_size": 32, "patch_size": 2, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}
    builders = {
        "own": small_net,
        "timm-resnet": lambda: timm.create_model("resnet10t", num_classes=5),
        "timm-swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **swin),
        "resnet": lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig(**size)),
        "swin": lambda: transformers.SwinForImageClassification(
            transformers.SwinConfig(
                image_size=32, patch_size=2, embed_dim=12, depths=[2, 2], num_heads=[2, 2], window_size=4, num_labels=5
            )
        ),
    }
    return builders[kind]().eval()


LAYERS = {
    "own": "0",
    "timm-resnet": "layer3",  # of 32 pixels one place is left in the fourth
    "timm-swin": "norm",
    "resnet": "resnet.encoder.stages.1",
    "swin": "swin.layernorm",
}


def check_by_differences(model, layer, label):
    """A gradient is how the logit grows when the whole layer takes a small step; in double precision."""
    teacher = Teacher(model.double(), PREPROCESSING, layer=layer)
    images = as_input(PICTURES, PREPROCESSING).double()
    features, gradients = teacher.features(PICTURES), teacher.gradients(PICTURES, label)
    assert features.shape == gradients.shape
    assert np.ptp(features, axis=0).any()
    step = torch.randn(features.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = []
    for size in (1e-6, -1e-6):

        def moved(_module, _inputs, output, change=size * step):
            is_map = output.ndim == 4 and not teacher._bottleneck.channels_last
            return output + (change.view(-1, 1, 1) if is_map else change)

        handle = model.get_submodule(teacher.layer).register_forward_hook(moved)
        with torch.no_grad():
            logits.append(logits_of(model(images))[:, label])
        handle.remove()
    slopes = ((logits[0] - logits[1]) / 2e-6).numpy()
    assert np.abs(slopes).max() > 1e-3
    np.testing.assert_allclose(gradients @ step.numpy(), slopes, atol=1e-5 * np.abs(slopes).max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_that_a_classifier_reads(kind):
    model = build_dense(kind)
    teacher = Teacher(model, PREPROCESSING)
    assert "norm" in teacher.layer or teacher.layer == "attn_pool.kv"
    assert int(teacher._bottleneck.read.sum()) == TOKENS_READ[kind]
    check_by_differences(model, None, 2)


@pytest.mark.parametrize("kind", LAYERS)
def test_maps_and_sequences_before_pooling(kind):
    model = cnn(kind)
    teacher = Teacher(model, PREPROCESSING)
    assert teacher.layer == LAYERS[kind]
    assert teacher._bottleneck.channels_last == (kind == "timm-swin")
    check_by_differences(model, None, 1)


def test_features_are_means_over_places():
    model = small_net()
    features = Teacher(model, PREPROCESSING, batch_size=3).features(PICTURES)
    with torch.no_grad():
        expected = model[0](as_input(PICTURES, PREPROCESSING)).mean((2, 3))
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_another_layer_can_be_named():
    model = small_net()
    assert Teacher(model, PREPROCESSING, layer="0.2").features(PICTURES).shape == (8, 16)
    assert Teacher(model, PREPROCESSING, layer="1.2").features(PICTURES).shape == (8, 32)
    check_by_differences(model, "0.2", 0)


class TwoTowers(nn.Module):
    """Two maps side by side: what leaves either is not all that counts."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(3, 4, 3, 2)
        self.head = nn.Linear(8, 3)
        self.unused = nn.Conv2d(3, 4, 3)
        self.twice = nn.ReLU()

    def forward(self, x):
        self.unused(x)
        both = [self.twice(self.left(x)), self.twice(self.right(x))]
        return self.head(torch.cat([part.mean((2, 3)) for part in both], 1))


def test_no_layer_that_something_goes_past():
    model = TwoTowers().eval()
    with pytest.raises(UnsupportedModelError, match=r"no layer of TwoTowers holds all.*pass `layer`"):
        Teacher(model, PREPROCESSING)
    assert Teacher(model, PREPROCESSING, layer="left").features(PICTURES).shape == (8, 4)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        ("nowhere", "the model has no layer 'nowhere'"),
        ("", "the model has no layer ''"),
        ("unused", "must depend on layer 'unused', but do not"),
        ("twice", "must run once for each batch, but ran 2 times"),
    ],
)
def test_layers_that_cannot_serve_are_refused(layer, why):
    with pytest.raises(UnsupportedModelError, match=why):
        Teacher(TwoTowers().eval(), PREPROCESSING, layer=layer)


def test_the_model_is_left_as_it_was():
    model = small_net().train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    teacher = Teacher(model, PREPROCESSING)
    teacher.gradients(PICTURES, 0)
    teacher.features(PICTURES)
    assert [model.training, model[0].training, model[1].training] == [True, True, False]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_digests_tell_weights_apart():
    first, second = small_net(), small_net()
    digests = [Teacher(net, PREPROCESSING).digest() for net in (first, second)]
    assert digests[0] == digests[1]
    with torch.no_grad():
        second[1][2].bias[0] += 1e-3
    assert Teacher(second, PREPROCESSING).digest() != digests[0]
