"""Labelled images to prune a network by: its concepts, stitched concepts, and what they must be compared with."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_prune.data.concepts.cache import ConceptCache
from hf_prune.data.concepts.inputs import PLAIN, PlainInputs, ShownPictures
from hf_prune.data.concepts.pictures import Pictures
from hf_prune.data.concepts.records import ClassConcepts, in_turns
from hf_prune.data.concepts.segments import Picture, patch_of, rectangle
from hf_prune.data.concepts.stitch import StitchSettings, stitch
from hf_prune.data.images import ImageSplits
from hf_prune.data.transforms import MAX_PIXEL, Preprocessing, Transform
from hf_prune.errors import DataError, HfPruneWarning, did_you_mean

PicturesOf = dict[int, list[Picture]]

OF_CONCEPTS = ("concept", "concept_low", "segments", "rect_matched", "stitch")
OF_IMAGES = ("random", "label_noise", "pixel_noise", "brightness")
# What a seed is for.
IMAGES, LAYOUT, LABELS, ORDER = range(4)


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """How many images a pruning set holds, and of what; the defaults are those for SNIP.

    Attributes:
        images_per_class: In all.
        num_concepts: Concepts of each class that these come from, evenly.
        significant_only: Only concepts that differ from a random one. The paper's ImageNet run does without.
        min_cav_accuracy: Only concepts that are told from random images at least so well.
        min_concept_area: Share of the input that must belong to the concept after augmentation.
        brightness: Factor for the pixels of the source "brightness".
        stitch: How the source "stitch" is laid out.
        seed: Decides every random choice.

    Raises:
        DataError: If a number is out of range.
    """

    images_per_class: int = 10
    num_concepts: int = 5
    significant_only: bool = False
    min_cav_accuracy: float = 0.0
    min_concept_area: float = 0.005
    brightness: float = 1.0
    stitch: StitchSettings = field(default_factory=StitchSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.images_per_class, self.num_concepts) < 1 or self.seed < 0:
            raise DataError(f"`images_per_class` and `num_concepts` must be at least 1, `seed` 0, got {self}")
        if self.brightness < 0 or not (0 <= self.min_concept_area <= 1 and 0 <= self.min_cav_accuracy <= 1):
            raise DataError(f"`brightness` must not be negative and shares must lie between 0 and 1, got {self}")


FOR_SNIP = SourceSettings()
"""Five concepts a class, two patches each."""

FOR_GRASP = SourceSettings(images_per_class=30)
"""Five concepts a class, six patches each."""


@dataclass(frozen=True, eq=False)
class PruningSet(torch.utils.data.Dataset):
    """Images and labels: `{"pixel_values": (3, H, W), "labels": int}`, normalised, the same at every look.

    Classes take turns, so that the first batches are as balanced as the set.

    Attributes:
        name: Of its source.
        labels: `(N,)`.
        missing: Class -> how many images fewer than asked for there are of it, where that is not none.
    """

    name: str
    labels: Tensor
    missing: dict[int, int]
    inputs: Callable[[int], Tensor] = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must lie in 0..{len(self) - 1}, got {index}")
        return {"pixel_values": self.inputs(index), "labels": int(self.labels[index])}


def pruning_source(
    name: str,
    *,
    preprocessing: Preprocessing,
    concepts: ConceptCache | None = None,
    splits: ImageSplits | None = None,
    settings: SourceSettings = FOR_SNIP,
    augment: Transform | None = None,
) -> PruningSet:
    """Make a set of labelled images to compute saliencies from.

    Of concepts (`concepts` is needed; labelled by the class that they are concepts of, grey around them):

    - "concept": segments of the concepts with the highest scores, those nearest to the centres first;
    - "concept_low": the same of the lowest scores (the same concepts, where a class has few);
    - "segments": random superpixels, whatever their concept;
    - "rect_matched": for each image of "concept" a rectangle of a random picture of the class with exactly as many
      pixels, at a random place: what is left of an effect here is no concept's, but one of size and grey;
    - "stitch": segments of the concepts with the highest scores on one canvas, see `StitchSettings`.

    Of images (`splits` is needed; the same ones for the same seed):

    - "random": as many of each class;
    - "label_noise": with labels drawn at random;
    - "pixel_noise": with labels drawn at random, and the values of each input in random places;
    - "brightness": with pixels times `settings.brightness`, cut off at white, before `augment`.

    Of neither: "gauss", "ones", "zeros", what the network gets being normal noise, all one or all zero.

    A class with too few concepts for its share gives more segments of those that it has. One without concepts gives
    nothing to the first five; see `PruningSet.missing`.

    Memory: pictures in bytes, 1.5 GB for 10,000 of 224 pixels.

    Args:
        name: One of the above.
        preprocessing: Of the network that is to be pruned. Pictures are resized to its size and never cropped.
        concepts: As `discover_concepts` returns them.
        splits: The training split is used.
        settings: `FOR_SNIP`, `FOR_GRASP` or other numbers.
        augment: Transform for training images, say `train_transform(...)`, with randomness that depends on seed and
            index alone. If it leaves less of a concept than `min_concept_area` it is tried again, in the end without.
            Stitched and made-up images do without, for a crop would undo what they are.

    Raises:
        DataError: If there is no such source, what it is made of is not given, or it would be empty.

    Warns:
        HfPruneWarning: If there are fewer images of some classes than asked for.

    Source: Yang et al., One-cut Network Pruning at Initialization with Explainable Image Concepts, PRMU 2022, and the
    code of its successor `Nonac/DDOPaI` ("concept", "concept_low", "segments", brightness); Su et al.,
    Sanity-Checking Pruning Methods, NeurIPS 2020 (noise). "rect_matched" is ours, "stitch" a reconstruction.
    """
    known = (*OF_CONCEPTS, *OF_IMAGES, *PLAIN)
    if name not in known:
        raise DataError(f"a pruning source must be one of {', '.join(known)}, got '{name}'{did_you_mean(name, known)}")
    num_labels = _num_labels(name, concepts, splits)
    if name in PLAIN:
        labels = torch.arange(num_labels).repeat(settings.images_per_class)
        return PruningSet(name, labels, {}, PlainInputs(name, preprocessing.size_px, settings.seed))
    if name in OF_CONCEPTS and concepts is not None:
        found = _of_concepts(name, concepts, settings, preprocessing)
    else:
        found = _of_images(splits, settings, preprocessing)
    missing = _missing(name, {label: len(found.get(label, ())) for label in range(num_labels)}, settings)
    labels, pictures = _in_turns(found, np.random.default_rng((settings.seed, ORDER)))
    if name in ("label_noise", "pixel_noise"):
        labels = np.random.default_rng((settings.seed, LABELS)).integers(num_labels, size=len(labels))
    inputs = ShownPictures(
        pictures,
        preprocessing,
        augment=None if name == "stitch" else augment,
        fill=concepts.header.settings.fill if name in OF_CONCEPTS and concepts is not None else None,
        min_area=settings.min_concept_area,
        brightness=settings.brightness if name == "brightness" else 1.0,
        shuffled=name == "pixel_noise",
        seed=settings.seed,
    )
    return PruningSet(name, torch.from_numpy(labels), missing, inputs)


def _num_labels(name: str, concepts: ConceptCache | None, splits: ImageSplits | None) -> int:
    """Return how many classes there are, and check that what the source is made of is there."""
    if name in OF_CONCEPTS and concepts is None:
        raise DataError(f"the source '{name}' must have `concepts`, got none; see `discover_concepts`")
    if name in OF_IMAGES and splits is None:
        raise DataError(f"the source '{name}' must have `splits`, got none; see `load_images`")
    numbers = {len(concepts.header.label_names)} if concepts is not None else set()
    numbers |= {splits.num_labels} if splits is not None else set()
    if len(numbers) != 1:
        raise DataError(
            f"`splits` and `concepts` must be of the same classes, got numbers of classes {numbers or None}"
        )
    return numbers.pop()


def _of_images(splits: Any, settings: SourceSettings, preprocessing: Preprocessing) -> PicturesOf:
    pictures = Pictures(splits, preprocessing)
    keys = {label: (settings.seed, IMAGES, label) for label in range(splits.num_labels)}
    return {label: list(pictures.of_class(label, settings.images_per_class, key)[0]) for label, key in keys.items()}


def _of_concepts(
    name: str, concepts: ConceptCache, settings: SourceSettings, preprocessing: Preprocessing
) -> PicturesOf:
    # What becomes zero by normalisation, as nearly as bytes can say it.
    background = [round(MAX_PIXEL * value) for value in preprocessing.mean]
    pictures = {}
    for label in concepts.labels:
        rng = np.random.default_rng((settings.seed, LAYOUT, label))
        pictures[label] = _of_class(name, concepts.read(label), settings, background, rng)
    return pictures


def _of_class(
    name: str, found: ClassConcepts, settings: SourceSettings, background: Sequence[int], rng: np.random.Generator
) -> list[Picture]:
    ranked = found.ranked(significant_only=settings.significant_only, min_cav_accuracy=settings.min_cav_accuracy)
    top, number = ranked[: settings.num_concepts], settings.images_per_class
    if not top:
        return []
    if name == "concept":
        return [found.patch(index) for index in in_turns(top, number)]
    if name == "concept_low":
        return [found.patch(index) for index in in_turns(ranked[::-1][: settings.num_concepts], number)]
    if name == "segments":
        return [found.patch(index) for index in rng.permutation(found.unranked)[:number].tolist()]
    if name == "rect_matched":
        return [_rectangle_like(found, index, rng) for index in in_turns(top, number)]
    return [stitch(found, top, settings.stitch, background, rng).picture for _ in range(number)]


def _rectangle_like(found: ClassConcepts, index: int, rng: np.random.Generator) -> Picture:
    picture = found.pictures[rng.integers(len(found.pictures))]
    drawn = rectangle(found.segments[index].area_px, picture.shape[:2], rng)
    return patch_of(picture, drawn, found.settings.fill)


def _missing(name: str, counts: dict[int, int], settings: SourceSettings) -> dict[int, int]:
    missing = {label: settings.images_per_class - n for label, n in counts.items() if n < settings.images_per_class}
    if not any(counts.values()):
        raise DataError(f"the source '{name}' must give at least one image, but there are none for any class")
    if missing:
        first = next(iter(missing))
        warnings.warn(
            f"'{name}' has fewer than {settings.images_per_class} images for {len(missing)} of {len(counts)} classes: "
            f"{sum(missing.values())} are missing, {missing[first]} of class {first}; see `missing` of the set, and "
            f"`without_concepts()` of the concepts for the reasons",
            HfPruneWarning,
            stacklevel=3,
        )
    return missing


def _in_turns(found: PicturesOf, rng: np.random.Generator) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Return labels and pictures, one of each class in random order, then the next of each."""
    labels, pictures = [], []
    for turn in range(max(len(of_class) for of_class in found.values())):
        here = [label for label, of_class in found.items() if turn < len(of_class)]
        for label in rng.permutation(here).tolist():
            labels.append(label)
            pictures.append(found[label][turn])
    return np.array(labels), np.stack(pictures)
