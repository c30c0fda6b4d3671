"""Segments tile a picture, are neither small nor nearly the same, and are shown as they should be."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted_concepts import planted_picture

from hf_prune.data.concepts.segments import Segment, patch_of, rectangle, resized_of, superpixels
from hf_prune.data.concepts.settings import IMAGENET, SMALL_IMAGES

ONE = replace(SMALL_IMAGES, segment_counts=(10,), min_area=0.0)


@pytest.fixture
def picture():
    return planted_picture(0, np.random.default_rng(3))[0]


def whole_mask(segment, picture):
    mask = np.zeros(picture.shape[:2], bool)
    segment.box_of(mask)[segment.mask] = True
    return mask


def masks_of(picture, settings):
    return [whole_mask(segment, picture) for segment in superpixels(picture, 0, settings)]


def test_segments_of_one_resolution_tile_the_picture(picture):
    assert (np.sum(masks_of(picture, ONE), axis=0) == 1).all()


def test_every_box_is_the_smallest(picture):
    for segment in superpixels(picture, 7, SMALL_IMAGES):
        assert segment.image == 7
        for line in (segment.mask[0], segment.mask[-1], segment.mask[:, 0], segment.mask[:, -1]):
            assert line.any()


def test_near_repetitions_are_dropped_and_others_are_kept(picture):
    twice = masks_of(picture, replace(ONE, segment_counts=(10, 10)))
    assert len(twice) == len(masks_of(picture, ONE))
    finer = masks_of(picture, replace(ONE, segment_counts=(5, 10, 15)))
    overlaps = [np.sum(a & b) / np.sum(a | b) for i, a in enumerate(finer) for b in finer[:i]]
    assert max(overlaps) <= 0.5
    tolerant = masks_of(picture, replace(ONE, segment_counts=(5, 10, 15), max_jaccard=1.0))
    assert len(tolerant) > len(finer)


def test_small_segments_are_dropped(picture):
    areas = [mask.mean() for mask in masks_of(picture, ONE)]
    limit = float(np.median(areas))
    kept = [mask.mean() for mask in masks_of(picture, replace(ONE, min_area=limit))]
    assert kept == [area for area in areas if area > limit]
    assert 0 < len(kept) < len(areas)


def test_both_renderings(picture):
    mask = np.array([[True, False, True], [True, True, True]])
    segment = Segment(0, 4, 9, mask)
    patch = patch_of(picture, segment, 117)
    where = whole_mask(segment, picture)
    np.testing.assert_array_equal(patch[where], picture[where])
    assert (patch[~where] == 117).all()
    resized = resized_of(picture, segment, 117)
    assert resized.shape == picture.shape
    # The corners of the stretched box lie in its corner pixels, far from the others.
    for (row, column), (y, x) in zip([(0, 0), (-1, -1), (0, -1)], [(4, 9), (5, 11), (4, 11)], strict=True):
        assert np.abs(resized[row, column].astype(int) - picture[y, x]).max() < 12
    assert np.abs(resized[0, 16].astype(int) - 117).max() < 25


def test_presets_are_those_of_the_paper():
    assert (IMAGENET.segment_counts, IMAGENET.images_per_class, IMAGENET.min_segments) == ((15, 50, 80), 40, 40)
    assert (SMALL_IMAGES.segment_counts, SMALL_IMAGES.images_per_class, SMALL_IMAGES.min_segments) == (
        (5, 10, 15),
        30,
        10,
    )
    assert (IMAGENET.num_random_sets, IMAGENET.random_set_size, IMAGENET.max_p_value) == (20, 500, 0.01)


@given(st.integers(1, 20 * 30), st.integers(0, 5))
def test_rectangles_have_exactly_the_area_and_lie_inside(area, seed):
    drawn = rectangle(area, (20, 30), np.random.default_rng(seed))
    rows, columns = drawn.mask.shape
    assert drawn.area_px == area
    assert 0 <= drawn.top <= 20 - rows
    assert 0 <= drawn.left <= 30 - columns
    # All rows are full but for the last.
    assert drawn.mask[:-1].all()
    assert drawn.mask[-1].any()


def test_rectangles_differ_in_place_and_shape():
    rng = np.random.default_rng(0)
    drawn = [rectangle(60, (32, 32), rng) for _ in range(30)]
    assert len({(s.top, s.left) for s in drawn}) > 20
    sides = [s.mask.shape[0] / s.mask.shape[1] for s in drawn]
    assert min(sides) < 0.8
    assert max(sides) > 1.25
    assert all(0.4 < side < 2.5 for side in sides)
