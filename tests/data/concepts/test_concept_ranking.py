"""Clusters, directions, scores and their test, on numbers of which the answer is known."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from hf_prune.data.concepts.cluster import find_clusters
from hf_prune.data.concepts.rank import concept_vectors, p_value, tcav_scores
from hf_prune.data.concepts.settings import SMALL_IMAGES, ConceptSettings
from hf_prune.errors import DataError

THREE = replace(SMALL_IMAGES, num_clusters=3, min_segments=4, max_segments=5)


def heaps(sizes, images, seed=0):
    """Well separated groups of points, the points of each from some images."""
    rng = np.random.default_rng(seed)
    points = [10 * number + rng.normal(0, 0.1, (size, 4)) for number, size in enumerate(sizes)]
    image_of = [np.arange(size) % number for size, number in zip(sizes, images, strict=True)]
    return np.concatenate(points).astype(np.float32), np.concatenate(image_of)


def kept(sizes, images, num_images, settings=THREE):
    points, image_of = heaps(sizes, images)
    found = find_clusters(points, image_of, num_images, settings, seed=0)
    return sorted((cluster.num_segments, cluster.num_images) for cluster in found)


def test_clusters_must_be_large():
    assert kept([4, 5, 20], [4, 5, 20], 40) == [(5, 5), (20, 20)]


@pytest.mark.parametrize(
    ("size", "images", "num_images", "good"),
    [
        (20, 11, 100, True),  # more than half of the segments are from images of their own
        (20, 10, 100, False),
        (20, 10, 39, True),  # more than a quarter of them, and of the images
        (20, 10, 40, False),
        (20, 5, 19, False),
        (40, 5, 9, True),  # more than a tenth of them, and half of the images
        (40, 5, 10, False),
        (40, 4, 5, False),
    ],
)
def test_clusters_must_come_from_many_images(size, images, num_images, good):
    assert ((size, images) in kept([size, 6, 7], [images, 1, 1], num_images)) == good


def test_nearest_members_come_first_and_not_more_than_allowed():
    points, image_of = heaps([30], [30])
    (cluster,) = find_clusters(points, image_of, 30, replace(THREE, num_clusters=1), seed=0)
    distances = np.linalg.norm(points - points.mean(0), axis=1)
    assert list(cluster.members) == np.argsort(distances)[:5].tolist()
    assert (cluster.num_segments, cluster.num_images) == (30, 30)


def test_fewer_different_points_than_clusters():
    points = np.repeat(np.eye(2, dtype=np.float32), 10, axis=0)
    found = find_clusters(points, np.arange(20), 20, THREE, seed=0)
    assert sorted(cluster.num_segments for cluster in found) == [10, 10]


def test_vectors_point_from_random_images_to_the_concept():
    rng = np.random.default_rng(0)
    direction = np.array([0.0, 0.6, -0.8])
    random_sets = rng.normal(0, 1, (6, 40, 3))
    examples = rng.normal(0, 1, (40, 3)) + 8 * direction
    vectors, accuracy = concept_vectors(examples, random_sets, SMALL_IMAGES, (0,))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1)
    assert (vectors @ direction > 0.8).all()
    assert accuracy > 0.95
    _, chance = concept_vectors(rng.normal(0, 1, (40, 3)), random_sets, SMALL_IMAGES, (0,))
    assert 0.3 < chance < 0.7


def test_vectors_follow_their_key():
    rng = np.random.default_rng(0)
    examples, random_sets = rng.normal(0, 1, (20, 3)), rng.normal(0, 1, (4, 20, 3))
    first, second, other = (concept_vectors(examples, random_sets, SMALL_IMAGES, key)[0] for key in ((1,), (1,), (2,)))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)


def test_as_many_random_images_as_examples():
    rng = np.random.default_rng(0)
    examples, random_sets = rng.normal(0, 1, (10, 3)), rng.normal(0, 1, (2, 30, 3))
    spoiled = random_sets.copy()
    spoiled[:, 10:] += 100
    for balance in (True, False):
        settings = replace(SMALL_IMAGES, balance=balance)
        vectors = [concept_vectors(examples, sets, settings, (0,))[0] for sets in (random_sets, spoiled)]
        assert np.array_equal(*vectors) == balance


def test_scores_by_hand():
    gradients = np.array([[1.0, 0], [1, 0], [-1, 0], [0, 2]])
    scores, sensitivity = tcav_scores(gradients, np.array([[1.0, 0], [0, 1], [0, -1]]))
    # No growth at all is no growth.
    assert scores == (0.5, 0.25, 0.0)
    assert sensitivity == pytest.approx((1 + 2 - 2) / 12)


def test_p_values_are_those_of_a_paired_test():
    scores, others = (0.9, 0.8, 1.0, 0.95), (0.5, 0.55, 0.4, 0.7)
    differences = np.subtract(scores, others)
    t = differences.mean() / (differences.std(ddof=1) / 2)
    assert p_value(scores, others) == pytest.approx(2 * stats.t.sf(t, df=3))
    assert p_value((1.0,) * 4, (0.5,) * 4) == 0
    assert p_value((0.3,) * 4, (0.3,) * 4) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"images_per_class": 1},
        {"segment_counts": ()},
        {"segment_counts": (0,)},
        {"min_area": -0.1},
        {"holdout": 0},
        {"fill": 256},
        {"num_random_sets": 1},
        {"seed": -1},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(DataError, match=next(iter(wrong))):
        ConceptSettings(**wrong)
