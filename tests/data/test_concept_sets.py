"""Pruning sets hold what their names say, for the network that is pruned, and differ in nothing else."""

import json
import pickle
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from planted_concepts import NUM_CLASSES, PREPROCESSING, planted_rows, quick_concepts, splits_of_pictures
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from hf_prune.data.concept_sets import (
    FOR_GRASP,
    FOR_SNIP,
    OF_CONCEPTS,
    OF_IMAGES,
    PLAIN,
    SourceSettings,
    pruning_source,
)
from hf_prune.data.concepts.cache import ConceptCache
from hf_prune.data.transforms import Augmentation, Preprocessing, train_transform
from hf_prune.errors import DataError, HfPruneWarning

SETTINGS = SourceSettings(images_per_class=6, num_concepts=2)
# Twice as large, and normalised in another way than the teacher's.
LARGER = Preprocessing(size_px=(64, 64), mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2), interpolation="nearest")
EVERY = (*OF_CONCEPTS, *OF_IMAGES, *PLAIN)
ROWS = planted_rows(12)


@pytest.fixture(scope="module")
def concepts(tmp_path_factory):
    return quick_concepts(tmp_path_factory.mktemp("concepts"))


@pytest.fixture(scope="module")
def splits():
    return splits_of_pictures(ROWS[0], ROWS[2])


@pytest.fixture
def source(concepts, splits):
    def make(name, **changes):
        defaults = {"preprocessing": PREPROCESSING, "concepts": concepts, "splits": splits, "settings": SETTINGS}
        return pruning_source(name, **defaults | changes)

    return make


