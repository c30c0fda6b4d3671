"""Dense models by name: a Hub id, a local folder, a timm name, or the small ones of the embedded defaults."""

import copy
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import transformers
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from hf_prune.data.transforms import Preprocessing
from hf_prune.errors import DataError, ModelLoadError

TIMM_PREFIXES = ("hf-hub:", "local-dir:", "hf_hub:")


@dataclass(frozen=True, kw_only=True)
class DenseModel:
    """A dense model and what goes with it.

    Attributes:
        model: In evaluation mode, on the CPU.
        preprocessing: What its input must look like.
        processor: Its image processor (transformers only).
        name: What it was loaded by; None if this process made it.
        license: Licence of its weights where the model card says so.
        redraw: Builds the model once more, with weights drawn from torch's random numbers.
    """

    model: nn.Module
    preprocessing: Preprocessing
    processor: Any
    name: str | None
    license: str | None
    redraw: Callable[[], nn.Module]


def embedded_vit(label_names: Sequence[str]) -> DenseModel:
    """Return an untrained ViT small enough to train on a CPU: 32 x 32 pixels, 64 patches, 6 blocks of width 96."""
    config = cast(Any, transformers.ViTConfig)(
        hidden_size=96,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=384,
        image_size=32,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        # The usual 0.02 suits widths like 768; this is about 1 / sqrt(96).
        initializer_range=0.08,
        num_labels=len(label_names),
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
    )

    def draw() -> nn.Module:
        model = transformers.ViTForImageClassification(copy.deepcopy(config))
        # Positions that start nearly orthogonal and pixels that are heard beside them: a few epochs, not dozens.
        nn.init.normal_(model.vit.embeddings.position_embeddings, std=0.7)
        nn.init.normal_(model.vit.embeddings.patch_embeddings.projection.weight, std=0.1)
        return model.eval()

    return _embedded(draw)


def embedded_resnet(label_names: Sequence[str]) -> DenseModel:
    """Return an untrained ResNet small enough to train on a CPU: 32 x 32 pixels, 6 basic blocks of widths 32 to 128."""
    config = cast(Any, transformers.ResNetConfig)(
        embedding_size=32,
        hidden_sizes=[32, 64, 128],
        depths=[2, 2, 2],
        layer_type="basic",
        num_labels=len(label_names),
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
    )
    return _embedded(lambda: transformers.ResNetForImageClassification(copy.deepcopy(config)).eval())


def _embedded(draw: Callable[[], nn.Module]) -> DenseModel:
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    return DenseModel(
        model=draw(),
        preprocessing=Preprocessing.from_processor(processor),
        processor=processor,
        name=None,
        license=None,
        redraw=draw,
    )


def load_dense(name: str, label_names: Sequence[str], *, ignore_mismatched_sizes: bool = False) -> DenseModel:
    """Load a dense classifier and check that its head fits the labels.

    Args:
        name: Hub id (`facebook/deit-small-patch16-224`, `timm/deit3_small_patch16_224.fb_in1k`), local folder, or a
            timm model name.
        label_names: Classes of the dataset, in label order.
        ignore_mismatched_sizes: Replace a head that does not fit by a fresh one, to be trained.

    Raises:
        ModelLoadError: If nothing can be loaded under that name.
        DataError: If the head has another number of classes.
    """
    if timm_name := _timm_name(name):
        return _load_timm(timm_name, name, label_names, ignore_mismatched_sizes)
    return _load_transformers(name, label_names, ignore_mismatched_sizes)


def _timm_name(name: str) -> str | None:
    """Return the name under which timm knows a model, or None if transformers should load it."""
    if name.startswith(TIMM_PREFIXES):
        return name
    if Path(name).is_dir():
        config = Path(name) / "config.json"
        is_timm = config.is_file() and "architecture" in json.loads(config.read_text(encoding="utf-8"))
        return f"local-dir:{name}" if is_timm else None
    if name.startswith("timm/"):
        return f"hf-hub:{name}"
    return name if "/" not in name and timm.is_model(name) else None


def _load_timm(timm_name: str, name: str, label_names: Sequence[str], new_head: bool) -> DenseModel:
    try:
        model = cast(Any, timm.create_model(timm_name, pretrained=True))
        if new_head and model.num_classes != len(label_names):
            model.reset_classifier(len(label_names))
    except Exception as err:
        # timm passes on whatever its download, its registry or its builders raise.
        raise ModelLoadError(f"timm could not load '{name}': {err}") from err
    _require_labels(name, model.num_classes, label_names)
    cfg = getattr(model, "pretrained_cfg", {}) or {}
    return DenseModel(
        model=model.eval(),
        preprocessing=Preprocessing.from_timm(model),
        processor=None,
        name=name,
        license=cfg.get("license"),
        redraw=lambda: _redrawn_timm(timm_name, len(label_names)),
    )


def _redrawn_timm(timm_name: str, num_classes: int) -> nn.Module:
    model = cast(Any, timm.create_model(timm_name, pretrained=False, num_classes=num_classes))
    init = getattr(model, "init_weights", None)
    if init is not None and "zero_init_last" in inspect.signature(init).parameters:
        # Branches that begin with zero get no gradients, so that nothing could be said about their units.
        init(zero_init_last=False)
    return model.eval()


def _load_transformers(name: str, label_names: Sequence[str], new_head: bool) -> DenseModel:
    try:
        config = AutoConfig.from_pretrained(name)
        if not new_head:
            _require_labels(name, cast(int, config.num_labels), label_names)
        labels = {
            "num_labels": len(label_names),
            "id2label": dict(enumerate(label_names)),
            "label2id": {label: index for index, label in enumerate(label_names)},
        }
        overrides = {**labels, "ignore_mismatched_sizes": True} if new_head else {}
        model = AutoModelForImageClassification.from_pretrained(name, **overrides)
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as err:
        if isinstance(err, DataError):
            raise
        raise ModelLoadError(
            f"no image classifier could be loaded from '{name}': {str(err).splitlines()[0]} Give a Hub id, a local "
            f"folder with config.json and weights, or the name of a timm model"
        ) from err
    return DenseModel(
        model=model.eval(),
        preprocessing=Preprocessing.from_processor(processor),
        processor=processor,
        name=name,
        license=card_license(name),
        redraw=lambda: _redrawn_transformers(model),
    )


def _redrawn_transformers(model: nn.Module) -> nn.Module:
    config = copy.deepcopy(cast(Any, model).config)
    config._name_or_path = ""  # its weights will be nobody else's
    return type(model)(config).eval()


def _require_labels(name: str, num_labels: int, label_names: Sequence[str]) -> None:
    if num_labels != len(label_names):
        raise DataError(
            f"the head of '{name}' has {num_labels} classes and the dataset has {len(label_names)} "
            f"({', '.join(label_names[:5])}, ...); choose a model trained on this dataset, or give it a fresh head "
            f"with `--ignore_mismatched_sizes --dense_epochs 5`"
        )


def card_license(name: str) -> str | None:
    """Return the licence that the model card beside the weights names, if there is one."""
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import HfHubHTTPError

    readme = Path(name) / "README.md"
    if Path(name).is_dir() and not readme.is_file():
        return None
    try:
        card = ModelCard.load(readme if readme.is_file() else name)
    except (OSError, ValueError, HfHubHTTPError):
        return None
    license_name = card.data.to_dict().get("license")
    return license_name if isinstance(license_name, str) else None
