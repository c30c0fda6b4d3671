"""Concepts on disk: the same again, gone on with, and never believed when broken or made with something else."""

import json
import zipfile
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from planted_concepts import (
    PREPROCESSING,
    QUICK,
    planted_rows,
    quick_concepts,
    small_net,
    splits_of_pictures,
)

from hf_prune.data.concepts import discover
from hf_prune.data.concepts.cache import ConceptCache
from hf_prune.data.concepts.discover import discover_concepts
from hf_prune.data.images import load_images
from hf_prune.errors import DataError


def contents(cache):
    return {path.name: path.read_bytes() for path in sorted(cache.folder.iterdir())}


def edit_json(cache, name, **changes):
    path = cache.folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_arrays(cache, name, **changes):
    path = cache.folder / name
    with np.load(path) as stored:
        arrays = {**stored, **changes}
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})


def assert_same_class(first, second):
    np.testing.assert_array_equal(first.pictures, second.pictures)
    assert (first.concepts, first.unranked, first.problem) == (second.concepts, second.unranked, second.problem)
    for one, other in zip(first.segments, second.segments, strict=True):
        assert (one.image, one.top, one.left) == (other.image, other.top, other.left)
        np.testing.assert_array_equal(one.mask, other.mask)


def renamed(splits):
    return replace(splits, label_names=("a", "b", "c", "d"))


# What is found


def test_classes_are_described_in_full(found):
    assert found.labels == (0, 1, 2, 3)
    assert found.without_concepts() == {}
    for label in found.labels:
        here = found.read(label)
        assert here.pictures.shape == (10, 32, 32, 3)
        assert here.concepts
        assert [concept.score for concept in here.concepts] == sorted((c.score for c in here.concepts), reverse=True)
        assert len(here.unranked) == 20
        assert here.num_found >= len(here.segments)
        for concept in here.concepts:
            assert len(concept.scores) == QUICK.num_random_sets
            assert concept.num_segments > 3
            assert len(concept.segments) == min(concept.num_segments, QUICK.max_segments)
            images = {here.segments[index].image for index in concept.segments}
            assert len(images) <= concept.num_images


def test_pictures_are_those_of_the_class(found):
    pictures, _, labels = planted_rows(12)
    for label in found.labels:
        known = {picture.tobytes() for picture in pictures[labels == label]}
        here = {picture.tobytes() for picture in found.read(label).pictures}
        assert len(here) == 10
        assert here <= known


def test_the_same_again_under_a_seed_and_not_under_another(found_once, tmp_path):
    assert contents(quick_concepts(tmp_path / "again")) == contents(found_once)
    other = quick_concepts(tmp_path / "other", replace(QUICK, seed=1), labels=[0])
    assert not np.array_equal(other.read(0).pictures, found_once.read(0).pictures)


def test_writing_and_reading_give_the_same(found, tmp_path):
    copy = ConceptCache.at(tmp_path / "copy", found.header)
    for label in found.labels:
        copy.write(found.read(label))
        assert_same_class(found.read(label), copy.read(label))
    assert not list(copy.folder.glob("*.partial"))


# Going on


def test_classes_one_by_one_or_in_parts_are_those_of_one_run(found_once, tmp_path):
    for labels in ([3], [0, 1], None):
        parts = quick_concepts(tmp_path, labels=labels)
    assert contents(parts) == contents(found_once)


def test_what_is_there_is_not_done_again(found, monkeypatch):
    for name in ("class_00002.json", "class_00001.json", "class_00001.npz"):
        (found.folder / name).unlink()
    before = contents(found)
    searched = []
    of_class = discover.Pictures.of_class
    monkeypatch.setattr(
        discover.Pictures, "of_class", lambda self, label, *rest: searched.append(label) or of_class(self, label, *rest)
    )
    monkeypatch.setattr(discover.Pictures, "of_any_class", lambda *_: pytest.fail("random images are there"))
    resumed = quick_concepts(found.folder)
    assert searched == [1, 2]
    assert {name: content for name, content in contents(resumed).items() if name in before} == before


def test_a_run_that_was_stopped_leaves_nothing_half(tmp_path, monkeypatch):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(discover.ConceptCache, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            quick_concepts(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", lambda file, **_: (file.write(b"half"), stop()))
        with pytest.raises(KeyboardInterrupt):
            quick_concepts(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["concepts.json", "random.npz"]
    assert quick_concepts(tmp_path).labels == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"settings": replace(QUICK, num_clusters=7)}, "num_clusters: 6, not 7"),
        ({"settings": replace(QUICK, keep_rules=((0.5, 0.1),))}, "keep_rules"),
        ({"net": small_net(seed=1)}, "teacher"),
        ({"splits": splits_of_pictures(*planted_rows(11)[::2])}, "labels"),
        ({"splits": renamed(splits_of_pictures(*planted_rows(12)[::2]))}, "label_names"),
    ],
)
def test_a_cache_of_something_else_is_refused(found, other, difference):
    before = contents(found)
    with pytest.raises(DataError, match=rf"same teacher, data and settings.*{difference}.*take another folder"):
        quick_concepts(found.folder, **other)
    assert contents(found) == before


