"""What a class consists of is ranked first, what all classes share is not, and neither is so for a teacher of noise."""

from dataclasses import replace

import numpy as np
import pytest
from planted_concepts import (
    DISTRACTORS,
    NUM_CLASSES,
    PREPROCESSING,
    planted_rows,
    splits_of_pictures,
    trained_net,
)

from hf_prune.data.concepts.discover import discover_concepts
from hf_prune.data.concepts.settings import SMALL_IMAGES

# The values for small images, with fewer images and restarts so that it takes seconds.
SETTINGS = replace(
    SMALL_IMAGES,
    images_per_class=18,
    segment_counts=(5, 10),
    num_clusters=12,
    kmeans_starts=1,
    min_segments=6,
    max_segments=20,
)


def scores_of_patterns(net, pictures, places, labels, folder):
    """Return class -> pattern -> score of the cluster that consists of it most, and class -> highest score."""
    found = discover_concepts(
        net, splits_of_pictures(pictures, labels), folder, preprocessing=PREPROCESSING, settings=SETTINGS
    )
    lies = {picture.tobytes(): where for picture, where in zip(pictures, places, strict=True)}
    scores, highest = {}, {}
    for label in range(NUM_CLASSES):
        here = found.read(label)
        where = [lies[here.pictures[s.image].tobytes()][..., None] for s in here.segments]
        inside = [s.box_of(place)[..., 0][s.mask] for s, place in zip(here.segments, where, strict=True)]
        shares = {}
        for pattern in (label, *DISTRACTORS):
            of_segments = np.array([(pixels == pattern).mean() for pixels in inside])
            shares[pattern] = [of_segments[list(concept.segments)].mean() for concept in here.concepts]
        scores[label] = {
            pattern: here.concepts[int(np.argmax(of_concepts))].score
            for pattern, of_concepts in shares.items()
            if max(of_concepts) > 0.7
        }
        highest[label] = here.concepts[0].score
    return scores, highest


@pytest.fixture(scope="module")
def planted():
    return planted_rows(40)


def test_planted_patterns_are_ranked_first_and_what_all_share_is_not(planted, tmp_path):
    pictures, _, labels = planted
    scores, highest = scores_of_patterns(trained_net(pictures, labels), *planted, tmp_path)
    assert all(label in scores[label] for label in scores)
    assert np.mean([scores[label][label] == highest[label] for label in scores]) >= 0.8
    assert np.mean([scores[label][label] for label in scores]) > 0.95
    distractors = [scores[label][pattern] for label in scores for pattern in DISTRACTORS if pattern in scores[label]]
    assert len(distractors) >= NUM_CLASSES
    assert 0.25 < np.mean(distractors) < 0.75


def test_a_teacher_of_shuffled_labels_ranks_nothing(planted, tmp_path):
    pictures, _, labels = planted
    shuffled = np.random.default_rng(0).permutation(labels)
    scores, highest = scores_of_patterns(trained_net(pictures, shuffled), *planted, tmp_path)
    assert np.mean([scores[label][label] == highest[label] for label in scores if label in scores[label]]) < 0.8