def bytes_of(pixel_values, preprocessing=PREPROCESSING):
    """Undo the normalisation: `(H, W, 3)`."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return ((pixel_values * std + mean) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def inputs_of(pruning_set):
    return torch.stack([example["pixel_values"] for example in (pruning_set[i] for i in range(len(pruning_set)))])


def areas_of(pruning_set):
    """How many pixels are not grey, per class."""
    areas = {label: [] for label in range(NUM_CLASSES)}
    for index in range(len(pruning_set)):
        example = pruning_set[index]
        areas[example["labels"]].append(int((bytes_of(example["pixel_values"]) != 117).any(-1).sum()))
    return areas


# All of them


@pytest.mark.parametrize("name", EVERY)
def test_every_source_gives_labelled_normalised_images(source, name):
    made = source(name, preprocessing=LARGER)
    assert (made.name, len(made), made.missing) == (name, 6 * NUM_CLASSES, {})
    batches = list(DataLoader(made, batch_size=5, num_workers=0))
    assert batches[0]["pixel_values"].shape == (5, 3, 64, 64)
    assert batches[0]["pixel_values"].dtype == torch.float32
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == made.labels.tolist()
    assert made.labels.dtype == torch.int64
    if not name.endswith("noise"):
        # One of each class after the other.
        assert all(set(turn.tolist()) == set(range(NUM_CLASSES)) for turn in made.labels.split(NUM_CLASSES))


@pytest.mark.parametrize("name", EVERY)
def test_the_same_at_every_look_and_under_every_seed_but_another(source, name):
    first, again = source(name), source(name)
    assert torch.equal(inputs_of(first), inputs_of(again))
    assert torch.equal(inputs_of(first), inputs_of(pickle.loads(pickle.dumps(first))))
    assert first.labels.tolist() == again.labels.tolist()
    other = source(name, settings=replace(SETTINGS, seed=1))
    is_fixed = name in ("ones", "zeros")
    assert torch.equal(inputs_of(first), inputs_of(other)) == is_fixed


def test_an_index_beyond_the_end(source):
    made = source("zeros")
    with pytest.raises(IndexError, match=r"0\.\.23, got 24"):
        made[24]
    assert len(list(made)) == 24


# Of concepts


def test_concepts_are_the_best_ones_in_turns(source, concepts):
    made = source("concept")
    for label in range(NUM_CLASSES):
        found = concepts.read(label)
        shown = [bytes_of(made[i]["pixel_values"]) for i in range(len(made)) if made.labels[i] == label]
        first, second = found.concepts[:2]
        expected = [concept.segments[turn] for turn in range(3) for concept in (first, second)]
        for picture, index in zip(shown, expected, strict=True):
            np.testing.assert_array_equal(picture, found.patch(index))


def test_low_concepts_are_the_worst_ones(source, concepts):
    made = source("concept_low", settings=replace(SETTINGS, images_per_class=2))
    for index in range(len(made)):
        found = concepts.read(int(made.labels[index]))
        worst = found.concepts[-1 - index // NUM_CLASSES]
        np.testing.assert_array_equal(bytes_of(made[index]["pixel_values"]), found.patch(worst.segments[0]))


def test_segments_are_superpixels_of_any_kind(source, concepts):
    made = source("segments")
    for index in range(len(made)):
        found = concepts.read(int(made.labels[index]))
        picture = bytes_of(made[index]["pixel_values"])
        assert any(np.array_equal(picture, found.patch(number)) for number in found.unranked)


def test_rectangles_have_the_areas_of_the_concepts(source):
    settings = replace(SETTINGS, images_per_class=10)
    rectangles, patches = (
        areas_of(source("rect_matched", settings=settings)),
        areas_of(source("concept", settings=settings)),
    )
    for label in range(NUM_CLASSES):
        for of_patch, of_rectangle in zip(patches[label], rectangles[label], strict=True):
            # The masks agree exactly; a pixel of the picture may by chance be as grey as the ground.
            assert abs(of_patch - of_rectangle) <= 1


def test_rectangles_are_cut_from_pictures_of_their_class(source, concepts):
    made = source("rect_matched")
    for index in range(len(made)):
        pictures = concepts.read(int(made.labels[index])).pictures.astype(int)
        shown = bytes_of(made[index]["pixel_values"])
        inside = (shown != 117).any(-1)
        rows, columns = inside.any(1).nonzero()[0], inside.any(0).nonzero()[0]
        # The box is full, but for the end of its last row.
        box = inside[rows[0] : rows[-1], columns[0] : columns[-1] + 1]
        assert box.mean() > 0.98
        assert (np.abs(pictures - shown)[:, inside].sum((1, 2)) == 0).any()


def test_stitched_images_lie_on_what_becomes_zero(source):
    made = source("stitch", preprocessing=replace(PREPROCESSING, mean=(0.2, 0.5, 0.7)))
    inputs = inputs_of(made)
    ground = inputs.abs().amax(1) < 0.5 / 255 / 0.25 + 1e-6
    covered = 1 - ground.float().mean((1, 2))
    # The last segment may cover more than was asked for; some pixels of segments are as plain as the ground.
    assert (covered > 0.4).all()
    assert covered.mean() < 0.8
    more = source("stitch", settings=replace(SETTINGS, stitch=replace(SETTINGS.stitch, coverage=0.2)))
    ground = inputs_of(more).abs().amax(1) < 0.5 / 255 / 0.25 + 1e-6
    assert (1 - ground.float().mean((1, 2))).mean() < covered.mean() - 0.15


def test_a_class_with_few_concepts_gives_more_of_each(source, concepts):
    counts = [len(concepts.read(label).concepts) for label in range(NUM_CLASSES)]
    made = source("concept", settings=replace(SETTINGS, num_concepts=max(counts) + 3))
    assert len(made) == 6 * NUM_CLASSES


def test_what_is_missing_is_told(source, concepts):
    with pytest.warns(HfPruneWarning, match=r"'concept' has fewer than 500 images for 4 of 4 classes: \d+ are missing"):
        made = source("concept", settings=replace(SETTINGS, images_per_class=500))
    here = [sum(len(concept.segments) for concept in concepts.read(label).concepts[:2]) for label in range(NUM_CLASSES)]
    assert made.missing == {label: 500 - number for label, number in enumerate(here)}
    assert len(made) == sum(here)


def test_classes_without_concepts_are_told(tmp_path, splits):
    some = quick_concepts(tmp_path, labels=[0, 2])
    with pytest.warns(HfPruneWarning, match="2 of 4 classes: 12 are missing, 6 of class 1"):
        made = pruning_source("stitch", preprocessing=PREPROCESSING, concepts=some, settings=SETTINGS)
    assert made.missing == {1: 6, 3: 6}
    assert set(made.labels.tolist()) == {0, 2}


def test_concepts_can_be_filtered(concepts, source):
    limit = float(np.median([concept.cav_accuracy for label in range(4) for concept in concepts.read(label).concepts]))
    made = source("concept", settings=replace(SETTINGS, min_cav_accuracy=limit, images_per_class=1))
    for index in range(len(made)):
        found = concepts.read(int(made.labels[index]))
        best = next(concept for concept in found.concepts if concept.cav_accuracy >= limit)
        np.testing.assert_array_equal(bytes_of(made[index]["pixel_values"]), found.patch(best.segments[0]))


def test_insignificant_concepts_can_be_left_out(tmp_path, concepts):
    shutil.copytree(concepts.folder, tmp_path / "copy")
    path = tmp_path / "copy" / "class_00001.json"
    stored = json.loads(path.read_text())
    for concept, p_value in zip(stored["concepts"], (0.5, 0.19, *[0.21] * 9), strict=False):
        concept["p_value"] = p_value
    path.write_text(json.dumps(stored))
    settings = replace(SETTINGS, significant_only=True, images_per_class=1)
    found = ConceptCache.open(tmp_path / "copy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HfPruneWarning)  # of other classes, which may have none
        made = pruning_source("concept", preprocessing=PREPROCESSING, concepts=found, settings=settings)
    (index,) = (made.labels == 1).nonzero().flatten().tolist()
    here = found.read(1)
    np.testing.assert_array_equal(bytes_of(made[index]["pixel_values"]), here.patch(here.concepts[1].segments[0]))


def test_a_set_of_nothing_is_refused(tmp_path):
    nothing = quick_concepts(tmp_path, labels=[])
    with pytest.raises(DataError, match="'concept' must give at least one image, but there are none for any class"):
        pruning_source("concept", preprocessing=PREPROCESSING, concepts=nothing)


# Of images


def test_random_images_are_pictures_of_their_class(source):
    made = source("random")
    shown = set()
    for index in range(len(made)):
        picture = bytes_of(made[index]["pixel_values"])
        known = {known.tobytes() for known in ROWS[0][ROWS[2] == int(made.labels[index])]}
        assert picture.tobytes() in known
        shown.add(picture.tobytes())
    assert len(shown) == len(made)


def test_noise_in_labels_leaves_the_images_and_noise_in_pixels_their_values(source):
    random, labels, pixels = (source(name) for name in ("random", "label_noise", "pixel_noise"))
    assert torch.equal(inputs_of(random), inputs_of(labels))
    assert random.labels.tolist() != labels.labels.tolist()
    assert labels.labels.tolist() == pixels.labels.tolist()
    for before, after in zip(inputs_of(random), inputs_of(pixels), strict=True):
        assert not torch.equal(before, after)
        assert torch.equal(before.flatten().sort().values, after.flatten().sort().values)
        # Neighbours are no longer alike.
        assert after.diff(dim=2).abs().mean() > 1.3 * before.diff(dim=2).abs().mean()


def test_noisy_labels_are_uniform(source):
    made = source("label_noise", settings=replace(SETTINGS, images_per_class=12))
    counts = np.bincount(made.labels, minlength=NUM_CLASSES)
    assert counts.sum() == 48
    assert counts.min() >= 4
    assert counts.tolist() != [12] * 4


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 2.0, 255.0])
def test_brightness(source, factor):
    made, plain = source("brightness", settings=replace(SETTINGS, brightness=factor)), source("random")
    for index in (0, 7):
        expected = np.clip(bytes_of(plain[index]["pixel_values"]) * factor, 0, 255)
        shown = bytes_of(made[index]["pixel_values"]).astype(int)
        assert np.abs(shown - expected).max() <= 1


# Of neither


def test_inputs_that_are_no_pictures(source, splits):
    assert (inputs_of(source("ones")) == 1).all()
    assert (inputs_of(source("zeros")) == 0).all()
    noise = inputs_of(pruning_source("gauss", preprocessing=PREPROCESSING, splits=splits, settings=SETTINGS))
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    assert not torch.equal(noise[0], noise[1])


# Augmentation


def test_augmented_images_keep_some_of_their_concept(source):
    hard = train_transform(PREPROCESSING, Augmentation(**STRONG))
    for area in (0.01, 0.03):
        made = source("concept", augment=hard, settings=replace(SETTINGS, min_concept_area=area))
        shares = ((inputs_of(made) - (117 / 255 - 0.5) / 0.25).abs().amax(1) > 1e-4).float().mean((1, 2))
        assert (shares >= area - 1e-3).all()
    careless = source("concept", augment=hard, settings=replace(SETTINGS, min_concept_area=0.0))
    shares = ((inputs_of(careless) - (117 / 255 - 0.5) / 0.25).abs().amax(1) > 1e-4).float().mean((1, 2))
    assert (shares == 0).any()


STRONG = {"auto_augment": None, "random_erasing_prob": 0.0, "hflip_prob": 0.5, "crop_scale_min": 0.05}


def test_augmentation_that_loses_every_concept_is_left_out(source):
    blank = v2.Lambda(lambda _: torch.full((3, 32, 32), 0.5))
    assert torch.equal(inputs_of(source("concept", augment=blank)), inputs_of(source("concept")))


def test_what_is_augmented(source):
    flip = train_transform(PREPROCESSING, Augmentation(**STRONG))
    for name in ("concept", "rect_matched", "random", "pixel_noise"):
        assert not torch.equal(inputs_of(source(name)), inputs_of(source(name, augment=flip)))
    for name in ("stitch", "gauss", "ones"):
        assert torch.equal(inputs_of(source(name)), inputs_of(source(name, augment=flip)))


# Errors


@pytest.mark.parametrize(
    ("name", "given", "why"),
    [
        ("concepts", {}, r"must be one of concept, .*, got 'concepts'; did you mean concept\?"),
        ("stitch", {"splits": True}, "'stitch' must have `concepts`, got none"),
        ("random", {"concepts": True}, "'random' must have `splits`, got none"),
        ("ones", {}, "must be of the same classes, got numbers of classes None"),
    ],
)
def test_what_a_source_is_made_of_must_be_there(concepts, splits, name, given, why):
    given = {key: {"concepts": concepts, "splits": splits}[key] for key in given}
    with pytest.raises(DataError, match=why):
        pruning_source(name, preprocessing=PREPROCESSING, **given)


def test_concepts_and_images_of_other_classes(concepts):
    five = splits_of_pictures(ROWS[0], ROWS[2], num_labels=5)
    with pytest.raises(DataError, match=r"same classes, got numbers of classes \{4, 5\}"):
        pruning_source("random", preprocessing=PREPROCESSING, concepts=concepts, splits=five)


@pytest.mark.parametrize(
    "wrong",
    [{"images_per_class": 0}, {"num_concepts": 0}, {"seed": -1}, {"brightness": -1.0}, {"min_concept_area": 2.0}],
)
def test_settings_are_checked(wrong):
    with pytest.raises(DataError, match=next(iter(wrong))):
        SourceSettings(**wrong)


def test_presets_are_those_of_the_paper():
    assert (FOR_SNIP.num_concepts, FOR_SNIP.images_per_class) == (5, 5 * 2)
    assert (FOR_GRASP.num_concepts, FOR_GRASP.images_per_class) == (5, 5 * 6)
    assert (FOR_SNIP.stitch.coverage, FOR_SNIP.stitch.max_overlap, FOR_SNIP.stitch.max_segments) == (0.5, 0.25, 12)