def test_another_layer_is_refused_and_another_threshold_is_not(found):
    settings = {"preprocessing": PREPROCESSING, "settings": QUICK}
    splits = splits_of_pictures(*planted_rows(12)[::2])
    with pytest.raises(DataError, match=r"layer: '0', not '0.2'"):
        discover_concepts(small_net(), splits, found.folder, layer="0.2", **settings)
    lenient = quick_concepts(found.folder, replace(QUICK, max_p_value=1.0)).read(0)
    assert lenient.ranked(significant_only=True) == lenient.concepts
    strict = quick_concepts(found.folder, replace(QUICK, max_p_value=0.0)).read(0)
    assert len(strict.ranked(significant_only=True)) < len(strict.concepts)


# Classes that cannot be done


def test_a_class_with_few_images_and_one_without_clusters_are_told_of(tmp_path):
    pictures, _, labels = planted_rows(12)
    keep = (labels != 1) | (np.cumsum(labels == 1) <= 4)
    pictures = pictures[keep]
    labels = labels[keep]
    # One segment a picture, and none alike: nothing to group.
    pictures[labels == 2] = np.random.default_rng(0).integers(0, 255, (12, 1, 1, 3), dtype=np.uint8)
    settings = replace(QUICK, segment_counts=(1,), num_clusters=12)
    found = quick_concepts(tmp_path, settings, splits=splits_of_pictures(pictures, labels))
    problems = found.without_concepts()
    assert problems[1] == "4 readable images, fewer than 5"
    assert problems[2] == "no cluster of the 10 segments of 10 images is frequent enough"
    assert found.read(1).concepts == ()
    assert len(found.read(2).unranked) == 10
    assert found.labels == (0, 1, 2, 3)


def test_images_that_cannot_be_read_are_counted_and_replaced(tmp_path):
    splits = splits_of_pictures(*planted_rows(12)[::2])
    rows = splits.train.to_list()
    for row in rows[:2]:
        row["image"]["bytes"] = b"no image"
    broken = datasets.Dataset.from_list(rows, features=splits.train.features)
    splits = replace(splits, train=broken)
    for wanted, unreadable in ((10, (0, 1, 2)), (12, (2,))):
        settings = replace(QUICK, images_per_class=wanted, segment_counts=(2,))
        here = quick_concepts(tmp_path / str(wanted), settings, splits=splits, labels=[0]).read(0)
        assert len(here.pictures) == 10
        assert here.num_unreadable in unreadable


def test_teachers_of_other_classes_and_classes_that_are_none_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"on the 4 classes of 'planted'.*got a teacher of 10 classes"):
        quick_concepts(tmp_path, net=small_net(10))
    with pytest.raises(DataError, match=r"labels \[0, 4\]"):
        quick_concepts(tmp_path, labels=[4, 0])
    assert not list(tmp_path.iterdir())


def test_streams_are_refused(tmp_path):
    splits = splits_of_pictures(*planted_rows(12)[::2])
    stream = replace(splits, train=splits.train.to_iterable_dataset())
    with pytest.raises(DataError, match="read class by class, got a stream"):
        quick_concepts(tmp_path, splits=stream)


def test_digits_are_done_as_any_dataset(tmp_path):
    settings = replace(QUICK, segment_counts=(5,), images_per_class=12)
    digits = load_images("digits")
    found = discover_concepts(
        small_net(10), digits, tmp_path, preprocessing=PREPROCESSING, settings=settings, labels=[0, 7]
    )
    assert found.labels == (0, 7)
    assert found.read(7).pictures.shape == (12, 32, 32, 3)
    assert found.read(7).concepts


# Broken and hostile files


def boxes(cache):
    with np.load(cache.folder / "class_00000.npz") as stored:
        return stored["boxes"]


def moved_out(cache):
    spoiled = boxes(cache)
    spoiled[0, 1] = 31
    return spoiled


ARRAYS = {
    "a missing array": lambda cache: {"bits": None},
    "an array too many": lambda cache: {"more": np.zeros(3)},
    "objects, which would be unpickled": lambda cache: {"bits": np.array([{}], object)},
    "another type": lambda cache: {"boxes": boxes(cache).astype(np.int64)},
    "another size": lambda cache: {"pictures": np.zeros((10, 31, 32, 3), np.uint8)},
    "too many": lambda cache: {"pictures": np.zeros((11, 32, 32, 3), np.uint8)},
    "segments outside": lambda cache: {"boxes": moved_out(cache)},
    "segments of pictures that are not there": lambda cache: {"pictures": np.zeros((3, 32, 32, 3), np.uint8)},
    "boxes of negative size": lambda cache: {"boxes": -boxes(cache)},
    "too few bits": lambda cache: {"bits": np.zeros(3, np.uint8)},
    "empty segments": lambda cache: {
        "bits": np.zeros(-(-int((boxes(cache)[:, 3] * boxes(cache)[:, 4]).sum()) // 8), np.uint8)
    },
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_are_not_believed(found, case):
    edit_arrays(found, "class_00000.npz", **ARRAYS[case](found))
    with pytest.raises(DataError, match=r"class_00000\.(npz|json)' must .* delete it to have it made again"):
        found.read(0)
    assert found.read(1).concepts


def concept_with(cache, **changes):
    (first, *others) = json.loads((cache.folder / "class_00000.json").read_text())["concepts"]
    return [{**first, **changes}, *others]


RECORDS = {
    "an index beyond": lambda cache: {"concepts": concept_with(cache, segments=[10_000])},
    "a negative index": lambda cache: {"unranked": [-1]},
    "an index that is none": lambda cache: {"unranked": [True]},
    "no segments": lambda cache: {"concepts": concept_with(cache, segments=[])},
    "a score beyond one": lambda cache: {"concepts": concept_with(cache, scores=[0.1, 2.0, 0.3])},
    "a score too few": lambda cache: {"concepts": concept_with(cache, scores=[0.1, 0.3])},
    "no number": lambda cache: {"concepts": concept_with(cache, p_value=float("nan"))},
    "infinite": lambda cache: {"concepts": concept_with(cache, sensitivity=float("inf"))},
    "text": lambda cache: {"concepts": "none"},
    "a problem that is no text": lambda cache: {"problem": 3},
}


@pytest.mark.parametrize("case", RECORDS)
def test_records_are_not_believed(found, case):
    edit_json(found, "class_00000.json", **RECORDS[case](found))
    with pytest.raises(DataError, match=r"class_00000\.json' must hold the concepts of a class"):
        found.read(0)


@pytest.mark.parametrize("spoil", ["cut short", "text", "empty", "gone"])
@pytest.mark.parametrize("name", ["class_00000.npz", "class_00000.json"])
def test_files_that_are_none(found, name, spoil):
    path = found.folder / name
    content = path.read_bytes()
    path.write_bytes({"cut short": content[: len(content) // 2], "text": b"hello"}.get(spoil, b""))
    if spoil == "gone":
        path.unlink()
    with pytest.raises(DataError, match=rf"{name}' must|class 0 must be in"):
        found.read(0)


def test_a_file_that_claims_to_be_huge_takes_no_memory(found):
    path = found.folder / "class_00000.npz"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (10000000000,), }"
    header += b" " * (117 - len(header)) + b"\n"
    members["bits.npy"] = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"123"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(DataError, match="`bits` must be uint8 of sizes"):
        found.read(0)


HEADERS = {
    "another version": {"format_version": 2},
    "an unknown field": {"surprise": 1},
    "no sides": {"size_px": [32]},
    "negative sides": {"size_px": [-32, 32]},
    "names that are none": {"label_names": [1, 2]},
    "settings of another kind": {"settings": {"num_clusters": 3}},
    "settings that are none": {"settings": None},
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_are_not_believed(found, case):
    edit_json(found, "concepts.json", **HEADERS[case])
    with pytest.raises(DataError, match=r"concepts.json' must say what the concepts beside it were made with"):
        ConceptCache.open(found.folder)


def test_numbers_of_a_header_are_checked(found):
    settings = json.loads((found.folder / "concepts.json").read_text())["settings"]
    for wrong in ({"num_clusters": "six"}, {"images_per_class": 1e9}, {"balance": 1}, {"fill": True}):
        edit_json(found, "concepts.json", settings={**settings, **wrong})
        with pytest.raises(DataError, match=next(iter(wrong))):
            ConceptCache.open(found.folder)


def test_a_broken_or_foreign_folder_is_not_gone_on_with(found, tmp_path):
    (found.folder / "concepts.json").write_text("{")
    with pytest.raises(DataError, match="must say what"):
        quick_concepts(found.folder)
    with pytest.raises(DataError, match="must say what"):
        ConceptCache.open(tmp_path)


def test_features_of_random_images_are_not_believed(found):
    path = found.folder / "random.npz"
    (found.folder / "class_00000.json").unlink()
    for features in (np.zeros((4, 8, 32)), np.full((4, 8, 32), np.nan, np.float32), np.zeros((3, 8, 32), np.float32)):
        np.savez(path, features=features)
        with pytest.raises(DataError, match=r"random.npz' must"):
            quick_concepts(found.folder)
    path.unlink()
    assert quick_concepts(found.folder).labels == (0, 1, 2, 3)


def test_a_class_that_is_not_there(found):
    with pytest.raises(DataError, match=r"class 4 must be in .* which holds \(0, 1, 2, 3\)"):
        found.read(4)


def test_the_global_streams_of_chance_are_left_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    numpy_before = np.random.get_state()[1].tolist()  # noqa: NPY002
    net = small_net()
    torch.manual_seed(3)
    quick_concepts(tmp_path, net=net, labels=[0])
    assert torch.equal(torch.rand(1), expected)
    assert np.random.get_state()[1].tolist() == numpy_before  # noqa: NPY002
